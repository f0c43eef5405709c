"""Training a TopK or BatchTopK sparse autoencoder on hidden states: small, seeded, good enough to score with.

TopK and the auxiliary loss for dead features follow Gao et al. 2024 (arXiv 2406.04093), BatchTopK Bussmann
et al. 2024 (arXiv 2412.06410) with SAELens' running threshold for inference; decoder rows are kept at unit
norm and their gradients orthogonal to them (Bricken et al. 2023). Our own choices: the input is centred on
its geometric median and scaled to unit variance per dimension while training (folded back at the end), and
attention-sink tokens, whose norm is a hundred times the others' (Sun et al. 2024, arXiv 2402.17762), are
left out of training and of pooling.
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
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.partial import Partial
from saerl_kernels import TopK, encode_batch_topk_train, encode_topk_train, sparse_decode

log = logging.getLogger(__name__)
OnStep = Callable[[int, dict[str, float]], None]

_LOG_EVERY = 25  # steps between callbacks; each one waits for the device
_DEAD_EVERY = 10  # steps between recounts of the dead features
_AUX_WEIGHT = 1 / 32  # of the auxiliary loss, as in Gao et al.
_THRESHOLD_RATE = 0.03  # of BatchTopK's running threshold; SAELens' 0.01 is meant for longer runs
_HELD_OUT = 8192  # at most this many tokens, and at most a tenth
_LOST = 1e4  # times the variance: an error that no SAE comes back from
_WEIGHTS = ("W_enc_t", "b_enc", "W_dec", "b_dec")
_MEASURED = 32768  # training tokens on which dead features are also looked for


def train_sae(
    activations: Tensor | Iterable[Tensor],
    cfg: SAEConfig,
    on_step: OnStep | None = None,
    *,
    model_name: str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    keep: Partial | None = None,
) -> tuple[SAE, dict[str, float]]:
    """(the SAE in eval mode, its metrics) from activations [n, d_in], or an iterable of such batches.

    Every 25 steps and at the last one ``on_step(step, {"steps", "loss", "fvu", "dead", "lr"})`` is called.
    Metrics: "fvu" (fraction of variance unexplained) and "l0" (features per token) on held-out tokens,
    "dead_fraction" (features silent on those and on up to 32,768 training tokens), "train_fvu", "steps",
    "seconds", "tokens", "held_out_tokens", "sink_tokens". ``cfg.layer`` is written into the SAE. Runs on
    ``device`` (the activations' own by default); on a CPU the same seed and activations give the same SAE.
    With ``keep`` its state is saved now and then and at an interrupt, and training goes on from there, bit
    for bit on a CPU. Raises SaerlError for empty or non-finite activations and settings that do not fit.
    """
    x = _gather(activations, cfg.max_tokens)
    x = x if device is None else x.to(device)
    _check(x)
    start = time.perf_counter()
    found = len(x)
    x, max_norm = _drop_sinks(x, cfg.sink_ratio)
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(x), generator=generator)
    held = min(_HELD_OUT, len(x) // 10)
    train = order[held:].to(x.device)
    test = x[order[:held].to(x.device)] if held else x  # a handful of tokens: nothing to spare

    run = _Trainer(x, train, cfg, generator, backend)
    try:
        done = run.restore(keep) if keep else 0
    except (KeyError, RuntimeError, ValueError) as err:  # of code that has changed since
        assert keep is not None
        raise SaerlError(f"{keep.folder} does not fit this training ({err}); remove it") from err
    for step in range(1 + done, cfg.steps + 1):
        loss, fvu = run.step(step)
        if on_step is not None and (step % _LOG_EVERY == 0 or step == cfg.steps):
            shown = {"loss": loss, "fvu": fvu, "dead": run.dead(step).float().mean()}
            figures = {name: float(value) for name, value in shown.items()}
            _check_course(figures["loss"], step)
            on_step(step, {"steps": float(cfg.steps), **figures, "lr": run.lr(step)})
        if keep is not None and keep.due():
            keep.save("state", step, run.state(step))
            keep.keep_only("state", step)
    spec = SAESpec(cfg.activation, cfg.k, hook_layer=cfg.layer, model_name=model_name, max_norm=max_norm)
    sae = run.finished(spec)

    held_fvu, l0, fired = _measure(sae, test, backend)
    train_fvu, _, fired_too = _measure(sae, x[train[:_MEASURED]], backend)
    _check_course(held_fvu + train_fvu, cfg.steps)
    metrics = {
        "fvu": held_fvu,
        "l0": l0,
        "dead_fraction": 1 - float((fired | fired_too).float().mean()),
        "train_fvu": train_fvu,
        "steps": float(cfg.steps),
        "seconds": time.perf_counter() - start,
        "tokens": float(len(train)),
        "held_out_tokens": float(held),
        "sink_tokens": float(found - len(x)),
    }
    sae.cfg = replace(spec, metadata={"saerl_metrics": metrics, "saerl_seed": cfg.seed})
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
    rows = [row for row in rows if row]
    if not rows:
        raise SaerlError("no activations to collect: there is no text with a token; check data.train")
    generator = torch.Generator().manual_seed(seed)
    chosen, count = [], 0
    for i in torch.randperm(len(rows), generator=generator).tolist():
        chosen.append(rows[i])
        count += len(rows[i])
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
        self, x: Tensor, train: Tensor, cfg: SAEConfig, generator: torch.Generator, backend: str
    ) -> None:
        self.x, self.train, self.cfg, self.generator, self.backend = x, train, cfg, generator, backend
        d_in, device = x.shape[1], x.device
        sample = x[train[:_HELD_OUT]].float()
        self.center = geometric_median(sample)
        spread = float((sample - self.center).pow(2).mean().sqrt())
        self.scale = 1 / spread if spread > 0 else 1.0
        W_dec = torch.randn(cfg.d_sae, d_in, generator=generator).to(device)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.W_enc_t = W_dec.clone().requires_grad_()  # [F, D], tied at the start
        self.b_enc = torch.zeros(cfg.d_sae, device=device, requires_grad=True)
        self.W_dec = W_dec.requires_grad_()
        self.b_dec = torch.zeros(d_in, device=device, requires_grad=True)
        self._fit_encoder_scale((sample[: cfg.batch_size] - self.center) * self.scale)
        weights = [self.W_enc_t, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = torch.optim.Adam(weights, lr=cfg.lr, betas=(0.9, 0.999), fused=True)
        self.last_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=device)
        self.dead_index: Tensor | None = None
        self.threshold = torch.zeros(
            (), device=device
        )  # BatchTopK: running mean of the least activation kept
        self.queue = torch.empty(0, dtype=torch.long, device=device)

    def state(self, step: int) -> dict[str, Tensor]:
        """All that the steps after ``step`` depend on, besides the activations and settings."""
        weights = (self.W_enc_t, self.b_enc, self.W_dec, self.b_dec)
        state = dict(zip(_WEIGHTS, weights, strict=True)) | {"last_fired": self.last_fired}
        state |= {"center": self.center, "threshold": self.threshold, "queue": self.queue}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        if self.dead_index is not None:
            state["dead_index"] = self.dead_index
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return state | {"step": torch.tensor(step), "scale": scale, "generator": self.generator.get_state()}

    def restore(self, keep: Partial) -> int:
        """Take up the latest state that was kept; its step, or 0."""
        found = keep.saved("state")
        if not found:
            return 0
        state = found[-1]
        self.generator.set_state(state["generator"])
        self.scale = float(state["scale"])
        for name in ("center", "threshold", "last_fired", "queue", "dead_index"):
            setattr(self, name, state[name].to(self.x.device) if name in state else None)
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
        fvu = error.pow(2).mean()  # the variance is 1 by construction
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
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step)
            self.optimizer.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8)
            active = torch.where(values > 0, step, 0).flatten()
            self.last_fired.scatter_reduce_(0, indices.long().flatten(), active, "amax")
            least = torch.where(values > 0, values, torch.inf).amin()
            rate = max(_THRESHOLD_RATE, 1 / step)
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
        """float32 [B, D], normalised; every training token once before any comes again."""
        size = min(self.cfg.batch_size, len(self.train))
        if len(self.queue) < size:
            order = torch.randperm(len(self.train), generator=self.generator)
            self.queue = self.train[order.to(self.train.device)]
        rows, self.queue = self.queue[:size], self.queue[size:]
        return (self.x[rows].float() - self.center) * self.scale

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


def _gather(activations: Tensor | Iterable[Tensor], max_tokens: int) -> Tensor:
    if not isinstance(activations, Tensor):
        parts, count = [], 0
        for part in activations:
            parts.append(part)
            count += len(part)
            if count >= max_tokens:
                break
        activations = torch.cat(parts)[:max_tokens] if parts else torch.empty(0, 0)
    if activations.dim() != 2 or activations.numel() == 0:
        shape = tuple(activations.shape)
        raise SaerlError(
            f"there are no activations to train an SAE on (shape {shape}); collect some from texts"
        )
    return activations.detach()


def _check(x: Tensor) -> None:
    bad = sum(int((~torch.isfinite(part)).any(1).sum()) for part in x.split(1 << 16))
    if bad:
        raise SaerlError(f"{bad} of {len(x)} activations are not finite; check the model and its dtype")


def _check_course(error: float, step: int) -> None:
    """SaerlError when the error says that training has diverged: 1 is that of a constant."""
    if not error < _LOST:
        raise SaerlError(f"SAE training diverged (error {error:.3g} at step {step}); lower sae.lr")


def _drop_sinks(x: Tensor, ratio: float) -> tuple[Tensor, float | None]:
    """Rows of ordinary norm, and the limit: ``ratio`` times the median norm."""
    if ratio <= 0:
        return x, None
    norms = torch.cat([part.float().norm(dim=1) for part in x.split(1 << 16)])
    limit = ratio * float(norms.median())
    if limit <= 0:
        return x, None
    keep = norms <= limit
    return (x if bool(keep.all()) else x[keep]), limit


@torch.no_grad()
def _measure(sae: SAE, x: Tensor, backend: str) -> tuple[float, float, Tensor]:
    """(fraction of variance unexplained, features per token, bool [d_sae] which features fired)."""
    mean = x.float().mean(0)
    error = total = active = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    for part in x.split(4096):
        codes = sae.encode(part, backend=backend)
        part = part.float()
        error += float((part - sae.decode(codes)).pow(2).sum())
        total += float((part - mean).pow(2).sum())
        active += float((codes.values > 0).sum())
        fired[codes.indices[codes.values > 0].long()] = True
    return error / max(total, 1e-12), active / len(x), fired
