"""The adaptive schedule: learn pass rates from SAE features during the run, and train where they fit.

A linear regressor from the leading SVD components of the pooled features to pass rate is refreshed
with the pass rates that GRPO observes anyway, by least squares with forgetting: the policy improves,
so old outcomes count less. The next batch is made of the prompts whose predicted pass rate is
nearest a target, which eases from ``target_start`` to ``target_end`` over the run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from saerl_fast.config import AdaptiveConfig, PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan.base import Plan
from saerl_fast.signals.features import checked, svd_reduce, weighted
from saerl_kernels import CSR, csr

NEVER = -(10**9)  # a step before any cooldown


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


def embed(X: CSR, rows: np.ndarray, cfg: AdaptiveConfig, *, seed: int) -> Embedding:
    """The embedding of the given rows of ``X``, fitted to them."""
    X = checked(X).select_rows(torch.from_numpy(rows))
    idf = csr.idf(X, floor=1.0)
    dense, components = svd_reduce(weighted(X, idf), cfg.svd, seed)
    mean = dense.mean(axis=0)
    centred = dense - mean
    power = float(np.square(centred, dtype=np.float64).sum(axis=1).mean())
    scale = power**-0.5 if power > 1e-12 else 1.0
    return Embedding(centred * np.float32(scale), idf.numpy(), components, mean, scale)


class AdaptivePlan(Plan):
    """Batches by predicted pass rate; see the module. Works from the first step without any label.

    With ``forgetting`` l, features z (and a 1 for the bias) and pass rate y, every observed batch does
    G <- l G + (1 - l) ridge I + sum z z',  m <- l m + sum z (y - 1/2),  and the weights solve G w = m:
    recursive least squares in information form, with a ridge that does not fade. Prompts drawn less
    than ``cooldown`` steps ago wait; Gumbel noise on the distance to the target keeps exploring.
    Known pass rates (column ``pass_rate`` of the table) count as a first observation.
    """

    schedule = "adaptive"

    def __init__(
        self, prompt_ids: list[str], cfg: PlanConfig, *, embedding: Embedding, **kwargs: Any
    ) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        settings = cfg.adaptive
        self.wants_features = settings.refresh_features
        n_rows = len(self.prompt_ids)
        if embedding.rows.shape[0] != n_rows:
            raise SaerlError(f"{embedding.rows.shape[0]} feature rows cannot belong to {n_rows} prompts")
        self.embedding = embedding
        self._z = np.concatenate([embedding.rows, np.ones((n_rows, 1), dtype=np.float32)], axis=1)
        width = self._z.shape[1]
        self._gram: np.ndarray = np.eye(width) * settings.ridge  # [d + 1, d + 1] float64
        self._moment: np.ndarray = np.zeros(width)  # [d + 1] float64
        self._last_seen: np.ndarray = np.full(n_rows, NEVER, dtype=np.int64)  # step of the last draw
        self._refreshed = np.zeros(n_rows, dtype=bool)
        self._figures: dict[str, float] = {}
        # Enough prompts must stay eligible for a batch, and half the pool for there to be a choice.
        room = (n_rows - max(self.batch_size, n_rows // 2)) // self.batch_size
        self.cooldown = max(0, min(settings.cooldown, room))
        if self.cooldown < settings.cooldown:
            change = f"from {settings.cooldown} to {self.cooldown} steps"
            self.note(f"cooldown shortened {change}: the pool has {n_rows} prompts")
        rates = self.table.get("pass_rate")
        if rates is not None and settings.use_labels:
            known = np.isfinite(rates)
            self._add(self._z[known].astype(np.float64), rates[known].astype(np.float64))
        self._solve()

    def predicted(self) -> np.ndarray:
        """Current estimate of every prompt's pass rate, float32 [n], in [0, 1]."""
        return np.clip(self._z @ self._weights + np.float32(0.5), 0.0, 1.0)

    def target(self) -> float:
        """The pass rate aimed at in the coming step."""
        settings = self.cfg.adaptive
        done = min(1.0, self.step / max(1, self.total_steps - 1))
        return settings.target_start + (settings.target_end - settings.target_start) * done

    def next_batch(self) -> list[str]:
        # The noise depends on the seed and the step alone, so there is no generator state to save.
        rng = np.random.Generator(np.random.PCG64([self.seed, self.step]))
        n_rows = len(self.prompt_ids)
        target, predicted = self.target(), self.predicted()
        if n_rows < self.batch_size:
            rows = np.resize(rng.permutation(n_rows), self.batch_size)
            eligible = n_rows
        else:
            utility = self.cfg.adaptive.noise * rng.gumbel(size=n_rows) - np.abs(predicted - target)
            waiting = self.step - self._last_seen <= self.cooldown
            utility[waiting] = -np.inf
            eligible = n_rows - int(waiting.sum())
            rows = np.argpartition(-utility, self.batch_size - 1)[: self.batch_size]
            rows = rows[np.lexsort((rows, -utility[rows]))]
        self._last_seen[rows] = self.step
        self.step += 1
        self._figures.update(target=target, predicted=float(predicted[rows].mean()), eligible=float(eligible))
        means = self._mean_of(rows)
        for name in {"difficulty", "quality"} - means.keys():  # unknown for this batch
            self._figures.pop(name, None)
        self._figures.update(means)
        return [self.prompt_ids[i] for i in rows]

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: CSR | None = None) -> None:
        rows, rates = self._check(prompt_ids, pass_rates)
        if not len(rows):
            return
        if features is not None and self.wants_features:
            fresh = self.embedding.project(features)
            if len(fresh) != len(rows):
                raise SaerlError(f"observe got {len(fresh)} feature rows for {len(rows)} prompt ids")
            self._z[rows, :-1] = fresh
            self._refreshed[rows] = True
        z = self._z[rows]
        error = np.abs(np.clip(z @ self._weights + np.float32(0.5), 0, 1) - rates).mean()
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
        state["last_seen"] = torch.from_numpy(self._last_seen.copy())
        if self._refreshed.any():
            state["refreshed"] = torch.from_numpy(np.flatnonzero(self._refreshed))
            state["refreshed_rows"] = torch.from_numpy(self._z[self._refreshed, :-1].copy())
        state.update({f"metric_{name}": value for name, value in self._figures.items()})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        arrays: dict[str, np.ndarray] = {}
        for name, shape, dtype in (
            ("gram", self._gram.shape, np.float64),
            ("moment", self._moment.shape, np.float64),
            ("last_seen", self._last_seen.shape, np.int64),
        ):
            arrays[name] = np.array(state.get(name), dtype=dtype)
            if arrays[name].shape != shape:
                raise SaerlError(
                    f"the saved plan state holds {name} of shape {list(arrays[name].shape)} but this plan "
                    f"has {list(shape)}; resume with the plan.json that the run was started with"
                )
        self._gram, self._moment, self._last_seen = arrays["gram"], arrays["moment"], arrays["last_seen"]
        self._z[:, :-1] = self.embedding.rows
        self._refreshed[:] = False
        if "refreshed" in state:
            rows = np.array(state["refreshed"], dtype=np.int64)
            self._z[rows, :-1] = np.array(state["refreshed_rows"], dtype=np.float32)
            self._refreshed[rows] = True
        self.step = int(state["step"])
        self._figures = {k.removeprefix("metric_"): v for k, v in state.items() if k.startswith("metric_")}
        self._solve()

    def metrics(self) -> dict[str, float]:
        return dict(self._figures)

    def _add(self, z: np.ndarray, rates: np.ndarray) -> None:
        self._gram += z.T @ z
        self._moment += z.T @ (rates - 0.5)

    def _solve(self) -> None:
        self._weights = np.linalg.solve(self._gram, self._moment).astype(np.float32)
