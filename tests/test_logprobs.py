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


def grouped():
    """Three prompts of different lengths with 3, 1 and 4 completions of different lengths."""
    g = torch.Generator().manual_seed(3)
    owner = torch.tensor([0, 0, 0, 2, 5, 5, 5, 5])
    starts = torch.tensor([9, 9, 9, 12, 4, 4, 4, 4])
    lengths = torch.tensor([2, 1, 4, 3, 1, 5, 2, 2])
    ids = torch.randint(3, 40, (8, 15), generator=g)
    for i in (1, 2):
        ids[i, :9] = ids[0, :9]
    ids[5:, :4] = ids[4, :4]
    return ids, starts, lengths, owner


@pytest.mark.parametrize("kind", [*KINDS, "qwen3", "gemma3"])
@pytest.mark.parametrize("longest", [1, 5])
def test_sharing_the_prompt_changes_neither_values_nor_gradients(kind: str, longest: int) -> None:
    model = tiny_model(kind)
    ids, starts, lengths, owner = grouped()
    lengths = lengths.clamp(max=longest)
    plain_head(model)  # its own forward pass, and the proof's, once, are not of interest below
    completion_logprobs(model, ids, starts, lengths, owner=owner)
    results = []
    for options in ({}, {"owner": owner}):
        widths = []
        handle = model.base_model.register_forward_pre_hook(
            lambda m, a, kw, widths=widths: widths.append(tuple(kw["input_ids"].shape)), with_kwargs=True
        )
        found, entropy = completion_logprobs(model, ids, starts, lengths, temperature=0.7, **options)
        handle.remove()
        weights = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
        results.append(
            (found, entropy, torch.autograd.grad((found * weights).sum(), list(model.parameters())))
        )
    if "gemma" not in kind:  # sliding windows (and, in Gemma 2, a capped head) take the plain path
        assert widths == [(3, 12), (8, 4)][: longest if longest == 1 else 2]
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-5, rtol=1e-5)
    for a, b in zip(results[0][2], results[1][2], strict=True):
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


def test_micro_batches_keep_a_prompt_together() -> None:
    lengths = torch.tensor([5, 9, 2, 7, 7, 3, 9, 1])
    owner = torch.tensor([0, 0, 0, 3, 3, 4, 4, 4])
    parts = [part.tolist() for part in micro_batches(lengths, 27, owner)]
    assert parts == [[0, 1, 2], [5, 6, 7], [3, 4]]


def test_sharing_is_proved_again_for_longer_rows_and_wider_gaps(monkeypatch, caplog) -> None:
    model = tiny_model()
    ids, starts, lengths, owner = grouped()
    real, checks = module._shared_hidden, []
    rows_of = module.telling_rows
    monkeypatch.setattr(module, "telling_rows", lambda *rest: checks.append(1) or rows_of(*rest))
    for part in (slice(0, 3), slice(0, 8), slice(4, 8)):
        completion_logprobs(model, ids[part], starts[part], lengths[part], owner=owner[part])
    assert len(checks) == 2 and not caplog.records
    monkeypatch.setattr(module, "_shared_hidden", lambda *rest: real(*rest) * 1.2)
    wanted, _ = completion_logprobs(model, ids, starts, lengths)
    module._sharing[model] = module.Proof()  # as if it were another model
    for _ in range(2):
        found, _ = completion_logprobs(model, ids, starts, lengths, owner=owner)
        torch.testing.assert_close(found, wanted)
    (record,) = caplog.records
    assert "sharing a prompt's forward pass is off by" in record.message


def test_a_model_that_cannot_share_computes_every_row(monkeypatch, caplog) -> None:
    def fail(*rest):
        raise ValueError("no gaps please")

    monkeypatch.setattr(module, "_shared_hidden", fail)
    ids, starts, lengths, owner = grouped()
    model = tiny_model()
    found, _ = completion_logprobs(model, ids, starts, lengths, owner=owner)
    torch.testing.assert_close(found, completion_logprobs(model, ids, starts, lengths)[0])
    assert "failed (no gaps please); now computing every row whole" in caplog.text


def test_a_class_that_names_no_decoder_is_looked_into() -> None:
    model = tiny_model()
    model.base_model_prefix = "language_model"  # as Llama 4's class says
    assert model.base_model is model and module._parts(model)[0] is model.model
    assert plain_head(model)
