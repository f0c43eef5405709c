"""Figures of an SAE: unexplained variance, the language model's loss with it spliced in, drift."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from saerl_fast.errors import SaerlError
from saerl_fast.sae.measure import ce_recovered, feature_drift, measure
from saerl_fast.sae.model import SAE, SAESpec
from tests.tiny_lm import tiny_model

ROWS = [[1 + (5 * i + j * j) % 40 for j in range(2 + i % 7)] for i in range(20)]


def lossless(width: int, **spec) -> SAE:
    """Features x and -x of every dimension."""
    eye = torch.eye(width)
    W_dec = torch.cat([eye, -eye])
    zeros = torch.zeros(2 * width), torch.zeros(width)
    return SAE(W_dec.t().clone(), zeros[0], W_dec, zeros[1], cfg=SAESpec("topk", width, **spec)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_loss_recovered_runs_from_all_to_none(kind: str) -> None:
    model = tiny_model(kind, width=32)
    for layer in (0, 1, 2):
        found = ce_recovered(model, lossless(32), ROWS, layer)
        assert found["ce_sae"] == pytest.approx(found["ce"], abs=1e-4)
        assert found["ce_zero"] != found["ce"]
        nothing = lossless(32)
        torch.nn.init.zeros_(nothing.W_dec)
        assert ce_recovered(model, nothing, ROWS, layer)["ce_sae"] == pytest.approx(
            found["ce_zero"], abs=1e-4
        )
        passed = ce_recovered(model, _zero_decoder(max_norm=0.0), ROWS, layer)  # every token is a sink
        assert passed["ce_sae"] == pytest.approx(passed["ce"], abs=1e-4)
    total = count = 0.0
    for row in ROWS:  # after all of that the model is as it was
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].detach()
        total += float(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    assert found["ce"] == pytest.approx(total / count, rel=1e-4)


def _zero_decoder(**spec) -> SAE:
    sae = lossless(32, **spec)
    torch.nn.init.zeros_(sae.W_dec)
    return sae


def test_texts_without_two_tokens_and_layers_beyond() -> None:
    assert ce_recovered(tiny_model(), lossless(32), [[1], []], 1) == {}
    with pytest.raises(SaerlError, match="layer 9 does not exist"):
        ce_recovered(tiny_model(), lossless(32), ROWS, 9)


def test_unexplained_variance_and_how_often_features_fire() -> None:
    x = torch.randn(500, 8) + 3
    assert measure(lossless(8), x)[0] < 1e-9
    sae = lossless(8)
    sae.cfg.__dict__["k"] = 4  # the four largest of eight
    fvu, l0, fired = measure(sae, x)
    dense = torch.zeros(500, 16).scatter_(1, sae.encode(x).indices.long(), sae.encode(x).values)
    want = (x - dense @ sae.W_dec.detach()).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert fvu == pytest.approx(float(want), rel=1e-4) and l0 == pytest.approx(4, abs=0.05)
    assert torch.equal(fired, (dense > 0).sum(0).float())


def test_drift_is_by_index() -> None:
    old, new = lossless(8), lossless(8)
    assert feature_drift(old, new) == {"drift_cosine": 1.0, "drift_moved": 0.0}
    with torch.no_grad():
        new.W_dec[:4] = new.W_dec[4:8]  # four of sixteen are others now
        new.W_dec[9] *= 7  # length is no drift
    drift = feature_drift(old, new)
    assert drift["drift_moved"] == 0.25 and drift["drift_cosine"] == pytest.approx(0.75)
