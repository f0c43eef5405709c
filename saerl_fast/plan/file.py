"""``plan.json``: a plan anyone can read, checked by its hash when it is loaded again.

One object: format, version, schedule, seed, batch_size, total_steps, config (plan.* settings), notes,
prompts (id and scores of every prompt in the plan), dropped (the others, with the reason), batches
(ids, all ``total_steps`` of a static schedule; null for those that learn), tensors (name and SHA-256 of the
safetensors file beside it, which holds the adaptive schedule's features), sha256 of the rest, and of
adaptive ones group_size, the rollouts of a prompt that it is for.

Of more than ``COLUMNAR`` prompts (version 2) the object tells only the numbers; ids, scores, reasons and
batches (rows of ids) are in the safetensors file too, a tensor a column; there ``load_plan`` leaves them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import SCHEDULES, PlanConfig, from_dict, to_dict
from saerl_fast.errors import SaerlError, Unreadable, first_line
from saerl_fast.fileio import mismatch, read_json, write_text
from saerl_fast.plan.adaptive import AdaptivePlan
from saerl_fast.plan.base import Dropped, Plan
from saerl_fast.plan.embedding import Embedding
from saerl_fast.plan.rivals import RIVALS, Rival
from saerl_fast.plan.static import StaticPlan
from saerl_fast.plugins import check_name
from saerl_fast.records.manifest import digest, json_digest
from saerl_fast.records.packed import Packed
from saerl_fast.records.tensors import Blocks, read_tensors, write_tensors

FORMAT, VERSIONS = "saerl-plan", (1, 2)
COLUMNAR = 20_000
BLOCK = 1 << 14  # rows written at a time
COLUMNS = {"cluster": np.int32, "difficulty": np.float32, "quality": np.float32, "pass_rate": np.float32}
FORM = {
    **dict.fromkeys(("seed", "batch_size", "total_steps"), int),
    **{"schedule": str, "config": dict, "notes": [str], "prompts": (int, [dict])},
    **{"dropped": (int, [{"reason": str}]), "batches": (None, int, [list])},
    **{"tensors": (None, {"file": str, "sha256": str}), "group_size?": int},
}
LARGEST = 1e30  # of a score
AGAIN = "make it again with `saerl plan`"


def save_plan(plan: Plan, path: str | Path) -> Path:
    """Write ``plan`` (its start, not its place) to ``path``."""
    path = Path(path)
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "schedule": plan.schedule,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "total_steps": plan.total_steps,
        "config": to_dict(plan.cfg),
        "notes": plan.notes,
        "prompts": None,
        "dropped": None,
        "batches": None,
        "tensors": None,
    }
    out, reasons = plan.dropped.ids, plan.dropped.reasons
    rows = [plan.batch_rows(i) for i in range(plan.total_steps)] if isinstance(plan, StaticPlan) else []
    tensors: dict[str, np.ndarray | Blocks] = {}
    if len(plan.prompt_ids) + len(out) > COLUMNAR:
        tensors |= _packed("", plan.prompt_ids, plan.table) | _packed("dropped.", out, plan.dropped_table)
        tensors |= _packed("reason.", reasons, {})
        body |= {"version": 2, "prompts": len(plan.prompt_ids), "dropped": len(out)}
        if rows:
            tensors["batches"], body["batches"] = np.array(rows, dtype=np.int32), len(rows)
    else:
        body["prompts"] = _records(plan.prompt_ids, plan.table)
        body["dropped"] = _records(out, plan.dropped_table, reasons)
        if rows:
            body["batches"] = [[plan.prompt_ids[i] for i in batch] for batch in rows]
    if isinstance(plan, AdaptivePlan | Rival):
        body["group_size"] = plan.group_size
    if isinstance(plan, AdaptivePlan):
        tensors |= _embedding(plan)
    if tensors:
        file = path.with_suffix(".safetensors")
        write_tensors(file, tensors, {"format": "saerl-plan-tensors-1"})
        body["tensors"] = {"file": file.name, "sha256": digest(file)}
    body["sha256"] = _content_hash(body)
    return write_text(path, _layout(body))


def load_plan(path: str | Path) -> Plan:
    """The plan in a file of ``save_plan``, at its first batch.

    Raises SaerlError when the file is missing, damaged, or of another format version.
    """
    path = Path(path)
    body = read_json(path, "saerl plan")
    if body.get("format") != FORMAT:
        raise SaerlError(f"{path} is not a plan file; {AGAIN}")
    if body.get("version") not in VERSIONS:
        raise SaerlError(f"{path} has version {body.get('version')!r}, this release reads 1 and 2; {AGAIN}")
    if body.get("sha256") != _content_hash(body):
        raise SaerlError(f"{path} was changed or damaged: its content does not match its sha256; {AGAIN}")
    try:
        return _plan(body, path)
    except Unreadable:
        raise
    except (LookupError, TypeError, ValueError, OverflowError) as err:  # a crafted one fits its hash
        why = f"{err} is missing or unknown" if isinstance(err, KeyError) else first_line(err)
        why = str(err) if isinstance(err, SaerlError) else why  # with paths as long as they are
        raise SaerlError(f"{path} cannot be followed ({why.removesuffix(f'; {AGAIN}')}); {AGAIN}") from err


def _plan(body: dict[str, Any], path: Path) -> Plan:
    """The plan that ``body`` describes; ValueError, LookupError and their like where it does not."""
    if fault := mismatch(body, FORM):
        raise ValueError(fault)
    check_name(body["schedule"], SCHEDULES, "its schedule")
    schedule, steps, size = body["schedule"], body["total_steps"], body["batch_size"]
    if not re.fullmatch(r"\w[\w.:-]{0,199}", schedule) or ".." in schedule:
        raise ValueError(f"its schedule {schedule!r:.60} is no name")
    cfg = from_dict(PlanConfig, body["config"])
    tensors = _tensors(path, body["tensors"]) if body["tensors"] else {}
    ids: Sequence[str]
    out: Sequence[str]
    reasons: Sequence[str]
    if body["version"] == 2:
        ids, table = _unpacked("", tensors, body["prompts"])
        out, dropped_table = _unpacked("dropped.", tensors, body["dropped"])
        reasons, _ = _unpacked("reason.", tensors, body["dropped"])
    else:
        ids, table = _columns(body["prompts"])
        out, dropped_table = _columns(body["dropped"])
        reasons = [record["reason"] for record in body["dropped"]]
        if len({*ids, *out}) < len(ids) + len(out):
            raise ValueError("a prompt stands in it twice")
    common: dict[str, Any] = {
        **{name: body[name] for name in ("batch_size", "total_steps", "seed", "notes")},
        "table": table,
        "dropped": Dropped(out, reasons),
        "dropped_table": dropped_table,
    }
    if schedule in (*RIVALS, "adaptive"):
        common["group_size"] = body["group_size"]
    if schedule in RIVALS:
        return RIVALS[schedule](ids, cfg, **common)
    if schedule == "adaptive":
        return AdaptivePlan(ids, cfg, embedding=_read_embedding(tensors, len(ids)), **common)
    if body["version"] == 2:
        batches = tensors["batches"]
        if batches.dtype != np.int32 or batches.size and not 0 <= batches.min() <= batches.max() < len(ids):
            raise ValueError("its batches name rows that it does not have")
    else:
        row = {name: i for i, name in enumerate(ids)}
        batches = np.array([[row[name] for name in batch] for batch in body["batches"]])
    if batches.shape != (steps, size):
        raise ValueError("its batches are not total_steps of batch_size prompts")
    if len(ids) >= size and (np.diff(np.sort(batches, axis=1)) == 0).any():
        raise ValueError("a batch holds a prompt twice")
    return StaticPlan(schedule, ids, cfg, batches=batches, **common)


def _tensors(path: Path, entry: dict[str, str]) -> dict[str, np.ndarray]:
    name = entry["file"]
    if not isinstance(name, str) or not name or Path(name).name != name or not name.isprintable():
        raise SaerlError(f"{path} names no file beside it but {name!r:.60}; {AGAIN}")
    file = path.parent / name
    if not file.is_file():
        raise SaerlError(f"{file} is missing: it belongs beside {path}; {AGAIN}")
    if digest(file) != entry["sha256"]:
        raise SaerlError(f"{file} was changed or damaged: it does not match the hash in {path}; {AGAIN}")
    return read_tensors(file, AGAIN)


def _packed(prefix: str, strings: Sequence[str], table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    packed = strings if isinstance(strings, Packed) else Packed.of(strings)
    columns = {
        f"{prefix}{name}": table[name].astype(COLUMNS[name], copy=False) for name in COLUMNS if name in table
    }
    return {f"{prefix}text": packed.array, f"{prefix}ends": packed.ends, **columns}


def _unpacked(
    prefix: str, tensors: dict[str, np.ndarray], count: int
) -> tuple[Packed, dict[str, np.ndarray]]:
    text, ends = tensors[f"{prefix}text"], tensors[f"{prefix}ends"]
    table = {name: tensors[f"{prefix}{name}"] for name in COLUMNS if f"{prefix}{name}" in tensors}
    lengths = {len(ends) - 1, *map(len, table.values())}
    if lengths != {count} or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
        raise SaerlError(f"the plan's tensors do not hold its {count} prompts; {AGAIN}")
    _check_table(table)
    return Packed(text, ends), table


def _records(
    ids: Sequence[str], table: dict[str, np.ndarray], reasons: Sequence[str] | None = None
) -> list[dict]:
    records: list[dict[str, Any]] = []
    for i, name in enumerate(ids):
        record: dict[str, Any] = {"id": name}
        for column, values in table.items():
            value = values[i]
            if np.issubdtype(values.dtype, np.integer):
                record[column] = int(value)
            else:  # the shortest text that gives the same float32 back
                record[column] = float(str(np.float32(value))) if np.isfinite(value) else None
        if reasons is not None:
            record["reason"] = reasons[i]
        records.append(record)
    return records


def _columns(records: list[dict]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Ids and score columns; ValueError and its like for what is no id and no score."""
    table = {}
    for name, dtype in COLUMNS.items():
        if records and name in records[0]:
            values = [np.nan if record[name] is None else record[name] for record in records]
            if not set(map(type, values)) <= ({int} if dtype == np.int32 else {int, float}):
                raise ValueError(f"{name} of some prompt is no number")
            with np.errstate(over="ignore"):  # infinite then, and refused
                table[name] = np.array(values, dtype=dtype)
    _check_table(table)
    ids = [record["id"] for record in records]
    if not set(map(type, ids)) <= {str}:
        raise ValueError("the id of some prompt is no text")
    return ids, table


