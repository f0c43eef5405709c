"""The adaptive schedule: learn pass rates from SAE features during the run, and train where they fit.

A linear regressor from the leading SVD components of the pooled features to pass rate is refreshed
with the pass rates that GRPO observes anyway, by least squares with forgetting: the policy improves,
so old outcomes count less. The next batch is made of the prompts whose predicted pass rate is
nearest a target, which eases from ``target_start`` to ``target_end`` over the run. Among which of a large
pool: ``saerl_fast.plan.wide``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saerl_fast.config import AdaptiveConfig, PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import wide
from saerl_fast.plan.base import Plan
from saerl_fast.records import packed
from saerl_fast.signals.features import SAMPLE, Features, block, blocks, checked, svd_reduce, weighted
from saerl_kernels import CSR, csr

BLOCK = 1 << 14  # rows worked on at a time where all are


class Embedding(NamedTuple):
    """Dense prompt features and what is needed to embed more rows in the same way.

    rows float32 [n, d]: ``(weighted features @ components.T - mean) * scale``, centred, with mean
    squared norm 1, so that ``ridge`` means the same for every SAE; idf float32 [n_cols];
    components float32 [d, n_cols]; mean float32 [d]; scale float.
    """

    rows: np.ndarray
    idf: np.ndarray
    components: np.ndarray
    mean: np.ndarray
    scale: float

    def project(self, X: CSR) -> np.ndarray:
        """float32 [n_rows, d] for pooled features of the same SAE."""
        rows = weighted(checked(X), torch.from_numpy(self.idf)).to_scipy()
        dense = np.asarray(rows @ self.components.T, dtype=np.float32)
        return (dense - self.mean) * np.float32(self.scale)


def embed(X: Features, rows: np.ndarray, cfg: AdaptiveConfig, *, seed: int) -> Embedding:
    """The embedding of the given rows of ``X``, in ascending order, fitted to them.

    With more than ``SAMPLE`` rows, frequencies and components are those of a sample of as many.
    """
    X, fitted = checked(X), rows
    if len(rows) > SAMPLE:
        fitted = np.sort(np.random.default_rng(seed).choice(rows, SAMPLE, replace=False))
    near = X.select_rows(torch.from_numpy(fitted))
    idf = csr.idf(near, floor=1.0)
    dense, components = svd_reduce(weighted(near, idf), cfg.svd, seed)
    if len(rows) > SAMPLE:
        del near
        dense = np.empty((len(rows), len(components)), dtype=np.float32)
        for at in blocks(len(rows)):
            first, last = int(rows[at][0]), int(rows[at][-1]) + 1
            part = block(X, slice(first, last)).select_rows(torch.from_numpy(rows[at] - first))
            dense[at] = weighted(part, idf).to_scipy() @ components.T
    mean = dense.mean(axis=0)
    dense -= mean
    parts = (dense[at : at + BLOCK] for at in range(0, len(dense), BLOCK))
    power = float(np.concatenate([np.square(part, dtype=np.float64).sum(axis=1) for part in parts]).mean())
    scale = power**-0.5 if power > 1e-12 else 1.0
    dense *= np.float32(scale)
    return Embedding(dense, idf.numpy(), components, mean, scale)


class AdaptivePlan(Plan):
    """Batches by predicted pass rate; see the module. Works from the first step without any label.

    With ``forgetting`` l, features z (and a 1 for the bias) and pass rate y, every observed batch does
    G <- l G + (1 - l) ridge I + sum z z',  m <- l m + sum z (y - 1/2),  and the weights solve G w = m:
    recursive least squares in information form, with a ridge that does not fade. Prompts drawn less
    than ``cooldown`` steps ago wait; Gumbel noise on the distance to the target keeps exploring.
    Known pass rates (column ``pass_rate`` of the table) count as a first observation.

    With more than ``LARGE`` prompts a step chooses among candidates (see `wide`), which ``notes`` says. The
    rows of ``embedding`` are then used in place, and written to when features are refreshed.
    """

    schedule = "adaptive"

    def __init__(
        self, prompt_ids: Sequence[str], cfg: PlanConfig, *, embedding: Embedding, **kwargs: Any
    ) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        settings = cfg.adaptive
        self.wants_features = settings.refresh_features
        n_rows = len(self.prompt_ids)
        if embedding.rows.shape[0] != n_rows:
            raise SaerlError(f"{embedding.rows.shape[0]} feature rows cannot belong to {n_rows} prompts")
        rows = embedding.rows
        self._short: np.ndarray | None = None  # of a large pool: the shortlist
        if n_rows > packed.LARGE:
            rows = np.require(rows, requirements="W")
            self._short = np.empty(0, dtype=np.int64)
            which = f"each step chooses among {wide.MOST} of them, drawn anew, and those last found nearest"
            self.note(f"{n_rows} prompts are more than {packed.LARGE}: {which}")
        else:
            self._z = np.concatenate([rows, np.ones((n_rows, 1), dtype=np.float32)], axis=1)
            rows = self._z[:, :-1]
        self.embedding = embedding._replace(rows=rows)
        self._original: dict[int, np.ndarray] = {}  # what refreshed rows were at the start
        width = rows.shape[1] + 1
        self._gram: np.ndarray = np.eye(width) * settings.ridge  # [d + 1, d + 1] float64
        self._moment: np.ndarray = np.zeros(width)  # [d + 1] float64
        self._seen: dict[int, int] = {}  # row -> step of the last draw, while the cooldown lasts
        self._figures: dict[str, float] = {}
        # Enough prompts must stay eligible for a batch, and half the pool for there to be a choice.
        room = (n_rows - max(self.batch_size, n_rows // 2)) // self.batch_size
        self.cooldown = max(0, min(settings.cooldown, room))
        if self.cooldown < settings.cooldown:
            change = f"from {settings.cooldown} to {self.cooldown} steps"
            self.note(f"cooldown shortened {change}: the pool has {n_rows} prompts")
        rates = self.table.get("pass_rate")
        if rates is not None and settings.use_labels:
            known = np.flatnonzero(np.isfinite(rates))
            for at in range(0, len(known), BLOCK):
                part = known[at : at + BLOCK]
                self._add(self._with_bias(part).astype(np.float64), rates[part].astype(np.float64))
        self._solve()

    def predicted(self) -> np.ndarray:
        """Current estimate of every prompt's pass rate, float32 [n], in [0, 1]."""
        if self._short is None:
            return self._clipped(self._z)
        starts = range(0, len(self.prompt_ids), BLOCK)
        return np.concatenate([self._clipped(self._with_bias(slice(at, at + BLOCK))) for at in starts])

    def target(self) -> float:
        """The pass rate aimed at in the coming step."""
        settings = self.cfg.adaptive
        done = min(1.0, self.step / max(1, self.total_steps - 1))
        return settings.target_start + (settings.target_end - settings.target_start) * done

    def next_batch(self) -> list[str]:
        # The noise depends on the seed and the step alone, so there is no generator state to save.
        rng = np.random.Generator(np.random.PCG64([self.seed, self.step]))
        n_rows = len(self.prompt_ids)
        target, noise = self.target(), self.cfg.adaptive.noise
        waiting = np.array(sorted(self._seen), dtype=np.int64)
        if n_rows < self.batch_size:
            rows = np.resize(rng.permutation(n_rows), self.batch_size)
            waiting, predicted = waiting[:0], self.predicted()[rows]
        elif self._short is not None:
            sizes = self.batch_size, waiting, self._short, wide.room(self.batch_size, self.cooldown)
            rows, self._short = wide.choose(self.embedding.rows, self._weights, target, noise, *sizes, rng)
            predicted = self._clipped(self._with_bias(rows))
        else:
            predicted = self.predicted()
            utility = noise * rng.gumbel(size=n_rows) - np.abs(predicted - target)
            utility[waiting] = -np.inf
            rows = np.argpartition(-utility, self.batch_size - 1)[: self.batch_size]
            rows = rows[np.lexsort((rows, -utility[rows]))]
            predicted = predicted[rows]
        self._seen.update(dict.fromkeys(rows.tolist(), self.step))
        self.step += 1
        self._seen = {row: step for row, step in self._seen.items() if self.step - step <= self.cooldown}
        self._figures.update(
            target=target, predicted=float(predicted.mean()), eligible=float(n_rows - len(waiting))
        )
        means = self._mean_of(rows)
        for name in {"difficulty", "quality"} - means.keys():  # unknown for this batch
            self._figures.pop(name, None)
        self._figures.update(means)
        return [self.prompt_ids[i] for i in rows.tolist()]

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: CSR | None = None) -> None:
        rows, rates = self._check(prompt_ids, pass_rates)
        if not len(rows):
            return
        if features is not None and self.wants_features:
            fresh = self.embedding.project(features)
            if len(fresh) != len(rows):
                raise SaerlError(f"observe got {len(fresh)} feature rows for {len(rows)} prompt ids")
            for row in set(rows.tolist()) - self._original.keys():
                self._original[row] = self.embedding.rows[row].copy()
            self.embedding.rows[rows] = fresh
        z = self._with_bias(rows)
        error = np.abs(self._clipped(z) - rates).mean()
        self._figures.update(observed=float(rates.mean()), error=float(error))
        settings = self.cfg.adaptive
        self._gram *= settings.forgetting
        self._gram.flat[:: len(self._gram) + 1] += (1 - settings.forgetting) * settings.ridge
        self._moment *= settings.forgetting
        self._add(z.astype(np.float64), rates)
        self._solve()

    def state_dict(self) -> dict[str, Any]:
        state = self._base_state()
        state["gram"] = torch.from_numpy(self._gram.copy())
        state["moment"] = torch.from_numpy(self._moment.copy())
        state["seen"] = torch.tensor(list(self._seen.items()), dtype=torch.int64).reshape(-1, 2)  # row, step
        if self._short is not None:
            state["short"] = torch.from_numpy(self._short)
        if self._original:
            rows = np.array(sorted(self._original), dtype=np.int64)
            state["refreshed"] = torch.from_numpy(rows)
            state["refreshed_rows"] = torch.from_numpy(self.embedding.rows[rows])
        state.update({f"metric_{name}": value for name, value in self._figures.items()})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        if "last_seen" in state:  # of every row, as releases before 0.3 wrote it
            last = np.array(state["last_seen"], dtype=np.int64)
            late = np.flatnonzero(int(state["step"]) - last <= self.cooldown)
            state = {**state, "seen": np.stack([late, last[late]], axis=1)}
        arrays: dict[str, np.ndarray] = {}
        for name, dtype, shape in (
            ("gram", np.float64, self._gram.shape),
            ("moment", np.float64, self._moment.shape),
            ("seen", np.int64, (len(state.get("seen", ())), 2)),
        ):
            arrays[name] = np.array(state.get(name, ()), dtype=dtype)
            if arrays[name].shape != shape:
                raise SaerlError(
                    f"the saved plan state holds {name} of shape {list(arrays[name].shape)} but this plan "
                    f"has {list(shape)}; resume with the plan.json that the run was started with"
                )
        self._gram, self._moment = arrays["gram"], arrays["moment"]
        self._seen = dict(arrays["seen"].tolist())
        if self._short is not None:
            short = np.array(state.get("short", ()), dtype=np.int64).ravel()
            self._short = np.unique(short[(short >= 0) & (short < len(self.prompt_ids))])
        for row, first in self._original.items():
            self.embedding.rows[row] = first
        self._original = {}
        if "refreshed" in state:
            rows = np.array(state["refreshed"], dtype=np.int64)
            self._original = {row: self.embedding.rows[row].copy() for row in rows.tolist()}
            self.embedding.rows[rows] = np.array(state["refreshed_rows"], dtype=np.float32)
        self.step = int(state["step"])
        self._figures = {k.removeprefix("metric_"): v for k, v in state.items() if k.startswith("metric_")}
        self._solve()

    def metrics(self) -> dict[str, float]:
        return dict(self._figures)

    def first_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the embedding as they were before any was refreshed, float32 [stop - start, d]."""
        part = self.embedding.rows[start:stop]
        changed = [row for row in self._original if start <= row < stop]
        if changed:
            part = part.copy()
            part[np.array(changed) - start] = [self._original[row] for row in changed]
        return part

    def _with_bias(self, rows: Any) -> np.ndarray:
        part = self.embedding.rows[rows]
        return np.concatenate([part, np.ones((len(part), 1), dtype=np.float32)], axis=1)

    def _clipped(self, z: np.ndarray) -> np.ndarray:
        return np.clip(z @ self._weights + np.float32(0.5), 0.0, 1.0)

    def _add(self, z: np.ndarray, rates: np.ndarray) -> None:
        self._gram += z.T @ z
        self._moment += z.T @ (rates - 0.5)

    def _solve(self) -> None:
        self._weights = np.linalg.solve(self._gram, self._moment).astype(np.float32)
