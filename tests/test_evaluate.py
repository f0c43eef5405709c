import numpy as np
import pytest
import torch

from saerl_fast.config import EvalConfig, RolloutConfig, TrainConfig, WarmupConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.render import Prompts
from saerl_fast.rl.evaluate import (
    answer_probabilities,
    evaluate,
    pass_rates,
    score_rollouts,
    warn_of_range,
)
from saerl_fast.rl.generate import generate
from saerl_fast.rl.rewards import get_reward
from saerl_fast.rl.warmup import warm_up
from tests.tiny_lm import char_tokenizer, prompts_of, tiny_model

TOKENIZER = char_tokenizer()
PROMPTS = ["1+1=", "say a: ", "zz"]


def pool_of(answers: list[str]) -> Prompts:
    return prompts_of(PROMPTS, answers, ["x", "y", "z"])


POOL = pool_of(["a", "b", "c"])


def settings(cfg: EvalConfig) -> TrainConfig:
    return TrainConfig(eval=cfg, rollout=RolloutConfig(max_new_tokens=4))


def first_letter(prompts, completions, answer, **columns):
    return [float(text[:1] == a) for text, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize("kind", ["llama", "neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answer_probability_by_hand(kind: str, temperature: float) -> None:
    model = tiny_model(kind)
    found = answer_probabilities(model, TOKENIZER, pool_of(["ab", "3", "xyz"]), temperature, max_tokens=20)
    for prompt, answer, value in zip(PROMPTS, ["ab", "3", "xyz"], found, strict=True):
        head = TOKENIZER(prompt)["input_ids"]
        tail = [*TOKENIZER(answer)["input_ids"], TOKENIZER.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1] / temperature
        wanted = logits.double().softmax(-1)[torch.arange(len(tail)), tail].prod().item()
        assert value == pytest.approx(wanted, rel=1e-4)


def test_probability_is_the_limit_of_sampled_accuracy() -> None:
    model, answers = tiny_model(), ["a", "bc", "d"]
    pool = pool_of(answers)
    warm_up(model, TOKENIZER, pool, TrainConfig(warmup=WarmupConfig(steps=12, batch_size=3, lr=1e-2)))
    exact = answer_probabilities(model, TOKENIZER, pool)
    cfg = RolloutConfig(group_size=1500, max_new_tokens=4)
    made = generate(model, TOKENIZER, pool.ids, cfg, seed=2)
    ends = made.finished.numpy().reshape(3, -1)
    hits = score_rollouts(made, pool.columns, PROMPTS, get_reward("exact")) * ends
    spread = np.sqrt(exact * (1 - exact) / 1500)
    assert (np.abs(hits.mean(1) - exact) < 4 * spread + 1e-3).all()
    assert 0.05 < exact.min() < exact.max() < 0.95  # not a comparison of zeros


def test_sample_mode_averages_k_completions() -> None:
    model = tiny_model()
    cfg = EvalConfig(mode="sample", samples=8)
    result = evaluate(model, TOKENIZER, POOL, first_letter, settings(cfg), seed=4)
    made = generate(model, TOKENIZER, POOL.ids, RolloutConfig(group_size=8, max_new_tokens=4), seed=4)
    scores = [
        np.mean([t[:1] == a for t in made.texts[i * 8 : (i + 1) * 8]]) for i, a in enumerate(["a", "b", "c"])
    ]
    assert [item["score"] for item in result.items] == pytest.approx(scores)
    assert [item["prompt_id"] for item in result.items] == ["x", "y", "z"]
    assert [item["completion"] for item in result.items] == made.texts[::8]
    assert result.mean == pytest.approx(np.mean(scores)) and result.tokens == int(made.lengths.sum())
    again = evaluate(model, TOKENIZER, POOL, first_letter, settings(cfg), seed=4)
    assert again == result


def test_greedy_mode_ignores_the_seed() -> None:
    model = tiny_model()
    cfg = EvalConfig(mode="greedy")
    a, b = (evaluate(model, TOKENIZER, POOL, first_letter, settings(cfg), seed=s) for s in (1, 2))
    assert a == b and len(a.items) == 3


def test_prob_mode_generates_nothing() -> None:
    model = tiny_model()
    result = evaluate(model, TOKENIZER, POOL, first_letter, settings(EvalConfig(mode="prob")))
    wanted = answer_probabilities(model, TOKENIZER, POOL)
    assert [item["score"] for item in result.items] == pytest.approx(wanted)
    assert result.tokens == 0 and result.items[0]["completion"] is None


def test_pass_rates() -> None:
    rewards = np.array([[1.0, 0.0, 1.0, 1.0], [2.0, -3.0, 0.5, 0.5]])
    assert pass_rates(rewards).tolist() == [0.75, 0.5]
    assert pass_rates(rewards, 0.5).tolist() == [0.75, 0.75] and pass_rates(rewards, 2.0).tolist() == [
        0,
        0.25,
    ]
    nan = float("nan")
    found = pass_rates(np.array([[1.0, nan, 0.0, nan], [nan] * 4]))
    assert found[0] == 0.5 and np.isnan(found[1])
    assert pass_rates(np.array([[5.0, nan, 1.0, 7.0]]), 4.0).tolist() == [2 / 3]


def test_rewards_outside_0_and_1_are_pointed_out(caplog) -> None:
    assert not warn_of_range(np.array([[0.0, 1.0, np.nan]]), None) and not caplog.text
    assert not warn_of_range(np.array([[43.0, -2.0]]), 10.0) and not caplog.text
    assert warn_of_range(np.array([[43.0, -2.0]]), None)
    assert "rewards from -2 to 43" in caplog.text and "train.pass_threshold" in caplog.text


def test_chats_reach_the_reward_as_messages() -> None:
    seen: dict = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0] * len(completions)

    asked = {"role": "user", "content": "1+1="}
    begun = {"role": "assistant", "content": "<think>"}
    columns = {"prompt": ["zz", [asked], [asked, begun]], "answer": ["1", "2", "3"]}
    made = generate(tiny_model(), TOKENIZER, POOL.ids, RolloutConfig(group_size=2, max_new_tokens=4))
    score_rollouts(made, columns, ["zz", "rendered", "begun"], spy)
    assert seen["prompts"] == ["zz", "zz", [asked], [asked], [asked], [asked]]
    assert seen["completions"][:2] == made.texts[:2]
    for i, start in ((2, ""), (3, ""), (4, "<think>"), (5, "<think>")):
        assert seen["completions"][i] == [{"role": "assistant", "content": start + made.texts[i]}]
    assert [len(row) for row in seen["ids"]] == made.lengths.tolist()
    score_rollouts(made, columns, ["zz[", "rendered[", "begun["], spy, prefill="[")
    assert seen["prompts"][:3] == ["zz", "zz", [asked]] and seen["completions"][0] == "[" + made.texts[0]
    assert seen["completions"][5] == [{"role": "assistant", "content": "<think>[" + made.texts[5]}]


def test_cut_off_text_is_paid_only_where_asked_for() -> None:
    made = generate(tiny_model(), TOKENIZER, POOL.ids, RolloutConfig(group_size=8, max_new_tokens=2), seed=4)
    ends = made.finished.numpy().reshape(3, -1)
    assert ends.any() and not ends.all()
    columns = POOL.columns | {"answer": ["1"] * 3}
    made.texts[:] = ["1"] * len(made.texts)
    assert (score_rollouts(made, columns, PROMPTS, get_reward("maths")) == ends).all()
    assert score_rollouts(made, columns, PROMPTS, get_reward("maths"), pay_truncated=True).all()


def test_items_that_the_reward_does_not_judge_are_left_out() -> None:
    def some(prompts, completions, answer, **columns):
        return [None if a == "b" else 0.5 for a in answer]

    result = evaluate(tiny_model(), TOKENIZER, POOL, some, settings(EvalConfig(samples=2)))
    assert [item["score"] for item in result.items] == [0.5, None, 0.5] and result.mean == 0.5
    with pytest.raises(SaerlError, match="None for all 3 held-out prompts"):
        evaluate(
            tiny_model(),
            TOKENIZER,
            POOL,
            lambda completions: [None] * len(completions),
            settings(EvalConfig()),
        )


def test_an_empty_pool() -> None:
    empty = prompts_of([])
    with pytest.raises(SaerlError, match="evaluation pool is empty"):
        evaluate(tiny_model(), TOKENIZER, empty, first_letter, TrainConfig())


def test_prob_mode_without_answers_is_refused() -> None:
    blank = pool_of(["", " ", ""])
    with pytest.raises(SaerlError, match="train.eval.mode=prob needs reference answers.*data.answer_column"):
        evaluate(tiny_model(), TOKENIZER, blank, first_letter, settings(EvalConfig(mode="prob")))
    partly = pool_of(["", "b", ""])
    cfg = EvalConfig(mode="prob")
    assert len(evaluate(tiny_model(), TOKENIZER, partly, first_letter, settings(cfg)).items) == 3
