"""``plan.json``: a plan anyone can read, checked by its hash when it is loaded again.

One object: format, version, schedule, seed, batch_size, total_steps, config (plan.* settings), notes,
prompts (id and scores of every prompt in the plan), dropped (the others, with the reason), batches
(ids, all ``total_steps`` of a static schedule; null for adaptive), tensors (name and SHA-256 of the
safetensors file beside it, which holds the adaptive schedule's features) and sha256 of the rest.

Of more than ``COLUMNAR`` prompts (version 2) the object tells only the numbers; ids, scores, reasons and
batches (rows of ids) are in the safetensors file too, a tensor a column; there ``load_plan`` leaves them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import PlanConfig, from_dict, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_text
from saerl_fast.plan.adaptive import AdaptivePlan, Embedding
from saerl_fast.plan.base import Plan
from saerl_fast.plan.packed import Packed
from saerl_fast.plan.static import StaticPlan
from saerl_fast.plan.tensors import Blocks, read_tensors, write_tensors

FORMAT, VERSIONS = "saerl-plan", (1, 2)
COLUMNAR = 20_000
BLOCK = 1 << 14  # rows written at a time
COLUMNS = {"cluster": np.int32, "difficulty": np.float32, "quality": np.float32, "pass_rate": np.float32}
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
    out, reasons = list(plan.dropped), list(plan.dropped.values())
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
    if isinstance(plan, AdaptivePlan):
        tensors |= _embedding(plan)
    if tensors:
        file = path.with_suffix(".safetensors")
        write_tensors(file, tensors, "saerl-plan-tensors-1")
        body["tensors"] = {"file": file.name, "sha256": _file_hash(file)}
    body["sha256"] = _content_hash(body)
    return write_text(path, _layout(body))


def load_plan(path: str | Path) -> Plan:
    """The plan in a file of ``save_plan``, at its first batch.

    Raises SaerlError when the file is missing, damaged, or of another format version.
    """
    path = Path(path)
    body = read_json(path, "saerl plan")
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise SaerlError(f"{path} is not a plan file; {AGAIN}")
    if body.get("version") not in VERSIONS:
        raise SaerlError(f"{path} has version {body.get('version')!r}, this release reads 1 and 2; {AGAIN}")
    if body.get("sha256") != _content_hash(body):
        raise SaerlError(f"{path} was changed or damaged: its content does not match its sha256; {AGAIN}")
    schedule = body.get("schedule")
    if not isinstance(schedule, str) or not re.fullmatch(r"\w[\w.:-]{0,199}", schedule) or ".." in schedule:
        raise SaerlError(f"{path} has no schedule's name but {schedule!r:.60}; {AGAIN}")
    cfg = from_dict(PlanConfig, body["config"])
    tensors = _tensors(path, body["tensors"]) if body["tensors"] else {}
    ids: Sequence[str]
    out: Sequence[str]
    reasons: Sequence[str]
    batches: Any
    if body["version"] == 2:
        ids, table = _unpacked("", tensors, body["prompts"])
        out, dropped_table = _unpacked("dropped.", tensors, body["dropped"])
        reasons, _ = _unpacked("reason.", tensors, body["dropped"])
    else:
        ids, table = _columns(body["prompts"])
        out, dropped_table = _columns(body["dropped"])
        reasons = [record["reason"] for record in body["dropped"]]
    common: dict[str, Any] = {
        "batch_size": body["batch_size"],
        "total_steps": body["total_steps"],
        "seed": body["seed"],
        "table": table,
        "dropped": dict(zip(out, reasons, strict=True)),
        "dropped_table": dropped_table,
        "notes": body["notes"],
    }
    if body["schedule"] == "adaptive":
        return AdaptivePlan(ids, cfg, embedding=_read_embedding(tensors), **common)
    if body["version"] == 2:
        batches = tensors["batches"]
    else:
        row = {name: i for i, name in enumerate(ids)}
        batches = [[row[name] for name in batch] for batch in body["batches"]]
    return StaticPlan(body["schedule"], ids, cfg, batches=batches, **common)


def _tensors(path: Path, entry: dict[str, str]) -> dict[str, np.ndarray]:
    name = entry["file"]
    if not isinstance(name, str) or not name or Path(name).name != name or not name.isprintable():
        raise SaerlError(f"{path} names no file beside it but {name!r:.60}; {AGAIN}")
    file = path.parent / name
    if not file.is_file():
        raise SaerlError(f"{file} is missing: it belongs beside {path}; {AGAIN}")
    if _file_hash(file) != entry["sha256"]:
        raise SaerlError(f"{file} was changed or damaged: it does not match the hash in {path}; {AGAIN}")
    return read_tensors(file, AGAIN)


def _packed(prefix: str, strings: Sequence[str], table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    packed = strings if isinstance(strings, Packed) else Packed.of(strings)
    columns = {
        f"{prefix}{name}": table[name].astype(COLUMNS[name], copy=False) for name in COLUMNS if name in table
    }
    return {f"{prefix}text": packed.text, f"{prefix}ends": packed.ends, **columns}


def _unpacked(
    prefix: str, tensors: dict[str, np.ndarray], count: int
) -> tuple[Packed, dict[str, np.ndarray]]:
    text, ends = tensors[f"{prefix}text"], tensors[f"{prefix}ends"]
    table = {name: tensors[f"{prefix}{name}"] for name in COLUMNS if f"{prefix}{name}" in tensors}
    lengths = {len(ends) - 1, *map(len, table.values())}
    if lengths != {count} or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
        raise SaerlError(f"the plan's tensors do not hold its {count} prompts; {AGAIN}")
    return Packed(text, ends), table


def _records(
    ids: Sequence[str], table: dict[str, np.ndarray], reasons: list[str] | None = None
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
    table = {}
    for name, dtype in COLUMNS.items():
        if records and name in records[0]:
            values = [np.nan if record[name] is None else record[name] for record in records]
            table[name] = np.array(values, dtype=dtype)
    return [record["id"] for record in records], table


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
    rest = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _embedding(plan: AdaptivePlan) -> dict[str, np.ndarray | Blocks]:
    embedding, shape = plan.embedding, plan.embedding.rows.shape
    blocks = (plan.first_rows(at, min(at + BLOCK, shape[0])) for at in range(0, shape[0], BLOCK))
    tensors: dict[str, np.ndarray | Blocks] = {"rows": Blocks(np.float32, shape, blocks)}
    tensors |= {"mean": embedding.mean, "scale": np.array([embedding.scale], dtype=np.float64)}
    if plan.cfg.adaptive.refresh_features:  # large, and needed only to embed features seen during the run
        tensors |= {"idf": embedding.idf, "components": embedding.components}
    return tensors


def _read_embedding(tensors: dict[str, np.ndarray]) -> Embedding:
    rows, mean = tensors["rows"], tensors["mean"]
    idf = tensors.get("idf", np.zeros(0, dtype=np.float32))
    components = tensors.get("components", np.zeros((len(mean), 0), dtype=np.float32))
    return Embedding(rows, idf, components, mean, float(tensors["scale"][0]))
