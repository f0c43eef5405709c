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
