"""Orders to compare with, which read no features: published ones that learn from the rollouts of each prompt
alone, and an oracle.

``mopps``: Qu et al., Can prompt difficulty be online predicted for accelerating RL finetuning of reasoning
models? (arXiv 2507.04632; thu-rllab/MoPPS). A prompt has Beta(a, b), at first Beta(1, 1). Of candidates,
drawn in passes over the pool, the batch takes those whose draw from Beta(a, b) is nearest to 1/2. For prompts
of the batch, with s of G rollouts passed, then a <- d a + (1 - d) + s and b <- d b + (1 - d) + G - s.

``bots``: BOTS (arXiv 2510.26374; modelscope/Trinity-RFT). The same with the whole pool as candidates, and all
prompts, not those of the batch alone, fade: a <- (1 - l) a + l + (1 - r) s + r p G, likewise b. Its implicit
evidence p comes from the pass rates of two reference models; without any, r = 0, its explicit evidence alone.

``greso``: Zheng et al., Act only when it pays (arXiv 2506.02177; Infini-AI-Lab/GRESO). Passes over the pool
in random order, where a prompt whose last z groups all carried no gradient is skipped with probability 1 -
p^z. There is a p for prompts that all passed (easy) and one for those that all failed (hard). After a batch a
p falls by 1 % if more than a share of its groups, 1/12 easy and 1/6 hard, were such, and else rises by it. It
is meant for ``train.dynamic_sampling``, which fills batches up.

``oracle``: no order to train with but a bound for them. Before each step it is told every prompt's pass rate
p, the probability of the reference answer by a forward pass over the whole pool, and takes the prompts whose
group of G rollouts most likely carries a gradient, 1 - p^G - (1 - p)^G, with the noise and the cooldown of
``plan.adaptive``. Where an answer can be said in several ways p is less than the pass rate.

The constants are those of the papers or of their code where they name them. ``FADES`` and ``CANDIDATES`` of
MoPPS are set in scripts that were not seen: they are this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan.base import Plan

TARGET = 0.5  # pass rate
EASY, HARD = 0, 1


class Rival(Plan):
    """What these orders share: passes over the pool, and a state of arrays with an entry a prompt."""

    arrays: ClassVar[tuple[str, ...]] = ()
    learns = True

    def __init__(
        self, prompt_ids: Sequence[str], cfg: PlanConfig, *, group_size: int = 8, **kwargs: Any
    ) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        self.group_size = group_size
        self._taken = 0  # rows of the passes so far

    def state_dict(self) -> dict[str, Any]:
        state = self._base_state() | {"taken": self._taken}
        return state | {name: torch.from_numpy(getattr(self, name).copy()) for name in self.arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        found = {name: np.array(state.get(name, ()), dtype=np.float64) for name in self.arrays}
        for name, values in found.items():
            if values.shape != getattr(self, name).shape or not np.isfinite(values).all():
                raise SaerlError(f"the saved plan state lacks {name}; resume with the plan.json of the run")
        for name, values in found.items():
            setattr(self, name, values)
        self._taken, self.step = int(state["taken"]), int(state["step"])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *key]))

    def _at(self, place: int) -> int:
        """The row at a place of the passes, each a permutation of the pool."""
        number, at = divmod(place, len(self.prompt_ids))
        if getattr(self, "_order", (-1,))[0] != number:
            self._order = number, self._rng(number, 1).permutation(len(self.prompt_ids))
        return int(self._order[1][at])

    def _named(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        self.step += 1
        return [self.prompt_ids[i] for i in np.resize(rows, self.batch_size)]


class Posterior(Rival):
    """``bots``: ``a``, ``b`` float64 [n]; a step moves them by the share ``FADES`` towards the prior."""

    schedule = "bots"
    arrays = ("a", "b")
    FADES = 0.1  # l

    def __init__(self, prompt_ids: Sequence[str], cfg: PlanConfig, **kwargs: Any) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        self.a, self.b = np.ones(len(self.prompt_ids)), np.ones(len(self.prompt_ids))

    def next_batch(self) -> list[str]:
        rows = self._candidates()
        drawn = self._rng(self.step, 0).beta(self.a[rows], self.b[rows])
        return self._named(rows[np.argsort(np.abs(drawn - TARGET), kind="stable")[: self.batch_size]])

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: Any = None) -> None:
        rows, rates = self._check(prompt_ids, pass_rates)
        fading = self._fading(rows)
        for counts, share in ((self.a, rates), (self.b, 1 - rates)):
            counts[fading] += self.FADES * (1 - counts[fading])
            np.add.at(counts, rows, self.group_size * share)

    def metrics(self) -> dict[str, float]:
        return {"predicted": float((self.a / (self.a + self.b)).mean())}

    def _candidates(self) -> np.ndarray:
        return np.arange(len(self.prompt_ids))

    def _fading(self, rows: np.ndarray) -> np.ndarray:
        return np.arange(len(self.prompt_ids))


class Mopps(Posterior):
    """``mopps``: ``CANDIDATES`` times a batch to choose among; only prompts of the batch fade."""

    schedule = "mopps"
    FADES = 0.5  # 1 - d
    CANDIDATES = 16

    def _candidates(self) -> np.ndarray:
        count = min(self.CANDIDATES * self.batch_size, len(self.prompt_ids))
        rows = np.unique([self._at(self._taken + i) for i in range(count)])
        if len(rows) < self.batch_size:  # two passes met in a small pool
            rows = np.arange(len(self.prompt_ids))
        self._taken += count
        return rows

    def _fading(self, rows: np.ndarray) -> np.ndarray:
        return np.unique(rows)


class Greso(Rival):
    """``greso``: ``without`` float64 [n, 2], groups without a gradient in a row and whether the last was EASY
    or HARD; ``tried`` float64 [2], p."""

    schedule = "greso"
    arrays = ("without", "tried")
    SHARES = np.array([1 / 12, 1 / 6])
    STEP, LEAST = 0.01, 0.01

    def __init__(self, prompt_ids: Sequence[str], cfg: PlanConfig, **kwargs: Any) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        self.without, self.tried = np.zeros((len(self.prompt_ids), 2)), np.array([0.5, 0.5])

    def next_batch(self) -> list[str]:
        rng, rows = self._rng(self.step, 0), dict[int, None]()
        skipped, most = dict[int, None](), min(self.batch_size, len(self.prompt_ids))
        for _ in range(2 * len(self.prompt_ids)):
            if len(rows) == most:
                break
            row = self._at(self._taken)
            self._taken += 1
            length, kind = self.without[row]
            kept = rng.random() < self.tried[int(kind)] ** length
            (rows if kept else skipped)[row] = None
        left = [row for row in skipped if row not in rows]  # where all but a few are skipped
        return self._named([*rows, *left[: most - len(rows)]])

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: Any = None) -> None:
        rows, rates = self._check(prompt_ids, pass_rates)
        kinds = (rates == 1, rates == 0)
        for row, easy, hard in zip(rows.tolist(), *kinds, strict=True):
            self.without[row] = (self.without[row, 0] + 1, HARD if hard else EASY) if easy or hard else (0, 0)
        for kind, found in enumerate(kinds):
            change = -self.STEP if found.sum() > self.SHARES[kind] * len(rows) else self.STEP
            self.tried[kind] = np.clip(self.tried[kind] + change, self.LEAST, 1.0)

    def metrics(self) -> dict[str, float]:
        return {"tried_easy": float(self.tried[EASY]), "tried_hard": float(self.tried[HARD])}


class Oracle(Rival):
    """``oracle``: ``rates`` float64 [n], 1/2 before `know`; ``last`` float64 [n], each one's last step."""

    schedule = "oracle"
    arrays = ("rates", "last")
    asks = True

    def __init__(self, prompt_ids: Sequence[str], cfg: PlanConfig, **kwargs: Any) -> None:
        super().__init__(prompt_ids, cfg, **kwargs)
        n_rows = len(self.prompt_ids)
        self.rates, self.last = np.full(n_rows, 0.5), np.full(n_rows, -1e9)
        self._worth = 0.0
        self.note(
            "an oracle is for measuring: `saerl train` tells it pass rates by a forward pass over the pool "
            "before each step; where nobody does it draws at random"
        )

    def know(self, pass_rates: Any) -> None:
        rates = np.asarray(pass_rates, dtype=np.float64)
        if rates.shape != self.rates.shape or not ((rates >= 0) & (rates <= 1)).all():
            raise SaerlError("the oracle must be told one pass rate in [0, 1] for each of its prompts")
        self.rates = rates

    def next_batch(self) -> list[str]:
        settings = self.cfg.adaptive
        worth = 1 - self.rates**self.group_size - (1 - self.rates) ** self.group_size
        drawn = worth + settings.noise * self._rng(self.step, 0).gumbel(size=len(worth))
        rests = self.step - self.last <= settings.cooldown
        rows = np.lexsort((-drawn, rests))[: self.batch_size]  # those that rest are a last resort
        self.last[rows] = self.step
        self._worth = float(worth[rows].mean())
        return self._named(rows)

    def metrics(self) -> dict[str, float]:
        return {"worth": self._worth}


RIVALS: dict[str, type[Rival]] = {kind.schedule: kind for kind in (Mopps, Posterior, Greso, Oracle)}
