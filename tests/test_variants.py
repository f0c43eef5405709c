"""AbsTopK, GroupMax and sharded dictionaries against their definitions."""

from __future__ import annotations

import sys

import pytest
import torch

import saerl_kernels as sk
from tests.encoders import BACKENDS, assert_equal, integers
from tests.ranks import run_ranks

RANK = """
import sys, torch, torch.distributed as dist
import saerl_kernels as sk
from tests.encoders import assert_equal, integers
dist.init_process_group("gloo")
rank = dist.get_rank()
x, encoder = integers(7, 9, 90, low=-12)
edges = [0, 5, 60, 90]  # the first shard has fewer features than k
mine = slice(edges[rank], edges[rank + 1])
shard = sk.PackedEncoder(encoder.weight[mine], encoder.bias[mine])
got = sk.encode_topk_sharded(x, shard, edges[rank], 12)
assert_equal(got, sk.reference.encode_topk(x, encoder, 12))
deep = sk.encode_topk_sharded(x - 50, shard, edges[rank], 12)  # fillers come from the lowest features of all
assert_equal(deep, sk.reference.encode_topk(x - 50, encoder, 12))
try:
    sk.encode_topk_sharded(x, shard, rank, 12)  # the rank is no feature's number
except ValueError as error:
    assert "overlap" in str(error)
else:
    raise AssertionError("stretches that overlap were taken")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_abs_topk(backend):
    x, encoder = integers(11, 9, 70, permute=True)
    got = sk.encode_abs_topk(x, sk.pack_both_signs(encoder), 6, backend=backend)
    pre = sk.reference.pre_activations(x, encoder)
    magnitudes = sk.reference.topk(pre.abs(), 6)
    assert torch.equal(got.indices, magnitudes.indices)
    assert torch.equal(got.values, pre.gather(1, magnitudes.indices.long()))
    assert bool((got.values < 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_max(backend):
    x, encoder = integers(11, 9, 70, permute=True)
    x[4, 2] = torch.nan
    got = sk.encode_group_max(x.view(1, 11, 9), encoder, 7, backend=backend)
    pre = sk.reference.pre_activations(x, encoder)
    pre = torch.where(pre > 0, pre, 0.0).view(11, 7, 10)
    best = sk.reference.topk(pre, 1)
    assert torch.equal(got.values[0], best.values[..., 0])
    assert torch.equal(got.indices[0], best.indices[..., 0] + 10 * torch.arange(7, dtype=torch.int32))
    assert sk.encode_group_max(x[:0], encoder, 7, backend=backend).values.shape == (0, 7)
    with pytest.raises(ValueError, match="must divide d_sae=70"):
        sk.encode_group_max(x, encoder, 8)


@pytest.mark.parametrize("low", [-40, -12, 5])
@pytest.mark.parametrize("edges", [[0, 35, 70], [0, 1, 2, 70], [0, 10, 30, 50, 70]], ids=str)
def test_merged_shards_are_the_whole(edges, low):
    x, encoder = integers(11, 9, 70, low=low)
    parts = []
    for first, stop in reversed(list(zip(edges, edges[1:], strict=False))):
        shard = sk.PackedEncoder(encoder.weight[first:stop], encoder.bias[first:stop])
        kept = sk.encode_topk(x, shard, min(12, stop - first))
        parts.append(sk.TopK(kept.values, kept.indices + first))
    assert_equal(sk.merge_topk(parts, 12), sk.reference.encode_topk(x, encoder, 12))


def test_three_processes_give_what_one_gives():
    run_ranks([sys.executable, "-c", RANK], 3, 200)


def test_what_does_not_fit_is_refused():
    x, encoder = integers(5, 9, 70)
    both = sk.pack_both_signs(encoder)
    assert_equal(sk.encode_abs_topk(x, both.to(torch.float32), 4), sk.encode_abs_topk(x, both, 4))
    with pytest.raises(ValueError, match="pack_both_signs"):
        sk.encode_abs_topk(x, encoder, 4)  # which would halve every feature's number
    whole = sk.encode_topk(x, encoder, 4)
    for parts in (whole, [], [tuple(whole)]):
        with pytest.raises(ValueError, match="list of one TopK or more"):
            sk.merge_topk(parts, 4)
    with pytest.raises(ValueError, match="different rows"):
        sk.merge_topk([whole, sk.encode_topk(x[:2], encoder, 4)], 4)
