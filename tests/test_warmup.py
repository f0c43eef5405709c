import pytest
import torch

from saerl_fast.config import RolloutConfig, TrainConfig, WarmupConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.evaluate import answer_probabilities
from saerl_fast.rl.generate import generate
from saerl_fast.rl.warmup import answer_rows, warm_up
from tests.tiny_lm import char_tokenizer, prompts_of, tiny_model, token_rows

TOKENIZER = char_tokenizer()
PROMPTS = [f"{a}+{b}=" for a in range(3) for b in range(3)]
POOL = prompts_of(PROMPTS, [str(a + b) for a in range(3) for b in range(3)])


def warmup(micro_tokens: int = 16384, **settings) -> TrainConfig:
    return TrainConfig(micro_tokens=micro_tokens, warmup=WarmupConfig(**settings))


def test_rows_are_tokenised_as_in_rollouts() -> None:
    model = tiny_model()
    ids, starts, lengths = answer_rows(model, TOKENIZER, token_rows(["1+1=", "ab"]), token_rows(["2", "xyz"]))
    assert starts.tolist() == [4, 2] and lengths.tolist() == [2, 4]
    one = Sampling.of(RolloutConfig(max_new_tokens=3), group_size=1)
    made = generate(model, TOKENIZER, token_rows(["1+1=", "ab"]), one)
    joined, _, _ = made.sequences()
    assert ids[0, :4].tolist() == joined[0, :4].tolist() and ids[1, :2].tolist() == joined[1, :2].tolist()
    assert TOKENIZER.decode(ids[1, 2:6].tolist()) == "xyz<eos>"


def test_learns_the_answers_and_when_to_stop() -> None:
    model = tiny_model()
    before = answer_probabilities(model, TOKENIZER, POOL).mean()
    cfg = warmup(steps=60, batch_size=9, lr=1e-2)
    record = warm_up(model, TOKENIZER, POOL, cfg)
    after = answer_probabilities(model, TOKENIZER, POOL).mean()
    assert before < 0.05 and after > 0.6
    assert record["loss"] < 0.3 * record["loss_first"] and record["steps"] == 60


def test_seeded_and_independent_of_the_micro_batch() -> None:
    weights = []
    for seed, budget in ((1, 16384), (1, 14), (2, 16384)):
        model = tiny_model()
        warm_up(
            model,
            TOKENIZER,
            POOL,
            warmup(steps=3, batch_size=4, lr=1e-3, micro_tokens=budget),
            seed=seed,
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).abs().mean() < 1e-5
    assert (weights[0] - weights[2]).abs().mean() > 1e-5


def test_sees_only_the_rows_allowed(monkeypatch) -> None:
    from saerl_fast.rl import warmup as module

    seen: set[tuple[int, ...]] = set()
    real = module.answer_rows
    monkeypatch.setattr(
        module, "answer_rows", lambda m, t, p, a: seen.update(map(tuple, p)) or real(m, t, p, a)
    )
    cfg = warmup(steps=5, batch_size=4, rows=3)
    warm_up(tiny_model(), TOKENIZER, POOL, cfg)
    assert len(seen) == 3


def test_bad_input() -> None:
    with pytest.raises(SaerlError, match="no rows"):
        warm_up(tiny_model(), TOKENIZER, prompts_of([]), warmup(steps=1))
    with pytest.raises(SaerlError, match="rows=0"):
        warm_up(tiny_model(), TOKENIZER, POOL, warmup(steps=1, rows=0))
    with pytest.raises(SaerlError, match="no tokens"):
        prompts_of([""], ["1"])
    with pytest.raises(SaerlError, match="no tokens"):
        answer_rows(tiny_model(), TOKENIZER, [[]], [[4]])
    with pytest.raises(SaerlError, match="131 tokens"):
        warm_up(tiny_model(), TOKENIZER, prompts_of(["a" * 30], ["b" * 100]), warmup(steps=1))


@pytest.mark.parametrize("size", [0, -1])
def test_an_impossible_batch_size(size: int) -> None:
    with pytest.raises(SaerlError, match=f"train.warmup.batch_size={size} "):
        warm_up(tiny_model(), TOKENIZER, POOL, warmup(steps=1, batch_size=size))


def test_without_answers_there_is_nothing_to_learn() -> None:
    cfg = warmup(steps=1, batch_size=2)
    with pytest.raises(SaerlError, match="the warm-up needs reference answers"):
        warm_up(tiny_model(), TOKENIZER, prompts_of(["a", "b"], ["", ""]), cfg)
    assert warm_up(tiny_model(), TOKENIZER, prompts_of(["a", "b"], ["", "c"]), cfg)["steps"] == 1


def test_out_of_memory_halves_the_micro_batch(monkeypatch, caplog) -> None:
    from saerl_fast.rl import warmup as module

    real = module.completion_logprobs

    def tight(model, ids, *more, **options):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, ids, *more, **options)

    cfg = warmup(steps=2, batch_size=8, lr=1e-3)
    free = warm_up(tiny_model(), TOKENIZER, POOL, cfg)
    monkeypatch.setattr(module, "completion_logprobs", tight)
    tightened = warm_up(tiny_model(), TOKENIZER, POOL, cfg)
    assert "micro_tokens is now" in caplog.text
    assert tightened["loss"] == pytest.approx(free["loss"], rel=1e-4)
