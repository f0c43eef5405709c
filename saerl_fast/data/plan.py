"""The plan: which prompts a run trains on, in which order, decided before it or while it goes.

A :class:`Plan` hands out batches of prompt ids, is told the pass rates they had, and can save and
restore its place to the exact next batch. Static schedules ignore what they are told;
``adaptive`` (:mod:`saerl_fast.data.adaptive`) chooses by it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import PlanConfig, QualityConfig
from saerl_fast.data import orders
from saerl_fast.errors import SaerlError

if TYPE_CHECKING:
    from saerl_fast.data.score import Scores
    from saerl_kernels import CSR

log = logging.getLogger(__name__)
SCHEDULES = ("vanilla", "literal", "global", "medium", "adaptive")


class Plan(ABC):
    """A seeded, serialisable source of batches.

    Attributes: ``schedule``; ``prompt_ids``, all ids that may be drawn; ``dropped``, id -> reason;
    ``batch_size``; ``total_steps``, the length the schedule is paced for (``next_batch`` goes on
    after it); ``seed``; ``step``, batches handed out so far; ``notes``, sentences for the user;
    ``table``, the per-prompt score columns (float32 or int32 [n], rows as in ``prompt_ids``);
    ``dropped_table``, the same columns of the dropped ids; ``wants_features``, whether ``observe``
    uses features captured during rollouts (if not, capturing them for the plan is wasted).
    """

    schedule: str
    wants_features: bool = False

    def __init__(
        self,
        prompt_ids: list[str],
        cfg: PlanConfig,
        *,
        batch_size: int,
        total_steps: int,
        seed: int,
        table: dict[str, np.ndarray] | None = None,
        dropped: dict[str, str] | None = None,
        dropped_table: dict[str, np.ndarray] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        if not prompt_ids:
            raise SaerlError("the plan has no prompts; check the data and the filters that were applied")
        if batch_size < 1 or total_steps < 1:
            name, value = ("batch_size", batch_size) if batch_size < 1 else ("total_steps", total_steps)
            raise SaerlError(f"a plan's {name} must be at least 1, got {value}")
        if seed < 0:
            raise SaerlError(f"a plan's seed must not be negative, got {seed}")
        self.cfg, self.seed = cfg, seed
        self.prompt_ids = list(prompt_ids)
        self.batch_size, self.total_steps = batch_size, total_steps
        self.table, self.dropped_table = table or {}, dropped_table or {}
        self.dropped = dropped or {}
        self.notes = list(notes or [])
        self.step = 0
        self._row = {name: i for i, name in enumerate(self.prompt_ids)}
        if len(self._row) != len(self.prompt_ids):
            raise SaerlError("prompt ids are not unique; choose another data.id_column")
        if len(self.prompt_ids) < batch_size:
            count = len(self.prompt_ids)
            self.note(f"{count} prompts for batches of {batch_size}: prompts repeat inside a batch")

    @abstractmethod
    def next_batch(self) -> list[str]:
        """The next ``batch_size`` prompt ids; distinct whenever there are that many prompts."""

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: CSR | None = None) -> None:
        """Tell the plan the pass rates (floats in [0, 1], one per id) that rollouts of these ids had.

        ``features``: pooled SAE features captured during those rollouts, one CSR row per id.
        Raises SaerlError on an unknown id, another length or a value outside [0, 1].
        """
        self._check(prompt_ids, pass_rates)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during a run: ints, floats, strings and torch tensors, flat."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken. Raises SaerlError on another plan's state."""

    def metrics(self) -> dict[str, float]:
        """Figures about the last batch for a log line."""
        return {}

    def note(self, sentence: str) -> None:
        """Add to ``notes`` what the user should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            log.info(sentence)

    def _check(self, prompt_ids: list[str], pass_rates: Any) -> tuple[np.ndarray, np.ndarray]:
        rates = np.asarray(pass_rates, dtype=np.float64)
        if rates.shape != (len(prompt_ids),):
            raise SaerlError(
                f"observe got {len(prompt_ids)} prompt ids and pass rates of shape {list(rates.shape)}; "
                "give one pass rate per id"
            )
        bad = ~((rates >= 0) & (rates <= 1))
        if bad.any():
            raise SaerlError(
                f"pass rate {rates[bad][0]} of prompt {prompt_ids[int(bad.argmax())]!r} is not in [0, 1]"
            )
        unknown = [name for name in prompt_ids if name not in self._row]
        if unknown:
            raise SaerlError(f"prompt id {unknown[0]!r} is not in the plan; observe only ids it handed out")
        return np.array([self._row[name] for name in prompt_ids], dtype=np.int64), rates

    def _check_state(self, state: dict[str, Any]) -> None:
        mine = {"schedule": self.schedule, "seed": self.seed, "n_prompts": len(self.prompt_ids)}
        mine["batch_size"] = self.batch_size
        for key, value in mine.items():
            if key not in state or state[key] != value:
                raise SaerlError(
                    f"the saved plan state has {key}={state.get(key)!r} but this plan has {value!r}; "
                    "resume with the plan.json that the run was started with"
                )

    def _base_state(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "seed": self.seed,
            "n_prompts": len(self.prompt_ids),
            "batch_size": self.batch_size,
            "step": self.step,
        }

    def _mean_of(self, rows: np.ndarray) -> dict[str, float]:
        return {
            name: float(self.table[name][rows].mean())
            for name in ("difficulty", "quality")
            if name in self.table and np.isfinite(self.table[name][rows]).all()
        }


class StaticPlan(Plan):
    """vanilla, literal, global and medium: passes over the prompts, each in a fresh seeded order.

    A pass takes the rows seen least so far (ties at random), cut to whole batches, so that counts
    never differ by more than one. A pass that the run's end would cut short takes a sample instead:
    the order then still spans easy to hard.
    """

    def __init__(
        self, schedule: str, *args: Any, batches: list[list[int]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        self._stored = batches or []  # from a plan file; the same as what would be drawn
        self._drawn: list[np.ndarray] = []
        self._passes = 0
        self._visits = np.zeros(len(self.prompt_ids), dtype=np.int64)
        n_rows = len(self.prompt_ids)
        if schedule in ("literal", "global") and n_rows >= self.batch_size:
            short = self.total_steps % (n_rows // self.batch_size)
            if short:
                self.note(f"the last pass is {short} batches long: it takes a sample of {n_rows} prompts")

    def batch_rows(self, index: int) -> np.ndarray:
        """Rows [batch_size] of the batch with this index, which may lie beyond ``total_steps``."""
        if index < len(self._stored):
            return np.asarray(self._stored[index], dtype=np.int64)
        while index >= len(self._drawn):
            self._draw_pass()
        return self._drawn[index]

    def next_batch(self) -> list[str]:
        rows = self.batch_rows(self.step)
        self.step += 1
        return [self.prompt_ids[i] for i in rows]

    def state_dict(self) -> dict[str, Any]:
        return self._base_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        self.step = int(state["step"])

    def metrics(self) -> dict[str, float]:
        if not self.step:
            return {}
        per_pass = max(1, len(self.prompt_ids) // self.batch_size)
        return {"epoch": self.step / per_pass, **self._mean_of(self.batch_rows(self.step - 1))}

    def _draw_pass(self) -> None:
        rng = np.random.Generator(np.random.PCG64([self.seed, self._passes]))
        self._passes += 1
        n_rows = len(self.prompt_ids)
        if n_rows < self.batch_size:
            self._drawn.append(np.resize(rng.permutation(n_rows), self.batch_size))
            return
        left = self.total_steps - len(self._drawn)
        count = n_rows // self.batch_size
        if left > 0:
            count = min(count, left)
        fewest = np.lexsort((rng.random(n_rows), self._visits))
        rows = fewest[: count * self.batch_size]
        self._visits[rows] += 1
        if self.schedule in ("vanilla", "medium"):
            batches = orders.shuffled(rows, self.batch_size, rng)
        else:
            columns = {"difficulty": self.table["difficulty"], "cluster": self.table["cluster"]}
            if self.schedule == "literal":
                batches = orders.literal(rows, self.batch_size, rng, mix=self.cfg.mix, **columns)
            else:
                batches = orders.easy_to_hard(
                    rows, self.batch_size, rng, mix=self.cfg.mix, window=self.cfg.window, **columns
                )
        self._drawn.extend(batches)


def build_plan(
    scores: Scores,
    cfg: PlanConfig,
    *,
    batch_size: int,
    total_steps: int,
    seed: int,
    quality: QualityConfig | None = None,
) -> Plan:
    """The plan for a run of ``total_steps`` batches of ``batch_size`` prompts.

    ``seed`` serves where ``cfg.seed`` is None. ``quality`` overrides the filter settings recorded
    in ``scores``. Without a quality signal nothing is filtered, which ``plan.notes`` says, unless
    ``cfg.filter`` asks for it: that is an error, as are a schedule whose signal is missing and a
    filter that leaves nothing.
    """
    if cfg.schedule not in SCHEDULES:
        raise SaerlError(f"plan.schedule={cfg.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    for name, value, low in (("mix", cfg.mix, 0.0), ("medium_keep", cfg.medium_keep, 1e-9)):
        if not low <= value <= 1:
            raise SaerlError(f"plan.{name}={value} is not a share between 0 and 1")
    if cfg.window < 1:
        raise SaerlError(f"plan.window={cfg.window} is no number of batches; use at least 1")
    ids = scores.prompt_ids
    if not ids:
        raise SaerlError("the pool has no prompts to plan; check data.train and data.limit")
    notes: list[str] = []
    dropped: dict[str, str] = {}
    table = _table(scores)
    rows = np.arange(len(ids))
    if cfg.filter or (cfg.filter is None and cfg.schedule != "vanilla"):
        rows, dropped = _filter(ids, table.get("quality"), scores.metadata, quality, bool(cfg.filter), notes)

    if cfg.schedule in ("literal", "global", "medium"):
        if "difficulty" not in table:
            raise SaerlError(
                f"schedule {cfg.schedule!r} needs difficulty scores; set difficulty.label_column or "
                "difficulty.n_labels and run `saerl score` again"
            )
        if np.ptp(table["difficulty"][rows]) == 0:
            notes.append("predicted difficulty is the same for all prompts: the easy-to-hard order is random")
        if cfg.schedule != "medium" and "cluster" not in table:
            raise SaerlError(f"schedule {cfg.schedule!r} needs clusters; run `saerl score` again")
    if cfg.schedule == "medium":
        kept = orders.middle(table["difficulty"], rows, cfg.medium_keep)
        for i in np.setdiff1d(rows, kept):
            reason = f"difficulty {table['difficulty'][i]:.3f} outside the middle {cfg.medium_keep:.0%}"
            dropped[ids[i]] = reason
        rows = kept

    out = np.setdiff1d(np.arange(len(ids)), rows)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "total_steps": total_steps,
        "seed": seed if cfg.seed is None else cfg.seed,
        "table": {name: column[rows] for name, column in table.items()},
        "dropped": {ids[i]: dropped[ids[i]] for i in out},
        "dropped_table": {name: column[out] for name, column in table.items()},
        "notes": notes,
    }
    kept_ids = [ids[i] for i in rows]
    if cfg.schedule != "adaptive":
        return StaticPlan(cfg.schedule, kept_ids, cfg, **common)
    from saerl_fast.data.adaptive import AdaptivePlan, embed

    if scores.features is None:
        raise SaerlError(
            "schedule 'adaptive' needs the prompts' SAE features, but the scores have none; "
            "run `saerl score` again"
        )
    embedding = embed(scores.features, rows, cfg.adaptive, seed=common["seed"])
    return AdaptivePlan(kept_ids, cfg, embedding=embedding, **common)


def save_plan(plan: Plan, path: str | Path) -> Path:
    """Write ``plan`` (its start, not its place) to ``path``; see :mod:`saerl_fast.data.planfile`."""
    from saerl_fast.data.planfile import write_plan

    return write_plan(plan, Path(path))


def load_plan(path: str | Path) -> Plan:
    """The plan in a file of :func:`save_plan`, at its first batch.

    Raises SaerlError when the file is missing, damaged, or of another format version.
    """
    from saerl_fast.data.planfile import read_plan

    return read_plan(Path(path))


def _table(scores: Scores) -> dict[str, np.ndarray]:
    """The score columns a plan reads; a column that is null throughout counts as absent."""
    table: dict[str, np.ndarray] = {}
    for name, dtype in (("cluster", np.int32), ("difficulty", np.float32), ("quality", np.float32)):
        column = scores.column(f"saerl_{name}")
        if column is not None:
            table[name] = np.asarray(column, dtype=dtype)
    rates = scores.column("saerl_pass_rate")
    if rates is not None:
        table["pass_rate"] = np.asarray(rates, dtype=np.float32)
    if "difficulty" in table:  # a row without a score goes to the middle of the order
        known = np.isfinite(table["difficulty"])
        table["difficulty"] = np.where(known, table["difficulty"], np.median(table["difficulty"][known]))
    return table


def _filter(
    ids: list[str],
    scores: np.ndarray | None,
    metadata: dict[str, Any],
    override: QualityConfig | None,
    asked: bool,
    notes: list[str],
) -> tuple[np.ndarray, dict[str, str]]:
    """Rows that pass the quality filter, and the reason for each id that does not."""
    rows = np.arange(len(ids))
    if scores is None:
        if asked:
            raise SaerlError(
                "plan.filter=true needs quality scores, but the scores have none; give labels in "
                "quality.label_column and run `saerl score` again, or set plan.filter=false"
            )
        notes.append("no quality scores: nothing was filtered")
        return rows, {}
    recorded = metadata.get("quality", {})
    threshold = override.threshold if override else recorded.get("threshold", QualityConfig.threshold)
    ratio = override.filter_ratio if override else recorded.get("filter_ratio", QualityConfig.filter_ratio)
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise SaerlError(f"quality.filter_ratio={ratio} is not a share between 0 and 1")
        ranked = np.argsort(np.where(np.isfinite(scores), scores, np.inf), kind="stable")
        bad = np.sort(ranked[: round(ratio * len(ids))])
        reason = f"among the lowest {ratio:.1%}"
        fix = f"lower quality.filter_ratio={ratio}"
    else:
        bad = rows[scores < threshold]  # an unknown score (NaN) stays
        reason = f"below {threshold:g}"
        fix = f"lower quality.threshold={threshold:g} (the best prompt has {np.nanmax(scores):.3f})"
    if len(bad) == len(ids):
        raise SaerlError(f"the quality filter drops all {len(ids)} prompts; {fix} or set plan.filter=false")
    return np.setdiff1d(rows, bad), {ids[i]: f"quality {scores[i]:.3f} {reason}" for i in bad}
