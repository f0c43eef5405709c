"""``plan.json``: a plan anyone can read, checked by its hash when it is loaded again.

One object: format, version, schedule, seed, batch_size, total_steps, config (plan.* settings), notes,
prompts (id and scores of every prompt in the plan), dropped (the others, with the reason), batches
(ids, all ``total_steps`` of a static schedule; null for adaptive), tensors (name and SHA-256 of the
safetensors file beside it, which holds the adaptive schedule's features) and sha256 of the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import PlanConfig, from_dict, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, read_json, write_text
from saerl_fast.plan.adaptive import AdaptivePlan, Embedding
from saerl_fast.plan.base import Plan
from saerl_fast.plan.static import StaticPlan

FORMAT, VERSION = "saerl-plan", 1
COLUMNS = {"cluster": np.int32, "difficulty": np.float32, "quality": np.float32, "pass_rate": np.float32}
AGAIN = "make it again with `saerl plan`"


def save_plan(plan: Plan, path: str | Path) -> Path:
    """Write ``plan`` (its start, not its place) to ``path``."""
    path = Path(path)
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "schedule": plan.schedule,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "total_steps": plan.total_steps,
        "config": to_dict(plan.cfg),
        "notes": plan.notes,
        "prompts": _records(plan.prompt_ids, plan.table),
        "dropped": _records(list(plan.dropped), plan.dropped_table, list(plan.dropped.values())),
        "batches": None,
        "tensors": None,
    }
    if isinstance(plan, StaticPlan):
        rows = [plan.batch_rows(i) for i in range(plan.total_steps)]
        body["batches"] = [[plan.prompt_ids[i] for i in batch] for batch in rows]
    elif isinstance(plan, AdaptivePlan):
        file = path.with_suffix(".safetensors")
        _write_embedding(plan.embedding, file, with_projection=plan.cfg.adaptive.refresh_features)
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
    if body.get("version") != VERSION:
        raise SaerlError(f"{path} has version {body.get('version')!r}, this release reads {VERSION}; {AGAIN}")
    if body.get("sha256") != _content_hash(body):
        raise SaerlError(f"{path} was changed or damaged: its content does not match its sha256; {AGAIN}")
    schedule = body.get("schedule")
    if not isinstance(schedule, str) or not re.fullmatch(r"\w[\w.:-]{0,199}", schedule) or ".." in schedule:
        raise SaerlError(f"{path} has no schedule's name but {schedule!r:.60}; {AGAIN}")
    cfg = from_dict(PlanConfig, body["config"])
    ids, table = _columns(body["prompts"])
    out, dropped_table = _columns(body["dropped"])
    common: dict[str, Any] = {
        "batch_size": body["batch_size"],
        "total_steps": body["total_steps"],
        "seed": body["seed"],
        "table": table,
        "dropped": dict(zip(out, (record["reason"] for record in body["dropped"]), strict=True)),
        "dropped_table": dropped_table,
        "notes": body["notes"],
    }
    if body["schedule"] != "adaptive":
        row = {name: i for i, name in enumerate(ids)}
        batches = [[row[name] for name in batch] for batch in body["batches"]]
        return StaticPlan(body["schedule"], ids, cfg, batches=batches, **common)
    name = body["tensors"]["file"]
    if not isinstance(name, str) or not name or Path(name).name != name or not name.isprintable():
        raise SaerlError(f"{path} names no file beside it but {name!r:.60}; {AGAIN}")
    file = path.parent / name
    if not file.is_file():
        raise SaerlError(f"{file} is missing: it belongs beside {path}; {AGAIN}")
    if _file_hash(file) != body["tensors"]["sha256"]:
        raise SaerlError(f"{file} was changed or damaged: it does not match the hash in {path}; {AGAIN}")
    return AdaptivePlan(ids, cfg, embedding=_read_embedding(file), **common)


def _records(ids: list[str], table: dict[str, np.ndarray], reasons: list[str] | None = None) -> list[dict]:
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
        if key in ("prompts", "dropped", "batches") and value:
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


def _write_embedding(embedding: Embedding, path: Path, with_projection: bool) -> None:
    from safetensors.numpy import save_file

    tensors = {"rows": np.ascontiguousarray(embedding.rows), "mean": embedding.mean}
    tensors["scale"] = np.array([embedding.scale], dtype=np.float64)
    if with_projection:  # large, and needed only to embed features seen during the run
        tensors |= {"idf": embedding.idf, "components": np.ascontiguousarray(embedding.components)}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "saerl-plan-tensors-1"})


def _read_embedding(path: Path) -> Embedding:
    from safetensors.numpy import load_file

    tensors = load_file(str(path))
    rows, mean = tensors["rows"], tensors["mean"]
    idf = tensors.get("idf", np.zeros(0, dtype=np.float32))
    components = tensors.get("components", np.zeros((len(mean), 0), dtype=np.float32))
    return Embedding(rows, idf, components, mean, float(tensors["scale"][0]))
