import pytest

from saerl_fast.rl.rewards.answers import after_thinking, boxed, stated
from saerl_fast.rl.rewards.gym import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
        ("\\boxed{\\frac{1}{2}} Answer: 3", "\\frac{1}{2}"),
        ("\\fbox{42}", "42"),
        ("\\boxed{42", "42"),
        ("\\boxed{42 \nand so on", "42"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("5 \\boxed{}", ""),
        ("Answer: 1\nAnswer: 2\nbye", "2"),
        ("The answer is $x^2$ and not $x^3$.", "x^2"),
        ("The answer is $2$, $3$ and $4$", "2, 3, 4"),
        ("the answer is 12 apples because 3 times 4.", "12 apples"),
        ("#### 18", "18"),
        ("<answer> 18 </answer> done", "18"),
        ("So $a = 3$ and then 4 remain.", "4"),
        ("Hence we get $y = 7$.", "y = 7"),
        ("and then 12+", None),
        ("and then $x = 12", None),
        ("I give up on this one.", None),
        ("", None),
    ],
)
def test_one_answer_is_stated(text, answer):
    assert stated(text) == answer


def test_boxes_of_every_kind():
    assert boxed("\\boxed 7") == "7" and boxed("none") is None and boxed("\\boxed{\\boxed{7}}") == "7"


def test_only_what_follows_the_thinking_counts():
    assert after_thinking("<think>7</think> 8") == " 8"
    assert after_thinking("a</think>b</think>c") == "c" and after_thinking("<think>7") == ""


@pytest.mark.parametrize(
    ("text", "gold", "answer"),
    [
        ("steps\nAnswer: 12\nmore", "", "12"),
        ("Answer: 1\nno, the answer is: 2.", "", "2."),
        ("**Answer:** `7`", "", "7"),
        ("so \\boxed{\\frac{1}{2}} Answer: 3", "", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "", "2"),
        ("\\boxed{open", "", "open"),
        ("first\n\n last line \n", "", "last line"),
        ("Answer:\n 1 2\n 3 4\n", "1 2\n3 4", " 1 2\n 3 4"),
        ("Answer: 1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ("**Answer:**\n```\n1 2\n3 4\n```\nI hope that helps.", "1 2\n3 4", "1 2\n3 4"),
        ("Answer:\n1 2\n3 4\n\nThis is the grid that was asked for.", "1 2\n3 4", "1 2\n3 4"),
        ("<answer>\n1 2\n3 4\n</answer> bye", "1 2\n3 4", "1 2\n3 4"),
        ("<think>7</think><answer>12</answer>", "", "12"),
        ("", "", ""),
        ("Answer:", "", ""),
    ],
)
def test_final_answer(text, gold, answer):
    assert final_answer(text, gold) == answer
