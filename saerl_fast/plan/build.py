"""Scores in, a plan out: the quality filter, what the schedule needs, and the plan itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import PlanConfig, QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan.adaptive import AdaptivePlan
from saerl_fast.plan.base import Dropped, Plan
from saerl_fast.plan.embedding import BLOCK, embed, embed_kinds
from saerl_fast.plan.rivals import RIVALS
from saerl_fast.plan.static import StaticPlan, get_schedule, middle
from saerl_fast.prompts import layouts
from saerl_fast.records.packed import LARGE, Packed, chosen
from saerl_fast.signals.bank import cells
from saerl_fast.signals.copies import same_text
from saerl_fast.signals.features import SAMPLE
from saerl_fast.signals.text import plain

if TYPE_CHECKING:
    from saerl_fast.signals.scores import Scores

log = logging.getLogger(__name__)
MISSING = {
    "difficulty": "difficulty scores; set difficulty.label_column or difficulty.n_labels, and",
    "cluster": "clusters;",
    "quality": "quality scores; give labels in quality.label_column, and",
    "pass_rate": "pass rates; set difficulty.label_column or difficulty.n_labels, and",
}

NO_COLUMN = "plan.adaptive.columns names {!r}, which the pool lacks; {}"


def build_plan(
    scores: Scores,
    cfg: PlanConfig,
    *,
    batch_size: int,
    total_steps: int,
    seed: int,
    group_size: int = 8,
    quality: QualityConfig | None = None,
) -> Plan:
    """The plan for a run of ``total_steps`` batches of ``batch_size`` prompts.

    ``seed`` serves where ``cfg.seed`` is None. ``group_size``: rollouts of a prompt. ``quality`` overrides
    the filter settings recorded in ``scores``. Without a quality signal nothing is filtered, which
    ``plan.notes`` says, unless ``cfg.filter`` asks for it: that is an error, as are a schedule whose signal
    is missing and a filter that leaves nothing.
    """
    static = get_schedule(cfg.schedule)
    ids = scores.prompt_ids
    if not ids:
        raise SaerlError("the pool has no prompts to plan; check data.train and data.limit")
    notes: list[str] = []
    table = _table(scores)
    rows, poor, where = np.arange(len(ids)), np.zeros(len(ids), dtype=bool), ["", ""]
    if cfg.filter or (cfg.filter is None and (static is None or static.filtered)):
        poor, where[0] = _filter(table.get("quality"), scores, quality, bool(cfg.filter), notes)
        rows = np.flatnonzero(~poor)

    of = np.full(len(ids), -1)
    if cfg.drop_copies != "no":
        of = _copies(scores, equal=cfg.drop_copies == "equal")
        rows = rows[of[rows] < 0]
        if not len(rows):
            raise SaerlError("the quality filter keeps only copies of what it drops; set plan.drop_copies=no")

    needs = static.needs + ("difficulty",) * bool(static.keep) if static else ()
    for name in needs:
        if name not in MISSING:
            known = ", ".join(MISSING)
            raise SaerlError(f"schedule {cfg.schedule!r} needs {name!r}, which no score is; use {known}")
        if name not in table:
            raise SaerlError(f"schedule {cfg.schedule!r} needs {MISSING[name]} run `saerl score` again")
    if "difficulty" in needs and np.ptp(table["difficulty"][rows]) == 0:
        notes.append("predicted difficulty is the same for all prompts: the easy-to-hard order is random")
    if static and static.keep:
        rows = static.keep(table["difficulty"], rows, cfg.medium_keep)
        where[1] = f"outside the middle {cfg.medium_keep:.0%}" if static.keep is middle else "was not kept"

    out = np.setdiff1d(np.arange(len(ids)), rows)
    reasons = (
        f"quality {table['quality'][i]:.3f} {where[0]}"
        if poor[i]
        else f"a copy of prompt {ids[of[i]]}"
        if of[i] >= 0
        else f"difficulty {table['difficulty'][i]:.3f} {where[1]}"
        for i in out
    )
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "total_steps": total_steps,
        "seed": seed if cfg.seed is None else cfg.seed,
        "table": {name: column[rows] for name, column in table.items()},
        "dropped": Dropped(chosen(ids, out), Packed.of(reasons) if len(out) > LARGE else list(reasons)),
        "dropped_table": {name: column[out] for name, column in table.items()},
        "notes": notes,
    }
    kept_ids = chosen(ids, rows)
    if static:
        plan = StaticPlan(cfg.schedule, kept_ids, cfg, **common)
        plan.batch_rows(total_steps - 1)  # no step waits for its pass; what is wrong with an order shows here
        return plan
    if cfg.schedule in RIVALS:
        return RIVALS[cfg.schedule](kept_ids, cfg, group_size=group_size, **common)
    if scores.features is None:
        raise SaerlError(
            "schedule 'adaptive' needs the prompts' SAE features, but the scores have none; "
            "run `saerl score` again"
        )
    kinds = cfg.adaptive.features
    most = SAMPLE if kinds == ["sae"] else BLOCK
    if len(rows) > most:
        notes.append(f"components were fitted to the features of a sample of {most} of {len(rows)} prompts")
    if kinds == ["sae"]:
        embedding = embed(scores.features, rows, cfg.adaptive, seed=common["seed"])
    else:
        bank = scores.bank()
        if "columns" in kinds:
            bank.kinds["columns"] = cells(_columns(scores, cfg.adaptive.columns))
        names = bank.names(kinds, "plan.adaptive.features")
        embedding = embed_kinds(bank, names, rows, cfg.adaptive, seed=common["seed"])
        if cfg.adaptive.refresh_features:
            notes.append("only plan.adaptive.features=sae is refreshed by rollouts")
    if embedding.scale == 1.0 and kinds != ["none"]:  # there was nothing to scale
        notes.append(
            "all prompts have the same features: the plan cannot tell them apart; train the SAE again"
        )
        log.warning("plan: %s", notes[-1])
    return AdaptivePlan(kept_ids, cfg, embedding=embedding, group_size=group_size, **common)


def _columns(scores: Scores, names: list[str]) -> list[Sequence[Any]]:
    found = []
    for name in names:
        column = layouts.column(scores.columns, name)
        if column is None:
            raise SaerlError(NO_COLUMN.format(name, layouts.not_found(scores.columns, name)))
        found.append(column)
    return found


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
        bad = table["pass_rate"][(table["pass_rate"] < 0) | (table["pass_rate"] > 1)]
        if len(bad):
            raise SaerlError(f"saerl_pass_rate holds {bad[0]:g}, which is no pass rate; give 0 to 1, or null")
    if "difficulty" in table:  # a row without a score goes to the middle of the order
        known = np.isfinite(table["difficulty"])
        table["difficulty"] = np.where(known, table["difficulty"], np.median(table["difficulty"][known]))
    return table


def _copies(scores: Scores, equal: bool) -> np.ndarray:
    """int [n]: the row that each row repeats, or -1; SaerlError for scores that do not say."""
    if equal and "prompt" in scores.columns:
        first = same_text(map(plain, scores.columns["prompt"]))
        return np.where(first == np.arange(len(first)), -1, first)
    of = scores.column("saerl_copy_of")
    if of is None or equal:
        raise SaerlError(
            "plan.drop_copies needs to know which prompts repeat others; run `saerl score` again"
        )
    if not ((of >= -1) & (of < len(of))).all():
        raise SaerlError("the column saerl_copy_of is damaged; run `saerl score` again")
    return of


def _filter(
    quality: np.ndarray | None,
    scores: Scores,
    override: QualityConfig | None,
    asked: bool,
    notes: list[str],
) -> tuple[np.ndarray, str]:
    """Whether each row fails the quality filter, bool [n], and where its quality then lies."""
    bad = np.zeros(len(scores), dtype=bool)
    if quality is None:
        if asked:
            raise SaerlError(
                "plan.filter=true needs quality scores, but the scores have none; give labels in "
                "quality.label_column and run `saerl score` again, or set plan.filter=false"
            )
        notes.append("no quality scores: nothing was filtered")
        return bad, ""
    recorded = scores.metadata.get("quality", {})
    threshold = override.threshold if override else recorded.get("threshold", QualityConfig.threshold)
    ratio = override.filter_ratio if override else recorded.get("filter_ratio", QualityConfig.filter_ratio)
    known = quality[np.isfinite(quality)]
    if len(bad) > 1 and len(known) == len(bad) and np.ptp(known) == 0 and (ratio or known[0] < threshold):
        same = "all prompts have the same quality, as where the probe does no better than chance"
        if asked:
            raise SaerlError(f"plan.filter=true, but {same}; label more prompts, or set plan.filter=false")
        notes.append(f"{same}: nothing was filtered")
        log.warning("plan: %s", notes[-1])
        return bad, ""
    if ratio is not None:
        ranked = np.argsort(np.where(np.isfinite(quality), quality, np.inf), kind="stable")
        bad[ranked[: round(ratio * len(bad))]] = True
        where = f"among the lowest {ratio:.1%}"
        fix = f"lower quality.filter_ratio={ratio}"
    else:
        bad = quality < threshold  # an unknown score (NaN) stays
        where = f"below {threshold:g}"
        fix = f"lower quality.threshold={threshold:g} (the best prompt has {np.nanmax(quality):.3f})"
    if bad.all():
        raise SaerlError(f"the quality filter drops all {len(bad)} prompts; {fix} or set plan.filter=false")
    return bad, where
