"""The adaptive schedule: train on prompts whose groups will most likely carry a gradient, learnt on the way.

What makes the rule (``saerl_fast.plan.rule``) a plan: it is fed with the leading SVD components of the pooled
features and with the pass rates that GRPO observes anyway, and prompts are drawn by it (``plan.choice``; of
a large pool, ``plan.wide``) that are not waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import wide
from saerl_fast.plan.base import Plan
from saerl_fast.plan.choice import Prior, Quota, choose, uniformly
from saerl_fast.plan.embedding import BLOCK, Embedding
from saerl_fast.plan.rule import CHOSEN, OTHER, UNIFORM, Rule
from saerl_fast.records import packed
from saerl_kernels import CSR

PENDING = 64  # steps that a batch may wait for its pass rates


class AdaptivePlan(Plan):
    """Batches of the prompts worth most; see the module. Works from the first step without any label.

    Those drawn in the last ``cooldown`` steps wait; of a cluster a batch has at most ``quota`` * batch /
    clusters. Known pass rates (column ``pass_rate`` of the table) count as a first observation of ``rule``.

    With more than ``LARGE`` prompts a step chooses among candidates (see `wide`), which ``notes`` says. The
    rows of ``embedding`` are then used in place, and written to when features are refreshed.
    """

    schedule = "adaptive"
    learns = True

    def __init__(
        self,
        prompt_ids: Sequence[str],
        cfg: PlanConfig,
        *,
        embedding: Embedding,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        settings = cfg.adaptive
        self.wants_features = settings.refresh_features and settings.features == ["sae"]
        self.group_size = group_size
        if group_size < 2:
            raise SaerlError(f"a plan's group_size must be at least 2 rollouts, got {group_size}")
        n_rows = len(self.prompt_ids)
        if embedding.rows.shape[0] != n_rows:
            raise SaerlError(f"{embedding.rows.shape[0]} feature rows cannot belong to {n_rows} prompts")
        rows = embedding.rows
        self._short: np.ndarray | None = None  # of a large pool: the shortlist
        if n_rows > packed.LARGE:
            rows = np.require(rows, requirements="W")
            self._short = np.empty(0, dtype=np.int64)
            which = f"each step chooses among {wide.MOST} of them, drawn anew, and those last found best"
            self.note(f"{n_rows} prompts are more than {packed.LARGE}: {which}")
        else:
            self._z = np.concatenate([rows, np.ones((n_rows, 1), dtype=np.float32)], axis=1)
            rows = self._z[:, :-1]
        self.embedding = embedding._replace(rows=rows)
        if self.wants_features:  # as `project` reads them, or each step would take a copy
            self.embedding = self.embedding._replace(components=np.asfortranarray(embedding.components))
        self._original: dict[int, np.ndarray] = {}  # what refreshed rows were at the start
        self.rule = Rule(settings, rows.shape[1] + 1, group_size)
        self._recent: list[tuple[int, np.ndarray]] = []  # step and rows of the batches that wait
        self._pending: dict[int, tuple[int, int]] = {}  # row -> step, and CHOSEN or UNIFORM
        self._figures: dict[str, float] = {}
        # Enough prompts must stay eligible for a batch, and half the pool for there to be a choice.
        room = (n_rows - max(self.batch_size, n_rows // 2)) // self.batch_size
        self.cooldown = max(0, min(settings.cooldown, room))
        if self.cooldown < settings.cooldown:
            change = f"from {settings.cooldown} to {self.cooldown} steps"
            self.note(f"cooldown shortened {change}: the pool has {n_rows} prompts")
        self._quota = Quota.of(self.table.get("cluster"), settings, self.batch_size, self.seed)
        rates = self.table.get("pass_rate")
        if rates is not None and settings.use_labels:
            known = np.flatnonzero(np.isfinite(rates))
            for at in range(0, len(known), BLOCK):
                part = known[at : at + BLOCK]
                self.rule.add(self._with_bias(part), rates[part])

    def predicted(self) -> np.ndarray:
        """Current estimate of every prompt's pass rate from its features, float32 [n], in [0, 1]."""
        if self._short is None:
            return self.rule.predicted(self._z)
        starts = range(0, len(self.prompt_ids), BLOCK)
        return np.concatenate([self.rule.predicted(self._with_bias(slice(at, at + BLOCK))) for at in starts])

    def next_batch(self) -> list[str]:
        # The noise depends on the seed and the step alone, so there is no generator state to save.
        rng = np.random.Generator(np.random.PCG64([self.seed, self.step]))
        n_rows, size = len(self.prompt_ids), self.batch_size
        waiting = np.sort(np.concatenate([*(rows for _, rows in self._recent), np.empty(0, np.int64)]))
        few = int(self.cfg.adaptive.uniform * size + rng.random())
        if n_rows < size:
            chosen, uniform = np.empty(0, dtype=np.int64), np.resize(rng.permutation(n_rows), size)
            waiting = waiting[:0]
        else:
            chosen = self._choose(size - few if not few or self.rule.holds() else few, waiting, rng)
            uniform = uniformly(n_rows, size - len(chosen), chosen, waiting, rng)
        rows = np.concatenate([chosen, uniform])
        self._pending = {row: at for row, at in self._pending.items() if self.step - at[0] < PENDING}
        kinds = [CHOSEN] * len(chosen) + [UNIFORM] * len(uniform)
        for row, kind in zip(rows.tolist(), kinds, strict=True):
            self._pending[row] = self.step, kind
        self._recent.append((self.step, rows))
        z = self._with_bias(rows)
        self._figures.update(
            predicted=float(self.rule.predicted(z).mean()),
            worth=float(self.rule.worth(rows, z, self.step).mean()),
            kappa=self.rule.kappa,
            uniform=float(len(uniform)),
            eligible=float(n_rows - len(waiting)),
        )
        self.step += 1
        self._recent = [(step, rows) for step, rows in self._recent if self.step - step <= self.cooldown]
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
        error = float(np.abs(self.rule.predicted(z) - rates).mean())
        how = [self._pending.pop(row, (0, OTHER))[1] for row in rows.tolist()]
        self.rule.observe(rows, z, rates, np.array(how), self.step)
        self._figures.update(observed=float(rates.mean()), error=error)
        for kind, (groups, informative) in zip(("chosen", "uniform"), self.rule.groups.tolist(), strict=True):
            if groups:
                self._figures[f"informative_{kind}"] = informative / groups

    def state_dict(self) -> dict[str, Any]:
        state = self._base_state()
        state |= {name: torch.from_numpy(getattr(self.rule, name).copy()) for name in Rule.STATE}
        seen = [(row, step) for step, rows in self._recent for row in rows.tolist()]
        state["seen"] = torch.tensor(seen, dtype=torch.int64).reshape(-1, 2)
        pending = [(row, *at) for row, at in self._pending.items()]
        state["pending"] = torch.tensor(pending, dtype=torch.int64).reshape(-1, 3)  # row, step, uniform
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
        arrays: dict[str, np.ndarray] = {}
        shapes = {name: getattr(self.rule, name).shape for name in Rule.STATE}
        listed = {"counts": (-1, 4), "seen": (-1, 2), "pending": (-1, 3)}  # by row
        for name, shape in {**shapes, **listed}.items():
            dtype = np.float64 if name in Rule.STATE else np.int64
            arrays[name] = np.array(state.get(name, ()), dtype=dtype)
            if shape[0] == -1:
                shape = (len(arrays[name]), shape[1])
            if name in state and not arrays[name].size:
                arrays[name] = arrays[name].reshape(0, shape[-1])
            if arrays[name].shape != shape:
                raise SaerlError(
                    f"the saved plan state holds {name} of shape {list(arrays[name].shape)} but this plan "
                    f"has {list(shape)}; resume with the plan.json that the run was started with"
                )
            rows = arrays[name][:, 0] if name in listed else arrays[name][:0]
            if not ((rows >= 0) & (rows < len(self.prompt_ids))).all():
                raise SaerlError(
                    f"the saved plan state holds {name} of prompts that this plan lacks; resume with the "
                    "plan.json that the run was started with"
                )
        for name in Rule.STATE:
            setattr(self.rule, name, arrays[name])
        self.rule.solve()
        steps, seen = arrays["seen"][:, 1], arrays["seen"][:, 0]
        self._recent = [(step, seen[steps == step]) for step in np.unique(steps).tolist()]
        if self._short is not None:
            short = np.array(state.get("short", ()), dtype=np.int64).ravel()
            self._short = np.unique(short[(short >= 0) & (short < len(self.prompt_ids))])
        self._pending = {row: (at, kind) for row, at, kind in arrays["pending"].tolist()}
        for row, first in self._original.items():
            self.embedding.rows[row] = first
        self._original = {}
        if "refreshed" in state:
            rows = np.array(state["refreshed"], dtype=np.int64)
            self._original = {row: self.embedding.rows[row].copy() for row in rows.tolist()}
            self.embedding.rows[rows] = np.array(state["refreshed_rows"], dtype=np.float32)
        self.step = int(state["step"])
        self._figures = {k.removeprefix("metric_"): v for k, v in state.items() if k.startswith("metric_")}

    def metrics(self) -> dict[str, float]:
        return dict(self._figures)

    def first_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the embedding as they were before any was refreshed, float32 [stop - start, d]."""
        part = self.embedding.rows[start:stop].copy()
        for row, first in self._original.items():
            if start <= row < stop:
                part[row - start] = first
        return part

    def _choose(self, size: int, waiting: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The ``size`` rows of greatest worth and noise, int64, best first, under the quota of clusters."""
        limits = self.cfg.adaptive.noise, size, waiting, self._quota, rng
        if self._short is None:
            return choose(self._z, self.rule, self.step, *limits)
        known = self.rule.known()
        worth = self.rule.worth(known, self._with_bias(known), self.step)
        room = wide.room(self.batch_size, self.cooldown)
        pool = wide.Candidates(self.embedding.rows, self._short, room, known, worth)
        prior = Prior.of(self.rule.kappa, self.group_size)
        chosen, self._short = wide.choose(pool, self.rule.weights, prior, *limits)
        return chosen

    def _with_bias(self, rows: Any) -> np.ndarray:
        """z of `Rule`, float32 [n, d + 1]."""
        part = self.embedding.rows[rows]
        return np.concatenate([part, np.ones((len(part), 1), dtype=np.float32)], axis=1)
