import pytest
import torch
from torch import Tensor

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.decode import Sampling, sample
from saerl_fast.rl.generate import generate
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.rollouts import Rollouts, left_pad, stop_tokens
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows

PROMPTS = token_rows(["1+1=", "what is 12+30?", "a", "copy: xyz."])
KINDS = ["llama", "qwen2", "qwen3", "neox", "gpt2", "gemma2", "gemma3"]
TOKENIZER = char_tokenizer()


def naive(model, prompt: list[int], uniforms: Tensor, temperature: float, top_p: float = 1.0) -> list[int]:
    """One row at a time, without a cache, without padding."""
    ids, out = list(prompt), []
    for u in uniforms:
        logits = model(torch.tensor([ids + out])).logits[:, -1]
        out.append(int(sample(logits, u[None], temperature, top_p)[0]))
        if out[-1] == TOKENIZER.eos_token_id:
            break
    return out


def rows(rollouts: Rollouts) -> list[list[int]]:
    both = zip(rollouts.completion_ids.tolist(), rollouts.lengths.tolist(), strict=True)
    return [ids[:n] for ids, n in both]


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_as_the_plain_loop(kind: str) -> None:
    model = tiny_model(kind, spread=1.5)
    cfg = RolloutConfig(group_size=3, max_new_tokens=20, temperature=0.8)
    rollouts = generate(model, TOKENIZER, PROMPTS, cfg, seed=3)
    uniforms = torch.rand(12, 20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = [naive(model, PROMPTS[i // 3], uniforms[i], 0.8) for i in range(12)]
    assert rows(rollouts) == wanted
    assert rollouts.finished.tolist() == [row[-1] == 1 for row in wanted]
    assert len({tuple(row) for row in wanted}) > 6  # sampling, not one answer for all


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_agree_with_recomputed(kind: str, temperature: float) -> None:
    model = tiny_model(kind)
    cfg = RolloutConfig(group_size=4, max_new_tokens=24, temperature=temperature, top_p=0.9)
    rollouts = generate(model, TOKENIZER, PROMPTS, cfg, seed=1)
    with torch.no_grad():
        again, _ = completion_logprobs(model, *rollouts.sequences(), temperature=temperature)
    torch.testing.assert_close(rollouts.logprobs[rollouts.completion_mask], again, atol=1e-4, rtol=0)
    assert (rollouts.logprobs[~rollouts.completion_mask] == 0).all()


def test_finished_rows_leave_the_batch_without_changing_the_others() -> None:
    model = tiny_model(spread=1.5)
    with torch.no_grad():
        model.lm_head.weight[1] *= 1.5  # ends often, at different places
    cfg = RolloutConfig(group_size=8, max_new_tokens=40)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollouts = generate(model, TOKENIZER, PROMPTS, cfg, seed=0)
    handle.remove()
    assert sizes[0] == 4 and sizes[1] == 32 and sizes[-1] <= 16
    assert rollouts.finished.float().mean() > 0.5
    lengths = rollouts.lengths
    assert len(lengths.unique()) > 4
    for i, row in enumerate(rows(rollouts)):
        assert (row.count(1), row[-1] == 1) == ((1, True) if rollouts.finished[i] else (0, False))


def test_chunks_and_seeds() -> None:
    model = tiny_model()
    cfg = RolloutConfig(group_size=2, max_new_tokens=12)
    whole = generate(model, TOKENIZER, PROMPTS, cfg, seed=5)
    parts = generate(
        model, TOKENIZER, PROMPTS, RolloutConfig(group_size=2, max_new_tokens=12, batch_size=2), seed=5
    )
    assert rows(whole) == rows(parts) and whole.texts == parts.texts
    torch.testing.assert_close(whole.logprobs, parts.logprobs, atol=1e-5, rtol=0)
    assert rows(generate(model, TOKENIZER, PROMPTS, cfg, seed=5)) == rows(whole)
    assert rows(generate(model, TOKENIZER, PROMPTS, cfg, seed=6)) != rows(whole)


def test_a_batch_holds_as_many_rows_as_it_may_in_whole_groups() -> None:
    model, sizes = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    cfg = RolloutConfig(group_size=3, max_new_tokens=2, batch_size=7)
    generate(model, TOKENIZER, PROMPTS, cfg)
    handle.remove()
    width = max(map(len, PROMPTS))
    assert [size for size in sizes if size[0] > 1] == [(2, width), (6, 1)] * 2  # a proof takes one row


def test_a_prompt_may_fill_the_context_to_its_end() -> None:
    made = generate(tiny_model(), TOKENIZER, [[4] * 112], RolloutConfig(group_size=2, max_new_tokens=16))
    assert made.prompt_lens.tolist() == [112]
    with pytest.raises(SaerlError, match="113 tokens and 16 new ones"):
        generate(tiny_model(), TOKENIZER, [[4] * 113], RolloutConfig(group_size=2, max_new_tokens=16))


def test_out_of_memory_halves_the_batch(monkeypatch, caplog) -> None:
    from saerl_fast.rl import generate as module

    real = module._decode

    def tight(model, ids, *rest):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(model, ids, *rest)

    model, cfg = tiny_model(), RolloutConfig(group_size=2, max_new_tokens=6)
    whole = generate(model, TOKENIZER, PROMPTS, cfg, seed=5)
    monkeypatch.setattr(module, "_decode", tight)
    assert rows(generate(model, TOKENIZER, PROMPTS, cfg, seed=5)) == rows(whole)
    assert "out of memory" in caplog.text


class Recorder:
    def __init__(self, model) -> None:
        self.model, self.inside, self.calls = model, False, []
        model.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module, args, kwargs) -> None:
        self.calls.append((self.inside, tuple(kwargs["input_ids"].shape)))

    def __enter__(self):
        self.inside = True
        return self

    def __exit__(self, *_) -> None:
        self.inside = False

    def features(self):
        return sum(inside for inside, _ in self.calls)


def test_capture_sees_the_prefill_and_nothing_else() -> None:
    model = tiny_model()
    recorder = Recorder(model)
    cfg = RolloutConfig(group_size=4, max_new_tokens=5)
    rollouts = generate(model, TOKENIZER, PROMPTS, cfg, capture=recorder)
    assert rollouts.features == 1
    assert recorder.calls[0] == (True, (4, len(PROMPTS[1])))
    assert len(recorder.calls) > 3 and not any(inside for inside, _ in recorder.calls[1:])
    assert rollouts.timings["generate"] > 0


def test_greedy_takes_the_likeliest_and_modes_are_restored() -> None:
    model = tiny_model().train()
    one = Sampling.of(RolloutConfig(max_new_tokens=8), group_size=1, temperature=0)
    greedy = generate(model, TOKENIZER, PROMPTS, one)
    assert model.training
    ids, starts, lengths = greedy.sequences()
    with torch.no_grad():
        logits = model.eval()(ids).logits
    for i in range(4):
        span = slice(int(starts[i]) - 1, int(starts[i] + lengths[i]) - 1)
        assert logits[i, span].argmax(-1).tolist() == rows(greedy)[i]


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]]).expand(20_000, -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)]:
        token, logprob = sample(logits, uniforms, temperature, top_p)
        probs = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(logprob, probs.log()[token])
        if top_p < 1:  # 0.453, 0.275, 0.166: three tokens hold 0.8
            probs = probs * torch.tensor([1, 1, 1, 0, 0])
            probs = probs / probs.sum()
        found = torch.bincount(token, minlength=5) / 20_000
        assert (found - probs).abs().max() < 0.012
        assert found[4] == 0


