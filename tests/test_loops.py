"""The loops of the scoring pass: all write the same, and the plain one stands in where another cannot run."""

from __future__ import annotations

import pytest
import torch
import triton

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton import device as launching
from saerl_kernels._triton import persistent, tune
from saerl_kernels._triton.tune import Plan
from tests.encoders import assert_equal, integers, poison  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tiles are the interpreter's"),
]


def tile(loop: str, T: int = 2, size: int = 32, BN: int = 128, tree: bool = True) -> Plan:
    return Plan("groups", T, size, BM=16, BN=BN, BK=32, warps=4, tree=tree, loop=loop)


def scored(x: torch.Tensor, encoder: sk.PackedEncoder, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    groups = triton.cdiv(encoder.d_sae, 4 * plan.size) * 4
    bits = torch.full((x.shape[0], plan.T + 1, groups), -7, dtype=torch.int32)
    place = torch.full((x.shape[0], plan.T, groups), -7, dtype=torch.int8)
    persistent.score_groups(x, encoder, bits, place, plan)
    return bits, place


@pytest.fixture
def no_plain_loop(monkeypatch):
    monkeypatch.setattr(persistent, "_score_groups_kernel", None)


@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "T", "size", "BN"),
    [
        (5, 4, 120, 1, 32, 128),  # one part of one column block
        (17, 36, 397, 2, 32, 128),  # nothing is a multiple of its block
        (16, 64, 1024, 2, 32, 256),  # two chunks of groups a tile, half of the last one empty
        (33, 40, 1100, 1, 64, 256),
        (3, 32, 4097, 2, 64, 256),  # an odd number of quads
        (20, 8, 1000, 3, 32, 128),
    ],
    ids=str,
)
def test_the_loops_write_the_same(monkeypatch, n, d_in, d_sae, T, size, BN):
    x, encoder = integers(n, d_in, d_sae, low=-9)
    want = scored(x, encoder, tile("plain", T, size, BN))
    assert (want[0] != -7).all() and (want[1] != -7).all()
    monkeypatch.setattr(persistent, "_score_groups_kernel", None)
    for programs in (2, 5):
        monkeypatch.setattr(persistent, "processors", lambda device, programs=programs: programs)
        for loop in ("nested", "fused"):
            bits, place = scored(x, encoder, tile(loop, T, size, BN))
            assert torch.equal(bits, want[0]) and torch.equal(place, want[1])


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "reductions"])
@pytest.mark.parametrize("case", ["ties", "nan", "zeros", "one group", "negative", "permuted"])
def test_encoding_by_the_fused_loop(no_plain_loop, case, tree):
    """Whatever is hidden, re-opening finds it."""
    x, encoder = integers(9, 12, 500, low=-90 if case == "negative" else -9, permute=case == "permuted")
    if case == "ties":
        encoder.weight[:] = encoder.weight[torch.arange(500) // 8]
        encoder.bias[:] = 3.0
    elif case == "nan":
        x[1, :3], x[4, 0], encoder.bias[70:73] = torch.nan, torch.inf, torch.nan
        encoder.bias[5] = torch.inf
    elif case == "zeros":
        x[:] = 0.0
    elif case == "one group":
        encoder.bias[4:250:4] += 200.0
    got = triton_backend.encode_topk(x, encoder, 20, tile("fused", 1, tree=tree))
    assert_equal(got, sk.reference.encode_topk(x, encoder, 20))


def test_what_descriptors_cannot_hold_takes_the_plain_loop(monkeypatch):
    monkeypatch.setattr(persistent, "_score_tiles_kernel", None)
    unaligned = torch.zeros(7 * 12 + 1)[1:].view(7, 12)  # starts 4 bytes behind a multiple of 16
    for d_in, d_sae, rows in ((7, 500, None), (12, 500, unaligned), (12, 40, None)):
        x, encoder = integers(7, d_in, d_sae)
        x = x if rows is None else rows.copy_(x)
        got = triton_backend.encode_topk(x, encoder, 9, tile("fused"))
        assert_equal(got, sk.reference.encode_topk(x, encoder, 9))


def test_an_allocator_that_was_set_stays(monkeypatch):
    """The launch sees ours, the program that called keeps its own."""
    from triton.runtime import _allocation

    def mine(size, alignment, stream):
        raise AssertionError

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(_allocation._allocator.get())

    monkeypatch.setattr(persistent, "_score_tiles_kernel", Kernel())
    before = _allocation._allocator.get()
    triton.set_allocator(mine)
    try:
        scored(*integers(3, 8, 300), tile("fused"))
        assert seen == [persistent._allocate] and _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(before)


def test_a_loop_that_does_not_compile_is_replaced_and_said_once(monkeypatch):
    x, encoder = integers(4, 16, 3000)
    monkeypatch.setattr(triton_backend, "plan_encode", lambda n, encoder, k: tile("specialised"))
    monkeypatch.setattr(launching, "_refused", set())
    ran = []
    real = triton_backend.score_groups

    def score(x, encoder, bits, place, plan):
        ran.append(plan.loop)
        if plan.loop != "plain":
            raise RuntimeError("PassManager::run failed")
        real(x, encoder, bits, place, plan)

    monkeypatch.setattr(triton_backend, "score_groups", score)
    want = sk.reference.encode_topk(x, encoder, 5)
    with pytest.warns(UserWarning, match="does not launch .*PassManager") as said:
        assert_equal(triton_backend.encode_topk(x, encoder, 5), want)
    assert_equal(triton_backend.encode_topk(x, encoder, 5), want)  # a warning would be an error here
    assert ran == ["specialised", "plain", "plain"]
    # NumPy warns of Triton 3.6's interpreter as well.
    assert ["does not launch" in str(one.message) for one in said].count(True) == 1

    def broken(*args):
        raise RuntimeError("an error of the device")

    monkeypatch.setattr(triton_backend, "score_groups", broken)
    with pytest.raises(RuntimeError, match="of the device"):
        triton_backend.encode_topk(x, encoder, 6)


def test_loops_by_architecture(monkeypatch):
    monkeypatch.setattr(tune, "TRITON", (3, 7))
    first = {arch: tune.gpu_plan(16, (2, 32), arch).loop for arch in (80, 89, 90, 100, 120)}
    assert first == {80: "plain", 89: "plain", 90: "fused", 100: "nested", 120: "plain"}
    assert tune.gpu_plan(16, (3, 32), 90).loop == "plain"  # more would be kept than registers hold
    assert {plan.loop for plan in tune.candidates(65536, 64, 90)} == {"plain", "fused", "specialised"}
    assert tune.above_plan(90).loop == "plain" and tune.above_plan(90).stages == 3
    monkeypatch.setattr(tune, "TRITON", (3, 6))
    assert tune.gpu_plan(16, (2, 64), 90) == Plan("groups", 2, 64)


def test_few_steps_take_the_plain_loop(monkeypatch):
    """The nested one spills there (kernels/NOTES.md)."""
    monkeypatch.setattr(tune, "TRITON", (3, 7))
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    encoders = {d_in: sk.pack_encoder(torch.zeros(d_in, 4096).bfloat16()) for d_in in (192, 256)}
    plans = {d_in: tune.groups_plan(encoder, 8) for d_in, encoder in encoders.items()}
    assert plans == {192: Plan("groups", 1), 256: tune.with_loop(Plan("groups", 1), "nested")}