def _check_table(table: dict[str, np.ndarray]) -> None:
    for name, values in table.items():
        least, most = {"cluster": (0, 2**31), "pass_rate": (0, 1)}.get(name, (-LARGEST, LARGEST))
        known = values[~np.isnan(values)]
        if values.dtype != COLUMNS[name] or (len(known) and not least <= known.min() <= known.max() <= most):
            raise ValueError(f"{name} of some prompt is not from {least:g} to {most:g}")


def _layout(body: dict[str, Any]) -> str:
    """JSON with one prompt or one batch a line: made to be read, searched and compared."""
    lines = []
    for key, value in body.items():
        if key in ("prompts", "dropped", "batches") and isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            lines.append(f' "{key}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _content_hash(body: dict[str, Any]) -> str:
    return json_digest({key: value for key, value in body.items() if key != "sha256"})


def _embedding(plan: AdaptivePlan) -> dict[str, np.ndarray | Blocks]:
    embedding, shape = plan.embedding, plan.embedding.rows.shape
    blocks = (plan.first_rows(at, min(at + BLOCK, shape[0])) for at in range(0, shape[0], BLOCK))
    tensors: dict[str, np.ndarray | Blocks] = {"rows": Blocks(np.float32, shape, blocks)}
    tensors |= {"mean": embedding.mean, "scale": np.array([embedding.scale], dtype=np.float64)}
    if plan.cfg.adaptive.refresh_features:  # large, and needed only to embed features seen during the run
        tensors |= {"idf": embedding.idf, "components": embedding.components}
    return tensors


def _read_embedding(tensors: dict[str, np.ndarray], n_rows: int) -> Embedding:
    rows, mean, scale = tensors["rows"], tensors["mean"], tensors["scale"]
    idf = tensors.get("idf", np.zeros(0, dtype=np.float32))
    components = tensors.get("components", np.zeros((len(mean), 0), dtype=np.float32))
    width = len(mean)
    shapes = {"rows": (n_rows, width), "mean": (width,), "components": (width, len(idf)), "scale": (1,)}
    for name, array in (("rows", rows), ("mean", mean), ("components", components), ("scale", scale)):
        if array.shape != shapes[name] or array.dtype != (np.float64 if name == "scale" else np.float32):
            raise ValueError(f"it holds {name} {list(array.shape)}, not {list(shapes[name])}")
        if not all(np.isfinite(array[at : at + BLOCK]).all() for at in range(0, len(array), BLOCK)):
            raise ValueError(f"it holds {name} that are NaN or infinite")
    if scale[0] <= 0:
        raise ValueError(f"it holds the scale {scale[0]}")
    return Embedding(rows, idf, components, mean, float(scale[0]))
