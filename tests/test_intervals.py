import pytest

from saerl_fast.rl.rewards.intervals import same_intervals


def agree(one: str, gold: str) -> bool | None:
    return same_intervals(one, gold, str.__eq__)


@pytest.mark.parametrize(
    ("one", "gold"),
    [
        ("x<-1 or x>1", "(-\\infty,-1)\\cup(1,\\infty)"),
        ("x>1 \\cup x<-1", "x<-1, x>1"),
        ("|x|>1", "(-\\infty,-1)\\cup(1,\\infty)"),
        ("|t| \\le 3", "[-3,3]"),
        ("x \\ne 2", "(-\\infty,2)\\cup(2,\\infty)"),
        ("7 \\ge x > 2", "(2,7]"),
        ("x>2 and x \\le 7", "(2,7]"),
        ("]0,4[", "(0,4)"),
        ("\\{x \\in \\mathbb{R} : x \\ge 5\\}", "[5,+\\infty)"),
        ("all real numbers", "(-\\infty,\\infty)"),
        ("5 <= x", "x >= 5"),
    ],
)
def test_one_set_in_two_notations(one, gold):
    assert agree(one, gold) and agree(gold, one)


@pytest.mark.parametrize(
    ("one", "gold"),
    [
        ("x \\le -1 or x>1", "(-\\infty,-1)\\cup(1,\\infty)"),
        ("-1<x<1", "(-\\infty,-1)\\cup(1,\\infty)"),
        ("x>2 or x \\le 7", "(2,7]"),
        ("x>3", "x<3"),
        ("x>3", "y>3"),
        ("x>3 or x>3", "x>3"),
    ],
)
def test_other_sets(one, gold):
    assert not agree(one, gold) and not agree(gold, one)


@pytest.mark.parametrize(
    ("one", "gold"),
    [("(0,1)", "(0,1)"), ("5", "x>3"), ("x>3", "5"), ("x>1 and y>2", "(1,2)"), ("x=y", "x<y"), ("", "")],
)
def test_what_is_left_to_other_readers(one, gold):
    assert agree(one, gold) is None
