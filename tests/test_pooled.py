"""One pass and what it leaves: against each prompt by itself through the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.sae import capture, pooled
from saerl_fast.sae.capture import FeatureCapture, owned, resolve_products
from saerl_fast.sae.pooled import bank_pass
from tests.test_capture import ROWS, alone, left_padded, sae_for, tiny_model

ANSWERS = [[20, 21, 22], [], [23]]
OWN = [(2, 5), (0, 2), (0, 1, 2, 4)]
KINDS = ("sae", "sae_max", "sae_mean", "sae_last", "hidden", "answer", "scalars", "answer_logprob")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def mine(row: list[int], spans: tuple[int, ...]) -> list[int]:
    return [i for a, b in zip(spans[::2], spans[1::2], strict=True) for i in range(a, b)]


@pytest.mark.parametrize("limit", [1 << 27, 40 * 8])
def test_every_kind_is_what_the_row_alone_gives(model, monkeypatch, limit):
    monkeypatch.setattr(pooled, "LOGITS", limit)  # of which the batches are made
    monkeypatch.setattr(pooled, "POSITIONS", 3)
    sae = sae_for(16)
    found = bank_pass(model, sae, ROWS, ANSWERS, kinds=KINDS, own=OWN, reduce="mean", batch_tokens=16)
    assert list(found) == list(KINDS)
    for i, (row, answer, spans) in enumerate(zip(ROWS, ANSWERS, OWN, strict=True)):
        own, x = mine(row, spans), alone(model, [row + answer], 2)
        codes = sae.encode(x).to_dense(48)
        for kind, want in [
            ("sae", codes[own].mean(0)),
            ("sae_mean", codes[own].mean(0)),
            ("sae_max", codes[own].amax(0)),
            ("sae_last", codes[len(row) - 1]),
            ("answer", codes[len(row) :].mean(0) if answer else torch.zeros(48)),
        ]:
            torch.testing.assert_close(found[kind].to_dense()[i], want, atol=1e-4, rtol=1e-4)
        hidden = torch.cat([x[own].mean(0), x[len(row) - 1]])
        np.testing.assert_allclose(found["hidden"][i], hidden.numpy(), atol=1e-4, rtol=1e-4)
        logprobs = model(torch.tensor([row + answer])).logits[0].log_softmax(-1).detach()
        told = [float(logprobs[t - 1, (row + answer)[t]]) for t in range(1, len(row + answer))]
        last = logprobs[len(row) - 1]
        scalars = [float(-(last.exp() * last).sum()), float(torch.log1p(-last.exp().max()))]
        scalars += [-np.mean([told[t - 1] for t in own if t]), np.log(len(own))]
        np.testing.assert_allclose(found["scalars"][i], scalars, atol=2e-3)
        total, size = sum(told[len(row) - 1 :]), len(answer)
        want = [total, total / max(size, 1), np.log1p(size)]
        np.testing.assert_allclose(found["answer_logprob"][i], want, atol=1e-4)


def test_the_pass_ends_at_the_layer_unless_the_head_is_needed(model):
    ran = []
    handle = model.model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    bank_pass(model, sae_for(16), ROWS, kinds=("sae", "hidden"))
    assert not ran
    bank_pass(model, sae_for(16), ROWS, kinds=("scalars",))
    assert ran
    handle.remove()


def test_without_a_template_hidden_leaves_the_first_token_out(model):
    found = bank_pass(model, sae_for(16), [[5], *ROWS], kinds=("hidden",))["hidden"]
    x = alone(model, [ROWS[0]], 2)
    np.testing.assert_allclose(found[1, :16], x[1:].mean(0).numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found[0, :16], found[0, 16:])  # there is no other


def test_answers_that_are_needed_must_be_there(model):
    with pytest.raises(SaerlError, match="answer_logprob need answers"):
        bank_pass(model, sae_for(16), ROWS, kinds=("answer_logprob",))


def test_captured_features_leave_out_the_same_tokens(model):
    sae = sae_for(16)
    want = bank_pass(model, sae, ROWS, own=OWN)["sae"].to_dense()
    capture = FeatureCapture(model, sae)
    ids, mask = left_padded(ROWS)
    capture.expect(ROWS, OWN)
    with capture:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(capture.features().to_dense(), want, atol=1e-4, rtol=1e-4)
    capture.expect(ROWS[:1], OWN[:1])  # the others are pooled whole
    with capture:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    found = capture.features().to_dense()
    torch.testing.assert_close(found[0], want[0], atol=1e-4, rtol=1e-4)
    whole = bank_pass(model, sae, ROWS)["sae"].to_dense()
    torch.testing.assert_close(found[1:], whole[1:], atol=1e-4, rtol=1e-4)


def test_owned_tokens_and_their_offsets():
    x = torch.arange(9.0)[:, None]
    tokens, offsets = owned(x, torch.tensor([0, 4, 9]), [(1, 2, 3, 4), (0, 5)])
    assert tokens[:, 0].tolist() == [1, 3, 4, 5, 6, 7, 8] and offsets.tolist() == [0, 2, 7]


def test_products_in_bfloat16_are_near_and_only_where_they_pay(monkeypatch):
    small, wide = tiny_model("llama"), torch.nn.Linear(2, 2)
    wide.config = type("Config", (), {"hidden_size": 512})()
    amd, intel = "vendor_id : AuthenticAMD", "vendor_id : GenuineIntel"
    for avx, amx, maker, pays in (
        (True, False, amd, True),
        (False, False, amd, False),
        (True, True, intel, True),
        (True, False, intel, False),  # its units for it are half of those for float32
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(capture, "_maker", lambda maker=maker: maker)
        assert resolve_products("auto", wide) is (torch.bfloat16 if pays else None)
        assert resolve_products("auto", small) is None and resolve_products("model", wide) is None
    assert resolve_products("bfloat16", small) is torch.bfloat16
    assert resolve_products("auto", wide.to(torch.float64)) is None
    exact = bank_pass(small, sae_for(16), ROWS, kinds=("hidden",))["hidden"]
    near = bank_pass(small, sae_for(16), ROWS, kinds=("hidden",), dtype=torch.bfloat16)["hidden"]
    assert 0 < np.abs(near - exact).mean() < 0.02 * np.abs(exact).mean()
