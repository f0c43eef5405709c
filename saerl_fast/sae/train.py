"""Training a TopK or BatchTopK sparse autoencoder on hidden states: small, seeded, good enough to score with.

TopK and the auxiliary loss for dead features follow Gao et al. 2024 (arXiv 2406.04093), BatchTopK Bussmann
et al. 2024 (arXiv 2412.06410) with SAELens' running threshold for inference; decoder rows are kept at unit
norm and their gradients orthogonal to them (Bricken et al. 2023). Our own choices: decoder rows of less than
4096 elements have a higher learning rate (SAELens starts them at a tenth of the norm, where the same steps
turn them further); the input is centred on its geometric median and scaled to unit variance per dimension
while training (folded back at the end), and attention-sink tokens, whose norm is a hundred times the others'
(Sun et al. 2024, arXiv 2402.17762), are left out of training and of pooling.

An SAE may go on from another one (``init``), such as that of the model before it was trained further: its
weights, threshold and the steps for which features have been silent are taken over, Adam starts anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from saerl_fast.config import SAEConfig
from saerl_fast.errors import SaerlError
from saerl_fast.sae.capture import Progress, iter_hidden_ids
from saerl_fast.sae.measure import feature_drift, measure
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.partial import Partial
from saerl_fast.sae.tokens import HELD_OUT, Stream, Tokens, with_tokens
from saerl_kernels import TopK, encode_batch_topk_train, encode_topk_train, sparse_decode
from saerl_kernels.pack import normalise

log = logging.getLogger(__name__)
OnStep = Callable[[int, dict[str, float]], None]

_LOG_EVERY = 25  # steps between callbacks; each one waits for the device
_DEAD_EVERY = 10  # steps between recounts of the dead features
_AUX_WEIGHT = 1 / 32  # of the auxiliary loss, as in Gao et al.
_THRESHOLD_RATE = 0.03  # of BatchTopK's running threshold; SAELens' 0.01 is meant for longer runs
_ROW_RATE = 64  # over the root of their width: times sae.lr, the learning rate of decoder rows, at least it
_LOST = 1e4  # times the variance: an error that no SAE comes back from
_WEIGHTS = ("W_enc_t", "b_enc", "W_dec", "b_dec")
_RUN_TIME = ("layer_norm", "constant_norm_rescale")  # settings that SAELens applies at each call
_MEASURED = 32768  # training tokens on which dead features are also looked for


def train_sae(
    activations: Tensor | Iterable[Tensor] | Stream,
    cfg: SAEConfig,
    on_step: OnStep | None = None,
    *,
    model_name: str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    keep: Partial | None = None,
    init: SAE | None = None,
) -> tuple[SAE, dict[str, float]]:
    """(the SAE in eval mode, its metrics) from activations [n, d_in], batches of such, or a stream.

    Every 25 steps and at the last one ``on_step(step, {"steps", "loss", "fvu", "dead", "lr"})`` is called.
    Metrics: "fvu" (fraction of variance unexplained) and "l0" (features per token) on held-out tokens,
    "dead_fraction" (features silent on those and on up to 32,768 training tokens), "train_fvu", "steps",
    "seconds", "tokens", "held_out_tokens", "sink_tokens"; with ``init``, the SAE to go on from, also
    "fvu_before", its own on the same held-out tokens, and those of `feature_drift`. ``cfg.layer`` is written
    into the SAE. Runs on ``device`` (the activations' own by default); on a CPU the same seed and activations
    give the same SAE. With ``keep`` its state is saved now and then and at an interrupt, and training goes on
    from there, bit for bit on a CPU. Raises SaerlError for empty or non-finite activations, settings and an
    ``init`` that do not fit, and a training that diverges.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    state = keep.latest("state") if keep else None
    if isinstance(activations, Stream):
        activations.begin(device, state)
        tokens: Tokens = activations
    else:
        tokens = Tokens(activations, cfg, generator, device)
    start = time.perf_counter()
    before = {} if init is None else _check_init(init, tokens, cfg, backend)
    run = _Trainer(tokens, cfg, generator, backend, init)

    def check(error: float, step: int, limit: float = _LOST) -> None:
        if not error < limit:
            if keep is not None:
                keep.clear()
            raise SaerlError(
                f"SAE training diverged (error {error:.3g} at step {step}, that of a constant is 1); "
                "lower sae.lr"
            )

    done = 0
    if keep is not None and state:
        try:
            done = run.restore(state)
        except (KeyError, RuntimeError, ValueError) as err:  # of code that has changed since
            raise SaerlError(f"{keep.folder} does not fit this training ({err}); remove it") from err
    for step in range(1 + done, cfg.steps + 1):
        loss, fvu = run.step(step)
        if on_step is not None and (step % _LOG_EVERY == 0 or step == cfg.steps):
            shown = {"loss": loss, "fvu": fvu, "dead": run.dead(step).float().mean()}
            figures = {name: float(value) for name, value in shown.items()}
            check(figures["loss"], step)
            on_step(step, {"steps": float(cfg.steps), **figures, "lr": run.lr(step)})
        if keep is not None and (keep.due() or (step < cfg.steps and tokens.runs_out(cfg.batch_size))):
            keep.save("state", step, run.state(step))
            keep.keep_only("state", step)
    runtime = cfg.normalize if cfg.normalize in _RUN_TIME else "none"
    spec = SAESpec(
        cfg.activation,
        cfg.k,
        normalize_activations=runtime,
        hook_layer=cfg.layer,
        model_name=model_name,
        max_norm=tokens.max_norm,
    )
    sae = run.finished(spec)

    held_fvu, l0, fired = measure(sae, tokens.test, backend)
    sample = tokens.sample(_MEASURED)
    train_fvu, _, fired_too = measure(sae, sample, backend)
    check(train_fvu, cfg.steps, 1.0 if run.spread > 0 else _LOST)
    counts = fired + fired_too
    metrics = {
        "fvu": held_fvu,
        "l0": l0,
        "dead_fraction": 1 - float((counts > 0).float().mean()),
        "train_fvu": train_fvu,
        "steps": float(cfg.steps),
        "seconds": time.perf_counter() - start,
        **tokens.figures(),
    }
    if init is not None:
        metrics |= before | feature_drift(init, sae)
    sae.cfg = replace(spec, metadata={"saerl_metrics": metrics, "saerl_seed": cfg.seed})
    share = counts / (len(tokens.test) + len(sample))
    sae.usage = {"sparsity": (share + 1e-10).log10(), "silent_steps": cfg.steps - run.last_fired}
    return sae, metrics


def collect_activations(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layer: int,
    max_tokens: int = 200_000,
    *,
    batch_tokens: int = 8192,
    seed: int = 0,
    on_progress: Progress | None = None,
    keep: Partial | None = None,
) -> Tensor:
    """Hidden states [n <= max_tokens, d_in] of randomly chosen rows of ids, in the model's dtype, on the CPU.

    Rows are drawn in a seeded random order until ``max_tokens`` is reached (whole rows, so lengths stay
    representative); surplus tokens are dropped at random. With ``keep`` they are saved now and then and at an
    interrupt, and what was saved is not captured again. Raises SaerlError when no row has a token.
    """
    full = with_tokens(rows)
    generator = torch.Generator().manual_seed(seed)
    chosen, count = [], 0
    for i in torch.randperm(len(full), generator=generator).tolist():
        chosen.append(rows[full[i]])
        count += len(chosen[-1])
        if count >= max_tokens:
            break
    done, parts = keep.shards() if keep else (0, [])
    if parts:
        log.info("activations of %d of %d texts are kept from before", done, len(chosen))
    start, unsaved = done, len(parts)
    for batch, x, _ in iter_hidden_ids(model, chosen, layer, batch_tokens, on_progress, done=done):
        parts.append(x.cpu())
        done += len(batch)
        if keep is not None and keep.due():
            first, end = unsaved, start
            start, unsaved = done, len(parts)
            keep.add_shard(end, done, parts[first:])
    found = torch.cat(parts)
    if len(found) > max_tokens:
        found = found[torch.randperm(len(found), generator=generator)[:max_tokens].sort().values]
    return found


class _Trainer:
    """Weights and optimizer, in coordinates where the data are centred and of unit variance."""

    def __init__(
        self,
        tokens: Tokens,
        cfg: SAEConfig,
        generator: torch.Generator,
        backend: str = "auto",
        init: SAE | None = None,
    ) -> None:
        self.tokens, self.cfg, self.generator, self.backend = tokens, cfg, generator, backend
        d_in, device = tokens.test.shape[1], tokens.test.device
        sample = normalise(tokens.sample(HELD_OUT).float(), cfg.normalize)
        self.center = geometric_median(sample)
        self.spread = float((sample - self.center).pow(2).mean().sqrt())
        self.scale = 1 / self.spread if self.spread > 0 else 1.0
        self.variance = 1.0  # of what the SAE reads
        b_dec = torch.zeros(d_in, device=device)
        if cfg.normalize == "none":
            self.variance, self.scale = 1 / self.scale**2, 1.0
            b_dec, self.center = self.center, b_dec
        self.last_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=device)
        self.dead_index: Tensor | None = None
        self.threshold = torch.zeros((), device=device)  # BatchTopK: running mean of the least one kept
        self.warm = init is not None
        if init is None:
            W_dec = torch.randn(cfg.d_sae, d_in, generator=generator).to(device)
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            W_enc_t, b_enc = W_dec.clone(), torch.zeros(cfg.d_sae, device=device)  # [F, D], tied at the start
        else:
            W_enc_t, b_enc, W_dec, b_dec = self._taken_over(init.to(device))
        self.W_enc_t, self.b_enc, self.W_dec, self.b_dec = weights = [
            weight.requires_grad_() for weight in (W_enc_t, b_enc, W_dec, b_dec)
        ]
        if init is None:
            self._fit_encoder_scale((sample[: cfg.batch_size] - self.center) * self.scale)
        # Adam moves every element alike, and those of a row of unit norm are the larger the narrower it is.
        self.rates = [1.0, 1.0, max(1.0, _ROW_RATE / d_in**0.5), 1.0]
        groups = [{"params": [weight]} for weight in weights]
        self.optimizer = torch.optim.Adam(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=True)

    @torch.no_grad()
    def _taken_over(self, init: SAE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights of another SAE in our coordinates, with decoder rows of unit norm."""
        norms = init.W_dec.norm(dim=1).clamp(min=1e-8)
        b_enc = init.b_enc if init.cfg.apply_b_dec_to_input else init.b_enc + init.b_dec @ init.W_enc
        if init.threshold is not None:
            self.threshold = (init.threshold * norms).mean() * self.scale
        silent = init.usage.get("silent_steps")
        if silent is None and "sparsity" in init.usage:  # SAELens': of features that never fired, -10
            silent = (init.usage["sparsity"] < -9.5) * (self.cfg.dead_after + 1)
        if silent is not None:
            self.last_fired -= silent.to(self.last_fired)
        W_enc_t, W_dec = (init.W_enc * norms).t().contiguous(), init.W_dec / norms[:, None]
        return W_enc_t, b_enc * norms * self.scale, W_dec, (init.b_dec - self.center) * self.scale

    def state(self, step: int) -> dict[str, Tensor]:
        """All that the steps after ``step`` depend on, besides the activations and settings."""
        weights = (self.W_enc_t, self.b_enc, self.W_dec, self.b_dec)
        state = dict(zip(_WEIGHTS, weights, strict=True)) | {"last_fired": self.last_fired}
        state |= {"center": self.center, "threshold": self.threshold, **self.tokens.state()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        if self.dead_index is not None:
            state["dead_index"] = self.dead_index
        scale = torch.tensor([self.scale, self.variance], dtype=torch.float64)
        return state | {"step": torch.tensor(step), "scale": scale, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> int:
        """Take up a state; its step."""
        self.generator.set_state(state["generator"])
        self.scale, self.variance = state["scale"].tolist()
        self.tokens.restore(state)
        for name in ("center", "threshold", "last_fired", "dead_index"):
            setattr(self, name, state[name].to(self.W_dec.device) if name in state else None)
        with torch.no_grad():
            for name in _WEIGHTS:
                getattr(self, name).copy_(state[name])
        adam = self.optimizer.state_dict()
        names = ("step", "exp_avg", "exp_avg_sq")
        adam["state"] = {i: {name: state[f"adam.{i}.{name}"] for name in names} for i in range(len(_WEIGHTS))}
        self.optimizer.load_state_dict(adam)
        log.info("SAE training goes on after step %d", int(state["step"]))
        return int(state["step"])

    def lr(self, step: int) -> float:
        """Linear warm-up over a twentieth of the run, linear decay over its last fifth."""
        steps = self.cfg.steps
        return self.cfg.lr * min(1.0, step / max(1, steps // 20), (steps - step + 1) / max(1, steps // 5))

    def dead(self, step: int) -> Tensor:
        """bool [F]: silent for more than ``cfg.dead_after`` steps."""
        return step - self.last_fired > self.cfg.dead_after

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss, FVU of the batch) as tensors, so that nothing waits for the device."""
        x = self._batch()
        values, indices = self._encode(x)
        recon = sparse_decode(values, indices, self.W_dec, self.b_dec, backend=self.backend)
        error = x - recon
        fvu = error.pow(2).mean() / self.variance
        loss = fvu
        if step % _DEAD_EVERY == 0 and self.cfg.aux_k > 0:
            index = self.dead(step).nonzero().squeeze(1)
            self.dead_index = index if len(index) else None
        if self.dead_index is not None:
            loss = loss + _AUX_WEIGHT * self._auxiliary(x, error.detach(), self.dead_index)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            grad = self.W_dec.grad
            assert grad is not None
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec  # the norm is fixed anyway
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.lr(step)
            self.optimizer.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8)
            active = torch.where(values > 0, step, 0).flatten()
            self.last_fired.scatter_reduce_(0, indices.long().flatten(), active, "amax")
            least = torch.where(values > 0, values, torch.inf).amin()
            rate = max(_THRESHOLD_RATE, 0 if self.warm and self.threshold > 0 else 1 / step)
            self.threshold.lerp_(torch.where(least.isinf(), self.threshold, least), rate)
        return loss.detach(), fvu.detach()

    def finished(self, spec: SAESpec) -> SAE:
        """The SAE in the data's own coordinates: decoder rows of unit norm, activations in its units."""
        batch = self.cfg.activation == "batchtopk"
        with torch.no_grad():
            return SAE(
                self.W_enc_t.detach().t().contiguous(),
                self.b_enc.detach() / self.scale,
                self.W_dec.detach().clone(),
                self.center + self.b_dec.detach() / self.scale,
                threshold=(self.threshold / self.scale).expand(self.cfg.d_sae).clone() if batch else None,
                cfg=spec,
            ).eval()

    def _batch(self) -> Tensor:
        """float32 [B, D], normalised."""
        x = normalise(self.tokens.batch(self.cfg.batch_size).float(), self.cfg.normalize)
        return (x - self.center) * self.scale

    def _encode(self, x: Tensor) -> TopK:
        encode = encode_batch_topk_train if self.cfg.activation == "batchtopk" else encode_topk_train
        return encode(x, self.W_enc_t.t(), self.b_enc, self.cfg.k, b_dec=self.b_dec, backend=self.backend)

    def _auxiliary(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """How badly the best ``aux_k`` dead features explain what the living ones left over."""
        k = min(self.cfg.aux_k, len(dead))
        values, indices = encode_topk_train(
            x,
            self.W_enc_t.t(),
            self.b_enc,
            k,
            b_dec=self.b_dec.detach(),
            features=dead,
            relu=False,  # a feature pushed below zero everywhere could not come back
            backend=self.backend,
        )
        recon = sparse_decode(values, indices, self.W_dec, backend=self.backend)
        return (recon - error).pow(2).sum() / error.pow(2).sum().clamp(min=1e-12) * (k / self.cfg.aux_k)

    @torch.no_grad()
    def _fit_encoder_scale(self, x: Tensor) -> None:
        """Scale the tied encoder so that the first reconstructions have the best length."""
        values, indices = self._encode(x)
        recon = sparse_decode(values, indices, self.W_dec, backend=self.backend)
        square = float(recon.pow(2).sum())
        if square > 0:
            self.W_enc_t *= max(float((recon * x).sum()) / square, 0.01)


@torch.no_grad()
def geometric_median(x: Tensor, rounds: int = 20) -> Tensor:
    """The point [d] with the least summed distance to the rows of x [n, d] (Weiszfeld's iteration)."""
    guess = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - guess).norm(dim=1).clamp(min=1e-6)
        guess = (x * weight[:, None]).sum(0) / weight.sum()
    return guess


def _check_init(init: SAE, tokens: Tokens, cfg: SAEConfig, backend: str) -> dict[str, float]:
    """Its FVU on the held-out tokens; SaerlError where training cannot go on from this SAE."""
    width = tokens.test.shape[1]
    if init.d_in != width:
        raise SaerlError(
            f"sae.init reads activations of width {init.d_in}, the model's have {width}; use its own"
        )
    if init.d_sae != cfg.d_sae:
        raise SaerlError(f"sae.init has {init.d_sae} features; set sae.d_sae={init.d_sae} to go on from it")
    wanted = init.cfg.normalize_activations
    if wanted != (cfg.normalize if cfg.normalize in _RUN_TIME else "none"):
        fix = "variance" if wanted == "none" else wanted
        raise SaerlError(f"sae.init reads activations under normalisation {wanted}; set sae.normalize={fix}")
    fvu = measure(init.to(tokens.test.device), tokens.test, backend)[0]
    if not fvu < 1:
        raise SaerlError(
            f"sae.init explains nothing of these activations (unexplained variance {fvu:.3g}, that of their "
            "mean is 1): it is of another model or layer; leave it out, or name the SAE this model grew from"
        )
    return {"fvu_before": fvu}
