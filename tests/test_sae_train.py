from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saerl_fast.config import SAEConfig
from saerl_fast.errors import SaerlError
from saerl_fast.sae.tokens import Tokens
from saerl_fast.sae.train import _Trainer, collect_activations, geometric_median, train_sae


def planted(n: int, d: int = 32, features: int = 48, active: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sparse positive combinations of known unit directions, off-centre, with a little noise."""
    gen = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, d, generator=gen)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(n, features, generator=gen).topk(active).indices
    weights = torch.zeros(n, features).scatter_(1, chosen, 0.5 + torch.rand(n, active, generator=gen))
    noise = 0.01 * torch.randn(n, d, generator=gen)
    return weights @ directions + torch.randn(d, generator=gen) + noise, directions


SMALL = dict(d_sae=64, k=3, steps=250, batch_size=256, lr=1e-2, dead_after=50)


def recovery(directions: Tensor, W_dec: Tensor) -> float:
    """Mean over the planted directions of the best cosine with a learnt one."""
    return float((directions @ W_dec.detach().t()).amax(1).mean())


def test_planted_dictionary_is_recovered(device: torch.device) -> None:
    x, directions = (part.to(device) for part in planted(6500))
    x, fresh = x[:6000], x[6000:]
    sae, metrics = train_sae(x, SAEConfig(layer=2, **SMALL), model_name="planted")
    untrained, before = train_sae(x, SAEConfig(**SMALL | {"steps": 1, "lr": 1e-9}))
    assert recovery(directions, untrained.W_dec) < 0.65 and before["fvu"] > 0.5
    assert recovery(directions, sae.W_dec) > 0.97
    assert metrics["fvu"] < 0.08 and metrics["train_fvu"] < 0.08 and 1.5 < metrics["l0"] <= 3
    assert metrics["held_out_tokens"] == 600 and metrics["tokens"] == 5400 and metrics["steps"] == 250
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1).cpu(), torch.ones(64))
    assert (sae.layer, sae.k, sae.cfg.model_name) == (2, 3, "planted")
    # the reported figure is that of the SAE handed over, in the data's own units
    fvu = (fresh - sae(fresh).detach()).pow(2).sum() / (fresh - fresh.mean(0)).pow(2).sum()
    assert abs(float(fvu) - metrics["fvu"]) < 0.03


def test_scale_and_offset_of_the_data_do_not_matter() -> None:
    x, _ = planted(2000)
    cfg = SAEConfig(**SMALL | {"steps": 60})
    plain, a = train_sae(x, cfg)
    shifted, b = train_sae(100 * x + 50, cfg)
    assert abs(a["fvu"] - b["fvu"]) < 0.02
    torch.testing.assert_close(shifted.W_dec, plain.W_dec, atol=0.02, rtol=0.05)


def test_same_seed_same_sae() -> None:
    x, _ = planted(1000)
    cfg = SAEConfig(**SMALL | {"steps": 30})
    first, again, other = (train_sae(x, c)[0] for c in (cfg, cfg, SAEConfig(**vars(cfg) | {"seed": 1})))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("aux_k", [0, 16])
def test_auxiliary_loss_revives_dead_features(aux_k: int) -> None:
    x, _ = planted(3000)
    cfg = SAEConfig(**SMALL | {"steps": 150, "dead_after": 10, "aux_k": aux_k})
    tokens = Tokens(x, cfg, torch.Generator().manual_seed(1), None)
    run = _Trainer(tokens, cfg, torch.Generator().manual_seed(0))
    with torch.no_grad():
        run.b_enc[:32] = -4.0  # half of the features never fire
    dead = [int(run.dead(step)[:32].sum()) for step in range(1, 151) if run.step(step)]
    assert dead[15] >= 30
    assert min(dead[15:]) >= 24 if aux_k == 0 else min(dead[15:]) <= 8
    assert dead[-1] >= 24 if aux_k == 0 else dead[-1] <= 20


def test_attention_sinks_are_left_out_and_remembered() -> None:
    x, _ = planted(2000)
    x[::50] *= 300
    sae, metrics = train_sae(x, SAEConfig(**SMALL | {"steps": 100}))
    assert metrics["sink_tokens"] == 40 and metrics["fvu"] < 0.5
    median = float(x.norm(dim=1).median())
    assert sae.cfg.max_norm == pytest.approx(10 * median, rel=0.01)
    everything, metrics = train_sae(x, SAEConfig(**SMALL | {"steps": 2, "sink_ratio": 0.0}))
    assert metrics["sink_tokens"] == 0 and everything.cfg.max_norm is None


def test_progress_is_reported() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    x, _ = planted(800)
    train_sae(x, SAEConfig(**SMALL | {"steps": 60}), on_step=lambda *args: seen.append(args))
    assert [step for step, _ in seen] == [25, 50, 60]
    assert set(seen[0][1]) == {"steps", "loss", "fvu", "dead", "lr"} and seen[0][1]["lr"] > seen[-1][1]["lr"]
    assert seen[-1][1]["fvu"] < seen[0][1]["fvu"]


def test_few_activations_batches_and_half_precision() -> None:
    x, _ = planted(7)
    sae, metrics = train_sae(x, SAEConfig(**SMALL | {"steps": 3}))  # fewer than a batch, nothing held out
    assert metrics["held_out_tokens"] == 0 and torch.isfinite(sae.W_dec).all()
    x, _ = planted(300)
    cfg = SAEConfig(**SMALL | {"steps": 5, "max_tokens": 200})
    streamed, metrics = train_sae(iter(x.split(64)), cfg)
    assert metrics["tokens"] + metrics["held_out_tokens"] == 200
    assert torch.equal(streamed.W_dec, train_sae(x[:200], cfg)[0].W_dec)
    assert train_sae(x.bfloat16(), cfg)[0].W_dec.dtype == torch.float32
    constant, metrics = train_sae(torch.ones(50, 8), SAEConfig(**SMALL | {"steps": 3}))
    assert torch.isfinite(constant(torch.ones(1, 8))).all()


def test_batchtopk_trains_and_keeps_k_on_average(device: torch.device) -> None:
    """The running threshold makes the SAE as sparse as it was in training, and is in the data's units."""
    x, directions = (part.to(device) for part in planted(6500))
    cfg = SAEConfig(**SMALL | {"activation": "batchtopk"})
    sae, metrics = train_sae(x[:6000], cfg)
    assert sae.architecture == "batchtopk" and sae.cfg.k == 3
    assert recovery(directions, sae.W_dec) > 0.93 and metrics["fvu"] < 0.1
    assert 2.0 < metrics["l0"] < 4.0
    assert sae.threshold is not None
    assert float(sae.threshold.min().detach()) == float(sae.threshold.max().detach()) > 0
    again, _ = train_sae(x[:6000], cfg)
    assert torch.equal(sae.threshold, again.threshold) and torch.equal(sae.W_enc, again.W_enc)
    scaled, figures = train_sae(100 * x[:6000], cfg)
    assert float((scaled.threshold / sae.threshold)[0].detach()) == pytest.approx(100, rel=0.05)
    assert figures["l0"] == pytest.approx(metrics["l0"], abs=0.3)


def test_geometric_median_ignores_outliers() -> None:
    x = torch.randn(200, 5)
    x[:20] += 1000
    assert geometric_median(x).norm() < 1 < x.mean(0).norm()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.empty(0, 16), r"no activations to train an SAE on \(shape \(0, 16\)\)"),
        ([], "no activations"),
        (torch.tensor([[1.0, float("nan")]]), "1 of 1 activations are not finite"),
    ],
    ids=["empty", "no-batches", "nan"],
)
def test_bad_input_is_one_sentence(x: Any, message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        train_sae(x, SAEConfig(**SMALL))


def test_collecting_activations() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, max_position_embeddings=64, **shape)).eval()
    rows = [[ord(c) % 30 for c in "word" * (1 + i % 5)] for i in range(50)]
    every = collect_activations(model, rows, 1)
    assert every.shape == (sum(map(len, rows)), 16)
    some = collect_activations(model, rows, 1, max_tokens=101, seed=3)
    assert some.shape == (101, 16)
    assert torch.equal(some, collect_activations(model, rows, 1, max_tokens=101, seed=3))
    assert torch.cdist(some, every).amin(1).max() < 1e-3
    sae, metrics = train_sae(every, SAEConfig(**SMALL | {"steps": 20}))
    assert sae.d_in == 16 and metrics["fvu"] < 1
    with pytest.raises(SaerlError, match="no text with a token"):
        collect_activations(model, [[]], 1)
