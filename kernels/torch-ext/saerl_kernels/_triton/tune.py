"""Which algorithm and which tile: a table where something was measured, a heuristic elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dispatch import interpreting
from ..pack import PackedEncoder
from .groups import GROUP


class Plan(NamedTuple):
    """How ``encode_topk`` runs."""

    algorithm: str  # "groups" or "dense"
    T: int = 3  # entries kept per group
    BM: int = 128
    BN: int = 256
    BK: int = 64
    BAND: int = 8
    warps: int = 8
    stages: int = 3
    tree: bool = True  # how a group's largest are found: a merging tree in registers, or reductions


def reopened(d_sae: int, k: int, T: int) -> float:
    """Expected groups to re-open per row when the winners lie anywhere: the Poisson tail P[>= T] x groups."""
    rate = GROUP * k / d_sae
    term, head = 1.0, 0.0
    for j in range(T):
        head += term
        term *= rate / (j + 1)
    return d_sae / GROUP * max(0.0, 1.0 - head * 2.718281828459045**-rate)


def plan_encode(n: int, encoder: PackedEncoder, k: int) -> Plan:
    """Nothing here has been measured on a GPU yet; the tiles are those that compile without spills.

    Groups need few winners per group: past one re-opened group in two rows the dense path does less work.
    """
    for T in (3, 4):
        if reopened(encoder.d_sae, k, T) <= 0.5:
            break
    else:
        return Plan("dense")
    if interpreting():
        return Plan("groups", T, BM=16, BN=128, BK=32, warps=4)
    major, minor = torch.cuda.get_device_capability(encoder.device)
    return gpu_plan(encoder.weight.element_size() * 8, T, major * 10 + minor)


def gpu_plan(bits: int, T: int, arch: int) -> Plan:
    """Tiles for weights of ``bits`` bits on compute capability ``arch``."""
    if bits == 32:  # no tensor cores: float32 products are exact in their rounding, and slow
        return Plan("groups", T, BM=64, BN=128, BK=32, warps=8, stages=2, tree=False)
    if arch < 90:
        return Plan("groups", T, BM=128, BN=128, BK=32, warps=8, stages=4, tree=False)
    return Plan("groups", T)
