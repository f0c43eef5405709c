import re
import sys
import threading

import pytest

from saerl_fast.rl.rewards import equal, get_reward, score_rewards
from saerl_fast.rl.rewards.basic import maths_gold
from tests.maths_kinds import KINDS
from tests.maths_more import MORE
from tests.maths_peers import PEERS
from tests.maths_peers2 import PEERS_2
from tests.maths_peers3 import PEERS_3
from tests.maths_peers4 import PEERS_4
from tests.maths_peers5 import PEERS_5
from tests.maths_peers6 import PEERS_6
from tests.maths_peers7 import PEERS_7
from tests.maths_table import GOLDS, TABLE


def paid(completion: str, answer: str, name: str = "maths") -> float:
    return float(score_rewards(get_reward(name), ["?"], [completion], {"answer": [answer]})[0])


def bare(gold: str) -> str:
    return re.sub(r"^\\\[|\\\]$|^\$|(?<!\\)\$$", "", gold).strip()


def test_the_table():
    pytest.importorskip("math_verify")
    wrong = [row for row in TABLE if paid(*row[:2]) != row[2]]
    assert not wrong and len(TABLE) >= 400


def test_what_public_reports_and_other_projects_have():
    pytest.importorskip("math_verify")
    table = PEERS + PEERS_2 + PEERS_3 + PEERS_4 + PEERS_5 + PEERS_6 + PEERS_7
    assert [row for row in table if paid(*row[:2], row[3]) != row[2]] == []


def test_the_table_without_math_verify(monkeypatch):
    """What is right must stay unpaid when wrong; only expressions in other forms may be missed."""
    monkeypatch.setattr(equal, "math_verify", lambda: False)
    wrong = [row for row in TABLE if paid(*row[:2]) != row[2]]
    assert all(right for *_, right in wrong) and len(wrong) <= 45, wrong


def test_every_real_answer_is_read_and_equals_itself():
    pytest.importorskip("math_verify")
    for gold in GOLDS:
        assert maths_gold(gold) is not None, gold
        for form in ("\\boxed{%s}", "so $\\boxed{ %s }$.", "The final answer is $%s$.", "Answer: %s"):
            assert paid(form % bare(gold), gold) == 1, (form, gold)


def test_of_two_stated_answers_exactly_one_is_paid():
    pytest.importorskip("math_verify")
    for a, b in zip(GOLDS[::3], GOLDS[1::3], strict=False):
        if not equal.same(a, b):
            for form in ("\\boxed{%s}. The final answer is $%s$.", "\\boxed{%s}\n\nAnswer: %s"):
                completion = form % (bare(a), bare(b))
                assert (paid(completion, a), paid(completion, b)) == (1, 0), completion


@pytest.mark.parametrize(
    ("name", "completion", "value"),
    [
        ("maths-boxed", "\\boxed{7}", 1),
        ("maths-boxed", "\\fbox{7}", 1),
        ("maths-boxed", "The answer is 7.", 0),
        ("maths-boxed", "$7$", 0),
        ("maths-think", "<think>\\boxed{8}</think> The answer is 7.", 1),
        ("maths-think", "\\boxed{8}</think> \\boxed{7}", 1),
        ("maths-think", "<think>\\boxed{7}</think> \\boxed{8}", 0),
        ("maths-think", "<think>\\boxed{7}</think> Some other text.", 0),
        ("maths-think", "<think>\\boxed{7}", 0),
        ("maths-think", "\\boxed{7}", 0),
        ("maths-boxed-think", "<think></think> \\boxed{7}", 1),
        ("maths-boxed-think", "<think></think> Answer: 7", 0),
        ("numeric-think", "8</think>7", 1),
        ("numeric-think", "7", 0),
        ("exact-think", "8</think> 7", 1),
    ],
)
def test_strict_and_thinking_forms(name, completion, value):
    assert paid(completion, "7", name) == value


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("She buys 3 and sells them.\n#### 18", "18"),
        ("Long solution. Hence $x=\\boxed{7}$, as was to be shown.", "7"),
        ("\\$18", "\\$18"),
        ("", None),
        ("  ", None),
        ("$$", None),
        ("\\frac{1}{2", None),
        ("one two three four " * 5, None),
    ],
)
def test_what_a_reference_answer_says(answer, read):
    assert maths_gold(answer) == read


HOSTILE = [
    "9^{9^{9^{9}}}", "9^{9^{9}} = 7", "\\binom{1000000}{500000}", "(x+1)^{999}", "(x+y+z+w)^{99}",
    "2^{\\binom{99}{50}}", "100000!", "99!!", "\\sum_{k=1}^{10^9} k", "((((((((((1" + "+1" * 2000,
]  # fmt: skip


def test_hostile_texts_end_and_are_not_paid():
    pieces = [
        "\\boxed{",
        "(",
        "$",
        "1 ",
        "1,",
        "\\frac",
        "{",
        "\\[",
        "answer is ",
        "-",
        "9",
        "=",
        "a=",
        "\\text{",
    ]
    pieces += [" ", "\n", "*", "\\boxed{1}, ", "$x$, ", "<|", "1^", "\\sqrt", "is ", "- ", "x_{", "a.b", "."]
    texts = [piece * (9000 // len(piece)) for piece in pieces]
    texts += ["5 " + "a" * 5000 + "!", "\\boxed{5 " + "a b" * 600 + "!}", "\\boxed{" * 900 + "}" * 900]
    texts += [
        piece * (6000 // len(piece)) for piece in ("7, not ", "5 * ", "5 cm and ", "A is correct ", "5'")
    ]
    texts += ["5 (" + "," * 6000, "\\boxed{" + "x<1 or " * 280 + "x<2}", "\\boxed{" + "1a" * 900 + "}"]
    texts += [
        "Answer: " + piece * (9000 // len(piece)) for piece in ("\n", "9", "1 if ", ". no, ", "$1$ when ")
    ]
    for name in ("maths", "maths-boxed", "numeric", "exact"):
        scores = get_reward(name)(["?"] * len(texts), texts, answer=["x^2+1"] * len(texts))
        assert scores == [0.0] * len(texts), name


def test_hostile_expressions_end_in_any_thread():
    pytest.importorskip("math_verify")
    found = []

    def work():
        found.append(paid("\\boxed{1+x^2}", "x^2+1"))
        found.extend(paid(f"\\boxed{{{text}}}", "x^2+7") for text in HOSTILE)

    work()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert found == ([1.0] + [0.0] * len(HOSTILE)) * 2


def test_without_its_package_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    equal.math_verify.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert [paid("\\boxed{3}", "3"), paid("3", "4")] == [1, 0]
        assert caplog.text.count("math-verify is not installed") == 1
    finally:
        equal.math_verify.cache_clear()


def test_maths_on_more_of_what_public_sets_have():
    pytest.importorskip("math_verify")
    wrong = [row for row in MORE if paid(*row[:2]) != row[2]]
    assert not wrong and len(MORE) >= 290


def test_maths_on_every_kind_of_notation():
    pytest.importorskip("math_verify")
    wrong = [row for row in KINDS if paid(*row[:2]) != row[2]]
    assert not wrong and len(KINDS) >= 280


def test_no_notation_pays_what_is_wrong_without_math_verify(monkeypatch):
    monkeypatch.setattr(equal, "math_verify", lambda: False)
    assert not [row for row in KINDS if not row[2] and paid(*row[:2])]