def test_extremes_of_the_uniform_pick_possible_tokens() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]] * 2)
    token, _ = sample(logits, torch.tensor([0.0, 1.0 - 2**-24]), 1.0, 1.0)
    assert token.tolist() == [1, 2]


def test_sequences_join_prompt_and_completion() -> None:
    ids, lens = left_pad([[5, 6], [7, 8, 9]], 0, torch.device("cpu"))
    completions = torch.tensor([[3, 1], [4, 0], [2, 2], [1, 0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    made = Rollouts(ids, lens, completions, mask, mask.float(), [""] * 4, mask[:, 0], 2)
    joined, starts, lengths = made.sequences()
    real = [row[: s + n] for row, s, n in zip(joined.tolist(), starts, lengths, strict=True)]
    assert real == [[5, 6, 3, 1], [5, 6, 4], [7, 8, 9, 2, 2], [7, 8, 9, 1]]


def test_stop_tokens_and_texts() -> None:
    model = tiny_model(spread=1.5)
    model.generation_config.eos_token_id = [1, 7]
    assert stop_tokens(model, TOKENIZER) == [1, 7]
    assert stop_tokens(object(), TOKENIZER) == [1]  # a model that names none has the tokenizer's
    rollouts = generate(model, TOKENIZER, PROMPTS, RolloutConfig(group_size=8, max_new_tokens=30))
    ends = {row[-1] for row, done in zip(rows(rollouts), rollouts.finished, strict=True) if done}
    assert ends == {1, 7}
    wanted = [
        "".join(TOKENIZER.convert_ids_to_tokens([t for t in row if t > 2 and t != 7]))
        for row in rows(rollouts)
    ]
    assert rollouts.texts == wanted


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[]], "prompt 0 has no tokens"),
        ([[4] * 120], "120 tokens and 16 new ones, the model reads 128"),
    ],
)
def test_bad_input(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        generate(tiny_model(), TOKENIZER, prompts, RolloutConfig(max_new_tokens=16))
