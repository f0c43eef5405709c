"""The adaptive schedule: train on prompts whose groups will most likely carry a gradient, learnt on the way.

A linear regressor from the leading SVD components of the pooled features to pass rate is refreshed
with the pass rates that GRPO observes anyway, by least squares with forgetting: the policy improves,
so old outcomes count less. Its prediction and the prompt's own rollouts make a belief about the prompt
(``saerl_fast.plan.belief``), and the next batch is made of those whose group is worth most. No cluster of
prompts may fill a batch, and a few prompts are drawn uniformly: while the chosen ones are not more often
informative than these, batches are uniform. Among which of a large pool: ``saerl_fast.plan.wide``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import wide
from saerl_fast.plan.base import Plan
from saerl_fast.plan.belief import MANY, Counts, Guard, Prior, Trust, among, best, capped, foremost, gumbel
from saerl_fast.plan.embedding import BLOCK, Embedding
from saerl_fast.records import packed
from saerl_kernels import CSR

NOISY = 8  # times a batch, the prompts of greatest noise that a choice from many looks at first
PENDING = 64  # steps that a batch may wait for its pass rates


class AdaptivePlan(Plan):
    """Batches of the prompts worth most; see the module. Works from the first step without any label.

    With ``forgetting`` l, features z (and a 1 for the bias) and pass rate y, every observed batch does
    G <- l G + (1 - l) ridge I + sum z z',  m <- l m + sum z (y - 1/2),  and the weights solve G w = m:
    recursive least squares in information form, with a ridge that does not fade; mu = clip(z w + 1/2, 0, 1).
    A group of ``group_size`` rollouts adds its passes and failures to the counts of its prompt, which
    are multiplied by ``fading`` a step. The batch holds the prompts with the greatest worth plus Gumbel
    noise, at most ``quota`` * batch / clusters of a cluster; those drawn in the last ``cooldown`` steps wait.
    Known pass rates (column ``pass_rate`` of the table) count as a first observation.

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
        self._original: dict[int, np.ndarray] = {}  # what refreshed rows were at the start
        width = rows.shape[1] + 1
        self._gram: np.ndarray = np.eye(width) * settings.ridge  # [d + 1, d + 1] float64
        self._moment: np.ndarray = np.zeros(width)  # [d + 1] float64
        self._recent: list[tuple[int, np.ndarray]] = []  # step and rows of the batches that wait
        self._pending: dict[int, tuple[int, bool]] = {}  # row -> step, and whether it was drawn uniformly
        self._counts, self._trust, self._guard = Counts(settings.fading), Trust(), Guard()
        self._believe()
        self._figures: dict[str, float] = {}
        # Enough prompts must stay eligible for a batch, and half the pool for there to be a choice.
        room = (n_rows - max(self.batch_size, n_rows // 2)) // self.batch_size
        self.cooldown = max(0, min(settings.cooldown, room))
        if self.cooldown < settings.cooldown:
            change = f"from {settings.cooldown} to {self.cooldown} steps"
            self.note(f"cooldown shortened {change}: the pool has {n_rows} prompts")
        self._groups = self.table.get("cluster") if settings.quota else None
        self._most = self.batch_size
        if self._groups is not None:
            if settings.shuffle_clusters:
                rng = np.random.Generator(np.random.PCG64([self.seed, 0, 1]))
                self._groups = rng.permutation(self._groups)
            share = (settings.quota or 0.0) * self.batch_size / len(np.unique(self._groups))
            self._most = max(1, math.ceil(share))
        rates = self.table.get("pass_rate")
        if rates is not None and settings.use_labels:
            known = np.flatnonzero(np.isfinite(rates))
            for at in range(0, len(known), BLOCK):
                part = known[at : at + BLOCK]
                self._add(self._with_bias(part).astype(np.float64), rates[part].astype(np.float64))
        self._solve()

    def predicted(self) -> np.ndarray:
        """Current estimate of every prompt's pass rate from its features, float32 [n], in [0, 1]."""
        if self._short is None:
            return self._clipped(self._z)
        starts = range(0, len(self.prompt_ids), BLOCK)
        return np.concatenate([self._clipped(self._with_bias(slice(at, at + BLOCK))) for at in starts])

    def next_batch(self) -> list[str]:
        # The noise depends on the seed and the step alone, so there is no generator state to save.
        rng = np.random.Generator(np.random.PCG64([self.seed, self.step]))
        n_rows, size = len(self.prompt_ids), self.batch_size
        waiting = np.unique(np.concatenate([*(rows for _, rows in self._recent), np.empty(0, np.int64)]))
        few = int(self.cfg.adaptive.uniform * size + rng.random())
        if n_rows < size:
            chosen, uniform = np.empty(0, dtype=np.int64), np.resize(rng.permutation(n_rows), size)
            waiting = waiting[:0]
        else:
            chosen = self._choose(size - few if not few or self._guard.holds() else few, waiting, rng)
            taken = np.concatenate([chosen, waiting]) if len(chosen) < size else chosen
            uniform = self._draw(size - len(chosen), taken, rng)
        rows = np.concatenate([chosen, uniform])
        self._pending = {row: at for row, at in self._pending.items() if self.step - at[0] < PENDING}
        for row, was_uniform in zip(rows.tolist(), np.arange(size) >= len(chosen), strict=True):
            self._pending[row] = self.step, bool(was_uniform)
        self._recent.append((self.step, rows))
        self._figures.update(
            predicted=float(self._clipped(self._with_bias(rows)).mean()),
            worth=float(self._worth(rows).mean()),
            kappa=self._prior.kappa,
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
        settings, predicted = self.cfg.adaptive, self._clipped(z)
        self._figures.update(observed=float(rates.mean()), error=float(np.abs(predicted - rates).mean()))
        self._trust.observe(
            predicted, self._counts.of(rows, self.step), rates, self.group_size, settings.fading
        )
        self._believe()
        asked = [self._pending.pop(row, None) for row in rows.tolist()]
        drawn = np.array([at is not None for at in asked])
        self._guard.observe(
            np.array([at[1] for at in asked if at], dtype=bool), rates[drawn], settings.fading
        )
        shares = zip(("informative_chosen", "informative_uniform"), self._guard.shares(), strict=True)
        self._figures.update({name: float(share) for name, share in shares if np.isfinite(share)})
        self._counts.add(rows, self.group_size * rates, self.group_size * (1 - rates), self.step)
        self._gram *= settings.forgetting
        self._gram.flat[:: len(self._gram) + 1] += (1 - settings.forgetting) * settings.ridge
        self._moment *= settings.forgetting
        self._add(z.astype(np.float64), rates)
        self._solve()

    def state_dict(self) -> dict[str, Any]:
        state = self._base_state()
        state["gram"] = torch.from_numpy(self._gram.copy())
        state["moment"] = torch.from_numpy(self._moment.copy())
        seen = [(row, step) for step, rows in self._recent for row in rows.tolist()]
        state["seen"] = torch.tensor(seen, dtype=torch.int64).reshape(-1, 2)
        pending = [(row, *at) for row, at in self._pending.items()]
        state["pending"] = torch.tensor(pending, dtype=torch.int64).reshape(-1, 3)  # row, step, uniform
        state["counts"] = torch.from_numpy(self._counts.table.copy())
        state["evidence"] = torch.from_numpy(self._trust.evidence.copy())
        state["groups"] = torch.from_numpy(self._guard.seen.copy())
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
        for name, dtype, shape in (
            ("gram", np.float64, self._gram.shape),
            ("moment", np.float64, self._moment.shape),
            ("evidence", np.float64, self._trust.evidence.shape),
            ("groups", np.float64, (2, 2)),
            ("seen", np.int64, (-1, 2)),
            ("pending", np.int64, (-1, 3)),
            ("counts", np.float64, (-1, 4)),
        ):
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
        self._gram, self._moment = arrays["gram"], arrays["moment"]
        self._trust.evidence, self._guard.seen = arrays["evidence"], arrays["groups"]
        steps, seen = arrays["seen"][:, 1], arrays["seen"][:, 0]
        self._recent = [(step, seen[steps == step]) for step in np.unique(steps).tolist()]
        if self._short is not None:
            short = np.array(state.get("short", ()), dtype=np.int64).ravel()
            self._short = np.unique(short[(short >= 0) & (short < len(self.prompt_ids))])
        self._pending = {row: (at, bool(uniform)) for row, at, uniform in arrays["pending"].tolist()}
        self._counts.table = arrays["counts"]
        self._believe()
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

    def _choose(self, size: int, waiting: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The ``size`` rows of greatest worth and noise, int64, best first, under the quota of clusters."""
        noise = self.cfg.adaptive.noise
        if self._short is not None:
            known = self._counts.rows()
            worth = self._worth(known)
            room = wide.room(self.batch_size, self.cooldown)
            pool = wide.Candidates(self.embedding.rows, self._short, room, known, worth)
            limits = size, waiting, self._groups, self._most
            chosen, self._short = wide.choose(pool, self._weights, self._prior, noise, *limits, rng)
            return chosen
        n_rows, known = len(self.prompt_ids), self._counts.rows()
        if n_rows <= MANY or not noise:
            drawn = noise * rng.gumbel(size=n_rows)
        else:
            chance, limit = rng.random(n_rows), float(self._prior(np.zeros(1))[0])
            share = NOISY * size / n_rows
            rows, utility, others = foremost(self._usual, limit, noise, share, chance, known, waiting)
            order = np.lexsort((rows, -utility))
            kept = order[capped(rows[order], self._groups, self._most)][:size]
            if len(kept) == size and utility[kept[-1]] > others:
                return rows[kept]
            drawn = gumbel(chance, noise)
        utility = self._usual(slice(None)) + drawn
        utility[waiting] = -np.inf
        return best(utility, self._groups, self._most, size)

    def _usual(self, rows: Any) -> np.ndarray:
        """float64: `_worth` of ascending rows or slice(None); without rollouts, read off `Prior`'s line."""
        found = self._prior(np.abs(self._clipped(self._z[rows]) - np.float32(0.5)))
        known = self._counts.rows()
        at = known
        if isinstance(rows, np.ndarray):
            known = known[among(known, rows)]
            at = np.searchsorted(rows, known)
        found[at] = self._worth(known)
        return found

    def _draw(self, size: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows that are not among ``taken``, int64, drawn uniformly without replacement."""
        out, rows = set(taken.tolist()), dict[int, None]()
        while len(rows) < size:
            row = int(rng.integers(len(self.prompt_ids)))
            if row not in out:
                rows[row] = None
        return np.fromiter(rows, dtype=np.int64, count=size)

    def _believe(self) -> None:
        """Take up kappa, as set or as the rollouts so far say."""
        self._prior = Prior(self.cfg.adaptive.kappa or self._trust.kappa(), self.group_size)

    def _worth(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n]: the chance that a group of these rows carries a gradient."""
        predicted = self._clipped(self._with_bias(rows)).astype(np.float64)
        return self._prior.updated(predicted, *self._counts.of(rows, self.step).T)

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
