"""Which algorithm and which tile: a table where something was measured, a heuristic elsewhere."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import triton

from ..dispatch import interpreting, screening
from ..pack import PackedEncoder

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
TABLE = os.path.join(os.path.dirname(__file__), "tuned.json")


class Plan(NamedTuple):
    """How ``encode_topk`` runs."""

    algorithm: str  # "groups", "chunked" or "screen" (groups of bounds); "above" of a threshold encoder
    T: int = 2  # groups: entries kept per group; the next one is their bound
    size: int = 32  # groups: features of a group, 32 or 64; BN is a multiple of four times as many
    BM: int = 128  # groups: rows and columns of a tile; chunked: of a block of scores, held in L2
    BN: int = 256
    BK: int = 64  # groups: depth of a step; chunked: columns a program gates at once
    BAND: int = 8
    warps: int = 8
    stages: int = 3
    tree: bool = True  # how a group's largest are found: a merging tree in registers, or reductions
    loop: str = "plain"  # groups: a program a tile; "nested", "fused", "specialised": see persistent.py


LOOPS = {"plain": (8, 3), "nested": (8, 4), "fused": (8, 4), "specialised": (4, 4)}  # warps and stages


def with_loop(plan: Plan, loop: str) -> Plan:
    """``plan`` of a tile of 128 x 256 with the warps and stages of ``loop``."""
    if loop == plan.loop:
        return plan
    warps, stages = LOOPS[loop]
    return plan._replace(loop=loop, warps=warps, stages=stages)


def reopened(d_sae: int, k: int, T: int, size: int) -> float:
    """Expected groups to re-open per row when the winners lie anywhere: the Poisson tail P[> T] x groups."""
    rate = size * k / d_sae
    term, head = 1.0, 0.0
    for j in range(T + 1):
        head += term
        term *= rate / (j + 1)
    return d_sae / size * max(0.0, 1.0 - head * math.exp(-rate))


def plan_encode(n: int, encoder: PackedEncoder, k: int) -> Plan:
    """The measured plan of this GPU and shape where ``tuned.json`` has one, else a heuristic.

    The heuristic: groups need few winners per group, so past one re-opened group in four rows, and for
    float32 weights that are not screened (they have no tensor cores), the chunked path does less work.
    """
    bits = encoder.weight.element_size() * 8
    if not interpreting():
        plan = tuned(torch.cuda.get_device_name(encoder.device), bits, encoder.d_in, encoder.d_sae, k, n)
        if plan is not None:
            return plan
    plan = groups_plan(encoder, k) if interpreting() or bits < 32 else screen_plan(n, encoder, k)
    return chunked_plan(n, encoder.d_sae) if plan is None else plan


def groups_plan(encoder: PackedEncoder, k: int, least: Optional[Tuple[int, int]] = None) -> Optional[Plan]:
    """The groups' tile of this device, for any number of rows: no row's bits depend on the others.

    ``least``: T and size where none re-opens few enough groups; without it None.
    """
    if interpreting():
        kept = fewest_kept(encoder.d_sae, k, (32,)) or least
        return kept and Plan("groups", *kept, BM=16, BN=128, BK=32, warps=4)
    major, minor = torch.cuda.get_device_capability(encoder.device)
    bits, arch = encoder.weight.element_size() * 8, major * 10 + minor
    kept = fewest_kept(encoder.d_sae, k, sizes(bits, arch)) or least
    plan = kept and gpu_plan(bits, kept, arch)
    # Up to three steps are unrolled there, which puts 24 to 48 bytes on the stack.
    return with_loop(plan, "plain") if plan and plan.loop == "nested" and encoder.d_in < 256 else plan


def screen_plan(n: int, encoder: PackedEncoder, k: int) -> Optional[Plan]:
    """The groups' tile for the bounds of a float32 encoder; None: not screened.

    Predicted, not measured (NOTES.md): it pays where bfloat16 is more than ten times as fast as float32 (two
    to four times with compute capability 8.6, 8.9 and 12.0), for enough rows and features, and up to a d_in
    past which the margin leaves too many. It waits for the device, which capturing a CUDA graph forbids.
    """
    if not screening() or torch.version.hip is not None or torch.cuda.is_current_stream_capturing():
        return None
    major, minor = torch.cuda.get_device_capability(encoder.device)
    arch = major * 10 + minor
    if arch not in (80, 90, 100, 103) or n < 64 or not 256 <= encoder.d_in <= 6144 or encoder.d_sae < 4096:
        return None
    # At d_in 4096 this many candidates were simulated; opened groups add at most k.
    kept = fewest_kept(encoder.d_sae, k + 16 * math.isqrt(k), sizes(16, arch), k / 64)
    return kept and gpu_plan(16, kept, arch)._replace(algorithm="screen")


def plan_above(encoder: PackedEncoder) -> Optional[Plan]:
    """The tile of a threshold encoder whose product and threshold are one kernel; None: torch's product.

    None for float32 weights, which have no tensor cores: there cuBLAS is the faster, as in ``plan_encode``.
    Tiles of 256 columns spill (NOTES.md).
    """
    if encoder.d_sae >= 1 << 24:  # offsets inside a tile of 128 rows would pass 2^31
        return None
    if interpreting():
        return Plan("above", BM=16, BN=128, BK=32, warps=4)
    bits = encoder.weight.element_size() * 8
    if bits == 32:
        return None
    major, minor = torch.cuda.get_device_capability(encoder.device)
    return above_plan(major * 10 + minor)


def above_plan(arch: int) -> Plan:
    return with_loop(gpu_plan(16, (2, 32), arch), "plain")._replace(algorithm="above", BN=128)


def fewest_kept(d_sae: int, k: int, of: Tuple[int, ...], most: float = 0.25) -> Optional[Tuple[int, int]]:
    """T and size, the cheapest first, that re-open at most ``most`` groups a row; None where none does.

    What a re-opened group costs is estimated in NOTES.md.
    """
    return next((pair for pair in pairs(of) if reopened(d_sae, k, *pair) <= most), None)


def pairs(of: Tuple[int, ...]) -> List[Tuple[int, int]]:
    """T and size, the cheapest first, of groups of these sizes that leave sm_90 without a stack."""
    return [(T, size) for T in (1, 2, 3) for size in of if T * size < 192]


def sizes(bits: int, arch: int) -> Tuple[int, ...]:
    """Sizes of groups: a thread of a Hopper tile holds 64 columns of a row."""
    return (64, 32) if bits < 32 and 90 <= arch < 100 else (32,)


def gpu_plan(bits: int, kept: Tuple[int, int], arch: int) -> Plan:
    """Tiles for weights of ``bits`` bits on compute capability ``arch``: they compile without spills."""
    if bits == 32:
        return Plan("groups", *kept, BM=64, BN=128, BK=32, warps=8, stages=2, tree=False)
    if not 90 <= arch < 120:  # sm_120 has no matrix instructions of a warp group either, and 99 KB as sm_89
        return Plan("groups", *kept, BM=128, BN=128, BK=32, warps=8, stages=4, tree=False)
    return with_loop(Plan("groups", *kept), loops(kept[0], arch)[0])


def loops(T: int, arch: int) -> Tuple[str, ...]:
    """The loops that compile without spills on compute capability ``arch``, the default first.

    "specialised" becomes the default where a tuning run has found it the fastest: what the compiler makes of
    it has barriers of its own, which only a GPU can show to be right.
    """
    if T > 2 or not 90 <= arch < 120 or TRITON < (3, 7):
        return ("plain",)
    return ("fused", "specialised", "plain") if arch < 100 else ("nested", "plain")


def chunked_plan(n: int, d_sae: int) -> Plan:
    """Blocks of 2^22 scores: 16 MB, which leaves room in L2 for the x and weight that make them."""
    rows = min(2048, 1 << (n - 1).bit_length())
    columns = min((1 << 22) // rows, 1 << 15, 1 << (d_sae - 1).bit_length())
    return Plan("chunked", BM=rows, BN=columns, BK=512, warps=4)


def candidates(d_sae: int, k: int, arch: int) -> List[Plan]:
    """The plans that a tuning run times for 16-bit weights."""
    blocks = ((2048, 2048), (4096, 1024), (4096, 2048), (2048, 4096), (1024, 8192))
    plans = [Plan("chunked", BM=BM, BN=BN, BK=512, warps=4) for BM, BN in blocks]
    plans += [plans[0]._replace(BK=BK, warps=warps) for BK, warps in ((512, 2), (1024, 4), (2048, 8))]
    for kept in pairs(sizes(16, arch)):
        if reopened(d_sae, k, *kept) > 1:
            continue
        if not 90 <= arch < 120:
            plans += [gpu_plan(16, kept, arch), gpu_plan(16, kept, arch)._replace(stages=3)]
            continue
        plans += [with_loop(Plan("groups", *kept), loop) for loop in loops(kept[0], arch)]
        plans.append(Plan("groups", *kept, stages=4))
    return plans


@functools.lru_cache(maxsize=None)
def table() -> Dict[str, Any]:
    """GPU name -> rows of {bits, d_in, d_sae, k, n, plan}, written by ``benchmarks/tune_encode.py``."""
    try:
        with open(TABLE) as file:
            return json.load(file)
    except OSError:
        return {}


@functools.lru_cache(maxsize=4096)
def tuned(gpu: str, bits: int, d_in: int, d_sae: int, k: int, n: int) -> Optional[Plan]:
    """The plan measured for this shape at the nearest number of rows, if any."""
    shape = (bits, d_in, d_sae, k)
    rows = [r for r in table().get(gpu, []) if (r["bits"], r["d_in"], r["d_sae"], r["k"]) == shape]
    if not rows:
        return None
    return Plan(**min(rows, key=lambda row: abs(math.log(row["n"] / n)))["plan"])
