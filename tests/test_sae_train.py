from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saerl_fast.config import SAEConfig
from saerl_fast.errors import SaerlError
from saerl_fast.sae.files import load_sae, save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.partial import Partial
from saerl_fast.sae.tokens import Tokens
from saerl_fast.sae.train import _Trainer, collect_activations, geometric_median, train_sae
from tests.sae_parts import dense


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


def test_decoder_rows_learn_faster_the_narrower_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = planted(3000)
    cfg = SAEConfig(**SMALL | {"steps": 60, "lr": 1e-3})
    fvu = train_sae(x, cfg)[1]["fvu"]
    monkeypatch.setattr("saerl_fast.sae.train._ROW_RATE", 32**0.5)  # the others' rate at this width
    slower = train_sae(x, cfg)[1]["fvu"]
    assert fvu < 0.95 * slower
    monkeypatch.setattr("saerl_fast.sae.train._ROW_RATE", 0)
    assert train_sae(x, cfg)[1]["fvu"] == slower  # never below it


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


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("normalize", ["variance", "none", "layer_norm", "constant_norm_rescale"])
def test_saelens_loads_a_trained_sae_with_the_same_features(
    tmp_path: Path, activation: str, normalize: str
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    x = 3 * planted(2000)[0] + 2
    options = {"steps": 60, "activation": activation, "normalize": normalize}
    sae, metrics = train_sae(x, SAEConfig(layer=2, **SMALL | options))
    assert metrics["fvu"] < 0.6 and metrics["l0"] == pytest.approx(3, abs=0.8)
    save_sae(sae, tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), load_sae(tmp_path)
    with torch.no_grad():
        want, recon = theirs.encode(x), theirs(x)
    for mine in (sae, ours):
        assert torch.equal(dense(mine, x) != 0, want != 0)
        torch.testing.assert_close(dense(mine, x), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine(x).detach(), recon, atol=1e-3, rtol=1e-3)
    fired = (want > 0).float().mean(0)
    assert ours.usage["sparsity"].exp2().shape == (64,) and ours.usage["silent_steps"].min() == 0
    shares = 10 ** ours.usage["sparsity"]  # as SAELens writes them
    torch.testing.assert_close(shares, fired, atol=0.03, rtol=0.2)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_training_goes_on_from_an_sae(tmp_path: Path, activation: str) -> None:
    """On the same data nothing is lost; on drifted data it gains, and beats a new one so short."""
    x, _ = planted(4000)
    cfg = SAEConfig(layer=1, **SMALL | {"activation": activation})
    first, before = train_sae(x, cfg)
    save_sae(first, tmp_path)
    short = SAEConfig(**vars(cfg) | {"steps": 20, "lr": 1e-3})
    _, after = train_sae(x, short, init=load_sae(tmp_path))
    assert after["fvu_before"] == pytest.approx(before["fvu"], abs=1e-4)
    assert after["fvu"] < before["fvu"] + 0.005
    assert after["drift_cosine"] > 0.99 and after["drift_moved"] < 0.05
    one_step = SAEConfig(**vars(cfg) | {"steps": 1, "lr": 1e-9})
    same, _ = train_sae(x, one_step, init=load_sae(tmp_path))
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(
            same.state_dict()[name], weight, atol=0.02 if name == "threshold" else 1e-4, rtol=1e-3
        )
    skew = 0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.matrix_exp(skew - skew.t())
    moved = (x - x.mean(0)) @ turn + x.mean(0) + 0.05
    _, figures = train_sae(moved, short, init=load_sae(tmp_path))
    _, cold = train_sae(moved, short)
    assert figures["fvu"] < figures["fvu_before"] and figures["fvu"] < cold["fvu"]
    assert figures["drift_cosine"] < after["drift_cosine"]


def test_dead_statistics_go_on() -> None:
    x, _ = planted(1000)
    cfg = SAEConfig(**SMALL | {"steps": 40, "aux_k": 0})
    sae, _ = train_sae(x, cfg)
    silent = torch.arange(64) * 2
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(x, cfg, generator, None)
    sae.usage = {"silent_steps": silent}
    assert torch.equal(_Trainer(tokens, cfg, generator, init=sae).dead(1), 1 + silent > cfg.dead_after)
    sae.usage = {"sparsity": torch.where(torch.arange(64) < 5, -10.0, -1.0)}  # as SAELens writes it
    assert _Trainer(tokens, cfg, generator, init=sae).dead(1).sum() == 5
    sae.usage = {}
    assert not _Trainer(tokens, cfg, generator, init=sae).dead(1).any()


def test_other_forms_of_sae_are_gone_on_from() -> None:
    """Encoders that do not subtract b_dec, decoder rows of any norm: the same function at the start."""
    x, _ = planted(2000)
    base, _ = train_sae(x, SAEConfig(**SMALL | {"steps": 60, "activation": "batchtopk"}))
    W_enc, b_enc, W_dec, b_dec, threshold = (
        w.detach() for w in (base.W_enc, base.b_enc, base.W_dec, base.b_dec, base.threshold)
    )
    spec = SAESpec("jumprelu", apply_b_dec_to_input=False, max_norm=base.cfg.max_norm)
    other = SAE(W_enc / 2, (b_enc - b_dec @ W_enc) / 2, W_dec * 2, b_dec, threshold=threshold / 2, cfg=spec)
    torch.testing.assert_close(other(x), base(x), atol=1e-3, rtol=1e-3)
    still = SAEConfig(**SMALL | {"steps": 1, "lr": 1e-9, "activation": "batchtopk"})
    same, figures = train_sae(x, still, init=other)
    assert abs(figures["fvu"] - figures["fvu_before"]) < 0.02
    torch.testing.assert_close(same.W_dec, base.W_dec, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("lr", [1.0, 10.0, 1e4])
def test_a_rate_that_diverges_is_one_sentence(tmp_path: Path, activation: str, lr: float) -> None:
    """Also where the loss stays finite: the SAE would be worse than a constant."""
    cfg = SAEConfig(**SMALL | {"steps": 60, "lr": lr, "activation": activation})
    keep = Partial(tmp_path, "mark")
    keep.save("state", 0, {})
    keep.clear()
    with pytest.raises(SaerlError, match=r"diverged \(error .* at step .*; lower sae.lr"):
        train_sae(planted(1000)[0], cfg, on_step=lambda *_: None, keep=keep)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 2, 19])
def test_fewer_steps_than_a_warm_up_and_more_aux_features_than_dead_ones(steps: int) -> None:
    cfg = SAEConfig(**SMALL | {"steps": steps, "aux_k": 1000, "dead_after": 0})
    sae, metrics = train_sae(planted(1000)[0], cfg)
    assert metrics["steps"] == steps and metrics["fvu"] < 1
