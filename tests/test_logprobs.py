import pytest
import torch

from saerl_fast.rl import logprobs as module
from saerl_fast.rl.logprobs import completion_logprobs, micro_batches, plain_head
from tests.tiny_lm import tiny_model

KINDS = ["llama", "qwen2", "neox", "gpt2", "gemma2"]


def batch(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    starts, lengths = torch.tensor([3, 7, 1, 5]), torch.tensor([4, 1, 6, 2])
    return torch.randint(3, 40, (4, 12), generator=g), starts, lengths


def plain(model, ids, starts, lengths, temperature):
    """Every row by itself, all logits, autograd through log_softmax."""
    rows = []
    for row, s, n in zip(ids, starts.tolist(), lengths.tolist(), strict=True):
        logits = model(row[None, : s + n]).logits[0, s - 1 : -1].float() / temperature
        rows.append(logits.log_softmax(-1))
    return torch.cat(rows), torch.cat([r[s : s + n] for r, s, n in zip(ids, starts, lengths, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_values_and_gradients_equal_the_plain_computation(kind: str, chunk_rows: int, monkeypatch) -> None:
    model = tiny_model(kind)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_rows * model.config.vocab_size)
    ids, starts, lengths = batch()
    found, entropy = completion_logprobs(model, ids, starts, lengths, temperature=0.7)
    full, targets = plain(model, ids, starts, lengths, 0.7)
    wanted = full.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1).detach(), atol=2e-5, rtol=1e-5)
    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    theirs = torch.autograd.grad((wanted * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max() + 1e-3), rtol=1e-3)


def test_gradcheck_in_double_precision() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 2, 2, 5])
    ours, _ = module._HeadLogProbs.apply(hidden, weight, bias, targets, 1.5, False)
    wanted = ((hidden @ weight.t() + bias) / 1.5).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), wanted, atol=1e-6, rtol=1e-6)
    scale = torch.randn(5, generator=g, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * scale).sum(), (hidden, weight, bias)),
        torch.autograd.grad((wanted * scale).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_tied_embeddings_gather_both_gradients() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids, starts, lengths = batch()
    found, _ = completion_logprobs(model, ids, starts, lengths)
    full, targets = plain(model, ids, starts, lengths, 1.0)
    weight = model.get_input_embeddings().weight
    ours = torch.autograd.grad(found.sum(), weight)[0]
    theirs = torch.autograd.grad(full.gather(1, targets[:, None]).sum(), weight)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_heads_that_are_more_than_a_matrix_are_recognised() -> None:
    assert all(plain_head(tiny_model(kind)) for kind in ("llama", "qwen2", "neox", "gpt2"))
    assert not plain_head(tiny_model("gemma2"))
    odd = tiny_model()
    real = odd.forward

    def forward(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    odd.forward = forward
    assert not plain_head(odd)


def test_never_holds_all_logits(monkeypatch) -> None:
    model = tiny_model()
    vocab = model.config.vocab_size
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * vocab)
    sizes = []
    real = module._logits
    monkeypatch.setattr(
        module, "_logits", lambda hidden, *rest: sizes.append(len(hidden)) or real(hidden, *rest)
    )
    completion_logprobs(model, *batch())[0].sum().backward()
    assert max(sizes) == 2 and sum(sizes) == 2 * 13  # forward and backward, completion tokens only


def test_micro_batches_cover_all_rows_within_the_budget() -> None:
    lengths = torch.tensor([5, 9, 2, 7, 7, 30, 1])
    parts = list(micro_batches(lengths, 20))
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    for part in parts:
        assert len(part) == 1 or len(part) * int(lengths[part].max()) <= 20
    assert parts[0].tolist() == [5]  # longer than the budget: by itself, and first
    assert len(parts) == 4
