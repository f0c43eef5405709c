from __future__ import annotations

import logging
import time

import pytest

from saerl_fast.config import TrainConfig, load_config
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool
from saerl_fast.rl.rewards import dry, get_reward
from saerl_fast.rl.rewards.dry import check_think, first_call, read_answers, try_reward
from tests.tiny_lm import char_tokenizer


def pool(answers: list[str], prompts: list | None = None, first: str = "p") -> Pool:
    ids = [f"{first}{i}" for i in range(len(answers))]
    return Pool({"prompt_id": ids, "prompt": prompts or ids, "answer": answers, "level": [1] * len(ids)})


def check(reward, *pools: Pool, **settings) -> None:
    reward = get_reward(reward) if isinstance(reward, str) else reward
    read_answers(reward, pools)
    first_call(reward, pools[0], TrainConfig(**settings))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(dry, "_done", set())


@pytest.mark.parametrize(
    ("reward", "answers", "named"),
    [
        ("numeric", ["5", "12:30", "(1,2)", "6"], ["2 of 4", "p1 ('12:30')", "p2 ('(1,2)')", "several"]),
        ("numeric-think", ["5", "x"], ["1 of 2", "numeric-think"]),
        ("maths", ["5", "\\frac{1}{2", "\\$18"], ["1 of 3", "p1", "braces"]),
        ("maths-boxed", ["5", " "], ["1 of 2", "p1"]),
        ("exact", ["5", ""], ["1 of 2", "empty"]),
    ],
)
def test_answers_that_cannot_be_read_are_counted_and_named(reward, answers, named, caplog):
    with caplog.at_level(logging.WARNING):
        check(reward, pool(answers))
    assert all(word in caplog.text for word in named), caplog.text


def test_many_are_counted_and_some_named_from_both_pools(caplog):
    with caplog.at_level(logging.WARNING):
        check("numeric", pool(["1", "2"]), pool(["a"] * 8, first="e"))
    assert "8 of 10" in caplog.text and "e0 ('a')" in caplog.text and "and 3 more" in caplog.text
    with pytest.raises(SaerlError, match=r"numeric can read none of the 2 reference answers.*p0 \('a'\)"):
        check("numeric", pool(["a", "b"]))
    with pytest.raises(SaerlError, match="data.answer_column"):
        check("maths", pool(["", ""]))
    caplog.clear()
    check("maths", pool(["5", "Evelyn", "\\text{(A)}", "x^2", "1:2"]))
    assert not caplog.text


def test_the_first_rows_are_tried():
    seen = []

    def mine(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids, columns["level"]))
        return [1.0] * len(completions)

    chat = [{"role": "user", "content": "3 + 4?"}]
    check(mine, pool(["7", "8", "9"]), pool(["1"], first="e"))
    check(mine, pool(["7", "8"], [chat, chat]))
    assert seen[0] == (["p0", "p1"], ["7", "8"], [[0], [0]], [1, 1])
    assert seen[1][0] == [chat, chat] and seen[1][1][0] == [{"role": "assistant", "content": "7"}]

    def broken(prompts, completions, solution, **columns):
        return [1.0]

    with pytest.raises(SaerlError, match="broken asks for 'solution'.*test_dry.py line.*there are prompts"):
        check(broken, pool(["7"]))

    def slow(completions, **columns):
        time.sleep(30)

    with pytest.raises(SaerlError, match="slow took more than train.reward_timeout=0.2 s"):
        check(slow, pool(["7"]), reward_timeout=0.2)


def test_a_function_that_judges_nothing_is_pointed_out(caplog):
    def absent(completions, **columns):
        return [None] * len(completions)

    with caplog.at_level(logging.WARNING):
        check(absent, pool(["7", "8"]))
    assert "absent gave None for the first 2 rows" in caplog.text


def test_it_is_tried_once_for_each_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"prompt": "say {i}", "answer": "{i}"}}\n' for i in range(6))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "counted.py").write_text(
        "calls = []\n"
        "def score(completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [0.0 for _ in completions]\n"
    )
    settings = [f"data.train={tmp_path}/rows.jsonl", "data.eval_size=2", "train.reward=counted:score"]
    config = load_config(None, settings)
    assert config.train.reward == ["counted:score"]
    try_reward(config)
    try_reward(config)
    import counted

    assert counted.calls == [1]
    other = load_config(
        None, [*settings, "train.reward=[exact, counted:score]", "train.reward_weights=1,0.5"]
    )
    assert other.train.reward == ["exact", "counted:score"] and other.train.reward_weights == [1.0, 0.5]
    try_reward(other)
    assert counted.calls == [1, 1]


def test_a_tokenizer_that_drops_the_end_of_thinking_is_refused():
    tokenizer = char_tokenizer()
    check_think(["maths-think"], tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    check_think(["maths"], tokenizer)
    with pytest.raises(SaerlError, match="</think> is a special token.*maths-think would never pay"):
        check_think(["maths-think"], tokenizer)
