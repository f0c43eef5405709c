"""When training goes wrong, one line that says so: rules over the rows that the trainer logs anyway.

A warning begins when its rule has held for ``train.warn_after`` steps in a row (for some in the first step),
is said then, and ends when the rule has not held for as many steps. Rows of metrics.jsonl name the warnings
that hold (``alarms``) and those that begin (``begun``), summary.json counts them (``warnings``).

Entropy, lengths and gradients are compared with the run's own first step. Entropy near 0 ends learning (Yu et
al., DAPO, 2025, section 3.1); groups of equal rewards have no gradient at all.

| warning | its rule |
|---|---|
| no signal | no group has two different rewards; in as many steps as make 20 groups, if that is more |
| updates skipped | the loss or the gradient norm is not finite; at once |
| no gradient | the gradient norm is 0 though rewards differ |
| gradient explodes | a gradient norm above 100 times the first |
| entropy collapses | below 5 % of the first, or 0.001 |
| entropy explodes | above 3 times the first and by more than 1 |
| completions collapse | mean length below 10 % of the first, or about one token where it was at least 1.75 |
| completions cut off | all at max_new_tokens, or 90 % where less than half were at first |
| far from the reference | KL above 1 per token, with train.loss.beta |
| mostly clipped | above half of the tokens |
| mismatch | log-probabilities of sampling and training differ by more than rounding explains; at once |
| sampling exhausted | train.dynamic_sampling's batches left too few groups with a signal |
| features are zero | no SAE feature is active in any prompt, under a plan that wants features |
| accuracy below the start | by 3 standard errors, or by 2 in two evaluations in a row; or none is known |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saerl_fast.config import TrainConfig

GROUPS = 20
AT_ONCE = ("updates skipped", "mismatch", "accuracy below the start")
LOWER = "lower train.lr"


class Health:
    """The warnings of one run. ``state`` is all that it remembers: plain JSON, for checkpoints.

    ``bound``: the mismatch that rounding explains (`saerl_fast.rl.ways.tolerance`).
    """

    def __init__(self, cfg: TrainConfig, bound: float, state: dict[str, Any] | None = None) -> None:
        self.cfg, self.bound = cfg, bound
        self.state: dict[str, Any] = state or {"first": {}, "held": {}, "calm": {}, "warnings": {}}

    @property
    def warnings(self) -> dict[str, dict[str, int]]:
        """By name: the step it was first said in, how many times, and the rows in which it held."""
        return self.state["warnings"]

    def see(self, row: dict[str, Any], *, blind: bool = False) -> dict[str, str]:
        """The warnings that begin with this row, name -> sentence; they are noted in the row.

        ``row`` of kind train or eval. ``blind``: the features that the plan was told of are all zero.
        """
        if not self.cfg.warn_after:
            return {}
        evaluated = row["kind"] == "eval"
        held = self._evaluated(row) if evaluated else self._trained(row, blind)
        names = [name for name in {**self.state["held"], **held} if (name == AT_ONCE[-1]) == evaluated]
        begun = {name: held.get(name, "") for name in names if self._begins(name, name in held)}
        if standing := [name for name in held if name in self.state["calm"]]:
            row["alarms"] = standing
        if begun:
            row["begun"] = list(begun)
        for name in standing:
            found = self.warnings.setdefault(name, {"first": row["step"], "times": 0, "steps": 0})
            found["times"] += name in begun
            found["steps"] += 1
        return begun

    def _begins(self, name: str, holds: bool) -> bool:
        """Count a step of a rule, or one without it; whether its warning begins now."""
        counts, calm, after = self.state["held"], self.state["calm"], self.cfg.warn_after
        if not holds:
            if name in calm and name != AT_ONCE[-1]:
                calm[name] += 1  # it may come back
            if calm.get(name, after) >= after or name == AT_ONCE[-1]:
                counts.pop(name, None)
                calm.pop(name, None)
            return False
        counts[name] = counts.get(name, 0) + 1
        needed = 1 if name in AT_ONCE else after
        if name == "no signal":
            needed = max(after, math.ceil(GROUPS / self.cfg.rollout.prompts_per_step))
        begins = name not in calm and counts[name] >= min(needed, self.cfg.steps)  # all of a short run
        if begins or name in calm:
            calm[name] = 0
        return begins

    def _trained(self, row: Mapping[str, Any], blind: bool) -> dict[str, str]:
        """The rules that hold in a training row, with what there is to say."""
        cfg, first, held = self.cfg, self.state["first"], {}
        used, norm, limit = row["groups_used"], row["grad_norm"], cfg.rollout.max_new_tokens
        entropy, length, cut = row["entropy"], row["length"], 1 - row["finished"]
        for name, value in {"grad_norm": norm, "entropy": entropy, "length": length, "cut": cut}.items():
            if _finite(value) and (value > 0 or name == "cut"):
                first.setdefault(name, value)
        learns = used > 0 or cfg.loss.beta > 0
        if used == 0:
            why = "no completion ended" if cut == 1 else f"the mean reward is {_short(row['reward'])}"
            why = "every completion ends at once" if cut == 0 and length <= 1 else why
            held["no signal"] = f"no group has two different rewards ({why}): nothing is learnt from them"
        if learns and not (_finite(norm) and _finite(row["loss"])):
            held["updates skipped"] = (
                f"the gradient norm is {_short(norm)} and the loss {_short(row['loss'])}: this update is "
                f"skipped; {LOWER}, or use model.dtype=float32"
            )
        elif learns and norm == 0:
            held["no gradient"] = "the gradient is 0 though rewards differ: nothing is learnt from them"
        if _above(norm, 100 * first.get("grad_norm", math.inf)):
            held["gradient explodes"] = (
                f"the gradient norm is {_short(norm)}{self._was('grad_norm')}; {LOWER}"
            )
        if _finite(entropy):
            told = f"the entropy is {_short(entropy)} per token{self._was('entropy')}"
            before = first.get("entropy", 0.0)
            if entropy < max(0.05 * before, 1e-3):
                held["entropy collapses"] = f"{told}: all completions are the same; {LOWER}"
            elif entropy > max(3 * before, 1 + before):
                held["entropy explodes"] = f"{told}: completions become noise; {LOWER}"
        usual = first.get("length", 0.0)
        if length < max(0.1 * usual, min(1.05, 0.6 * usual)):
            held["completions collapse"] = f"completions have {_short(length)} tokens{self._was('length')}"
        if cut == 1 or (cut > 0.9 and first["cut"] < 0.5):
            held["completions cut off"] = (
                f"{cut:.0%} of the completions are cut off at train.rollout.max_new_tokens={limit}; raise it"
            )
        if cfg.loss.beta > 0 and _above(row["kl"], 1.0):
            held["far from the reference"] = (
                f"the KL to the starting model is {_short(row['kl'])} per token; {LOWER}"
            )
        if _above(row["clipped"], 0.5):
            held["mostly clipped"] = f"{row['clipped']:.0%} of the tokens are clipped; {LOWER}"
        if _above(row["mismatch"], self.bound):
            held["mismatch"] = (
                f"sampled and trained log-probabilities differ by {_short(row['mismatch'])} per token "
                f"(mismatch), and rounding explains {self.bound:.2g}; compare with "
                "train.rollout.engine=transformers, train.rollout.decode=dynamic and model.dtype=float32"
            )
        wanted, draws = cfg.rollout.prompts_per_step, row.get("draws", 0)
        if cfg.dynamic_sampling and draws > cfg.dynamic_sampling and used < wanted:
            held["sampling exhausted"] = (
                f"{used} of {wanted} groups had a signal after {draws} batches, all that "
                "train.dynamic_sampling allows; raise it, or leave out prompts that are too easy or too hard"
            )
        if blind:
            held["features are zero"] = (
                "no SAE feature is active in any prompt: the plan cannot tell them apart"
            )
        return held

    def _evaluated(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The same of an evaluation's row."""
        accuracy, first = row["accuracy"], self.state["first"]
        if not _finite(accuracy):
            return {AT_ONCE[-1]: "the held-out accuracy is not a number"}
        start = first.setdefault("accuracy", accuracy)
        share = (start * row["n"] + 2) / (row["n"] + 4)  # no share of a sample is quite 0 or 1
        spread = share * (1 - share) if 0 <= start <= 1 else max(1.0, start**2) / 4
        error = math.sqrt(spread / row["n"])
        low = first["low"] = first.get("low", 0) + 1 if start - accuracy > 2 * error else 0
        if start - accuracy > 3 * error or low > 1:
            return {
                AT_ONCE[-1]: f"the held-out accuracy is {_short(accuracy)}, {_short(start)} at first; {LOWER}"
            }
        return {}

    def _was(self, name: str) -> str:
        return f", {_short(self.state['first'][name])} at first" if name in self.state["first"] else ""


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _above(value: float | None, bound: float) -> bool:
    return value is not None and value > bound


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
