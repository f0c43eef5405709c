"""The fastest plan of the fused encoder for a shape on this GPU: the tuning part of gpu.py.

Its table takes the place of kernels/torch-ext/saerl_kernels/_triton/tuned.json, which ``backend="triton"``
reads. A plan whose result differs from torch's is an error, not a candidate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import saerl_kernels
from benchmarks.bench_encode import Shape
from benchmarks.harness import DEVICE, timed
from saerl_fast.fileio import write_json
from saerl_kernels import PackedEncoder, pack_encoder


def best_plan(
    x: torch.Tensor, encoder: PackedEncoder, k: int, plans: list, rounds: int = 7
) -> tuple[Any, float]:
    """(fastest plan, its milliseconds): the least time of ``rounds``, taken in turn."""
    from saerl_kernels._triton import encode_topk

    want = saerl_kernels.encode_topk(x, encoder, k, backend="torch")
    flush = torch.empty(1 << 26, device=x.device) if x.is_cuda else None
    best = {}
    for plan in plans:
        try:
            got = encode_topk(x, encoder, k, plan)
        except Exception as err:  # a tile that does not fit this chip or this Triton
            sys.stderr.write(f"{plan}: {type(err).__name__}\n")
            continue
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)
        best[plan] = float("inf")
    for _ in range(rounds):
        for plan in best:
            seconds = timed(lambda plan=plan: encode_topk(x, encoder, k, plan), x.device, flush)
            best[plan] = min(best[plan], seconds * 1e3)
    winner = min(best, key=lambda plan: best[plan])
    return winner, best[winner]


def tune(shape: Shape, device: torch.device = DEVICE) -> dict[str, Any]:
    """A row of the table: the fastest plan of ``shape`` in bfloat16."""
    from saerl_kernels._triton.tune import candidates

    major, minor = torch.cuda.get_device_capability(device)
    g = torch.Generator(device).manual_seed(0)
    at = {"generator": g, "device": device}
    x = torch.randn(shape.batch, shape.d_in, **at).bfloat16()
    W = (torch.randn(shape.d_in, shape.d_sae, **at) / shape.d_in**0.5).bfloat16()
    encoder = pack_encoder(W, torch.zeros(shape.d_sae, device=device))
    plan, milliseconds = best_plan(x, encoder, shape.k, candidates(shape.d_sae, shape.k, major * 10 + minor))
    sizes = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "n": shape.batch}
    return {"bits": 16, **sizes, "ms": milliseconds, "plan": plan._asdict()}


def keep_row(path: Path, gpu: str, row: dict[str, Any]) -> None:
    """Add ``row`` to the table in ``path``, which starts as the one that is installed."""
    from saerl_kernels._triton.tune import table

    found = json.loads(path.read_text()) if path.is_file() else dict(table())
    found[gpu] = [r for r in found.get(gpu, []) if _key(r) != _key(row)] + [row]
    write_json(path, found)


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("bits", "d_in", "d_sae", "k", "n"))
