"""Time every candidate plan of the fused encoder on this GPU and store the winners.

    python -m benchmarks.tune_encode [SECONDS]

writes kernels/torch-ext/saerl_kernels/_triton/tuned.json, which ``backend="triton"`` reads. Shapes come in
the order of the benchmark grid and those left when SECONDS (default 240) are over keep the heuristic. A plan
whose result differs from torch's is an error, not a candidate.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import saerl_kernels
from benchmarks.bench_encode import GPU_GRID, Shape
from benchmarks.harness import timed
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


def tune(shapes: list[Shape], seconds: float, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the table for as many shapes as ``seconds`` allow."""
    from saerl_kernels._triton.tune import candidates

    stop = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability(device)
    rows = []
    for shape in shapes:
        if time.monotonic() > stop:
            break
        g = torch.Generator(device).manual_seed(0)
        at = {"generator": g, "device": device}
        x = torch.randn(shape.batch, shape.d_in, **at).bfloat16()
        W = (torch.randn(shape.d_in, shape.d_sae, **at) / shape.d_in**0.5).bfloat16()
        encoder = pack_encoder(W, torch.zeros(shape.d_sae, device=device))
        plans = candidates(shape.d_sae, shape.k, major * 10 + minor)
        plan, milliseconds = best_plan(x, encoder, shape.k, plans)
        rows.append(
            {
                "bits": 16,
                "d_in": shape.d_in,
                "d_sae": shape.d_sae,
                "k": shape.k,
                "n": shape.batch,
                "ms": milliseconds,
                "plan": plan._asdict(),
            }
        )
    return rows


def main() -> None:
    from saerl_kernels._triton.tune import TABLE, table

    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    device = torch.device("cuda")
    # The middle batch first: a cut-short run then still has every width and k.
    shapes = sorted(GPU_GRID, key=lambda s: (s.batch != 4096, s.batch))
    found = dict(table())
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 240.0
    found[torch.cuda.get_device_name()] = tune(shapes, seconds, device)
    Path(TABLE).write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
