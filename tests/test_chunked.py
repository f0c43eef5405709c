"""The chunked encoder: exact whatever the dictionary, however small its buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton import chunked
from saerl_kernels._triton.tune import Plan, candidates, chunked_plan
from tests.encoders import assert_equal, float64_topk, integers, poison  # noqa: F401

pytestmark = pytest.mark.usefixtures("poison")
CPU_ONLY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels take CPU memory in the interpreter only"
)


def small(BM: int = 8, BN: int = 128, BK: int = 32) -> Plan:
    return Plan("chunked", BM=BM, BN=BN, BK=BK, warps=4)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest buffers that are allowed."""
    monkeypatch.setattr(chunked, "slots", lambda k, block: 1 << (k + block - 1).bit_length())


def run(x: torch.Tensor, encoder: sk.PackedEncoder, k: int, plan: Plan, device: torch.device) -> sk.TopK:
    return triton_backend.encode_topk(encoder.to(device).prepare(x.to(device)), encoder.to(device), k, plan)


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k", "plan"),
    [
        (5, 37, 211, 7, small(3, 64, 16)),  # the last chunk is not full, nor is its last tile
        (17, 13, 131, 1, small(8, 32)),
        (3, 7, 29, 29, small(4, 16)),  # k = d_sae
        (1, 64, 1031, 32, small(1, 1024, 128)),  # the last chunk holds seven columns
        (2, 3, 1, 1, small()),
        (3, 5, 130, 65, small(4, 43, 16)),  # chunks that are no power of two
    ],
    ids=str,
)
def test_equals_float64(n, d_in, d_sae, k, plan, permute, device):
    x, encoder = integers(n, d_in, d_sae, permute=permute)
    assert_equal(run(x, encoder, k, plan, device), float64_topk(x, encoder, k))


LAYOUTS = ["ascending", "descending", "one_tile", "duplicates", "matryoshka", "equal", "negative", "outlier"]


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adversaries_in_the_smallest_buffers(layout, permute, tight, device):
    """Dictionaries that fill buffers as fast as can be. Their 64 slots would not do for 500."""
    x, encoder = integers(5, 6, 500, low=-9)
    W, bias = encoder.weight.t().clone(), encoder.bias.clone()
    if layout == "ascending":  # every tile beats all before it
        bias = torch.arange(500) + 1000.0
    elif layout == "descending":
        bias = 1000.0 - torch.arange(500)
    elif layout == "one_tile":
        bias[256:288] += 200.0
    elif layout == "duplicates":
        W, bias = W[:, torch.arange(500) // 50], bias[torch.arange(500) // 50] + 30
    elif layout == "matryoshka":
        bias += torch.arange(500).flip(0) // 4
    elif layout == "equal":
        W, bias = torch.zeros_like(W), torch.ones(500)
    elif layout == "negative":
        bias -= 1000.0
    else:
        bias[377] = 2.0**100
    encoder = sk.pack_encoder(W, bias, permute=permute)
    assert_equal(run(x, encoder, 20, small(), device), float64_topk(x, encoder, 20))


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_ties_across_chunks(permute, tight, device):
    """Few values, each in every chunk: the bound is a tie that only the feature number settles."""
    bias = (torch.arange(400) * 7 % 5).float()
    encoder = sk.pack_encoder(torch.zeros(3, 400), bias, permute=permute)
    for k in (1, 80, 81, 159):
        assert_equal(
            run(torch.zeros(2, 3), encoder, k, small(), device), float64_topk(torch.zeros(2, 3), encoder, k)
        )


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_odd_values(permute, tight, device):
    inf, nan = float("inf"), float("nan")
    bias = torch.linspace(-1, 1, 200)
    bias[[3, 77, 150]], bias[[5, 120]], bias[[6, 180]], bias[[9, 10]] = inf, nan, -inf, 2.0**-149
    encoder = sk.pack_encoder(torch.zeros(3, 200), bias, permute=permute)
    want = float64_topk(torch.zeros(2, 3), encoder, 110)
    assert want.indices[0, :3].tolist() == [3, 77, 150] and want.values[0, -1] == 0.0
    assert 2.0**-149 in want.values[0].tolist()
    assert_equal(run(torch.zeros(2, 3), encoder, 110, small(), device), want)
    x = torch.tensor([[nan, 0, 0], [inf, 0, 0.0]])
    got = run(x, sk.pack_encoder(torch.eye(3).repeat(1, 30), permute=permute), 4, small(), device)
    assert got.values.tolist() == [[0.0] * 4, [inf] * 4]
    assert got.indices.tolist() == [[0, 1, 2, 3], [0, 3, 6, 9]]  # elsewhere inf * 0 is NaN


@CPU_ONLY
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "descending"])
def test_buffers_never_overflow(ascending, tight):
    """A row's keys stay in its slots, and the bound that the kernel reports is reached by k entries."""
    n, d_sae, k, plan = 3, 300, 9, small(3, 64, 16)
    bias = torch.arange(d_sae).float() + 1
    bias = bias if ascending else bias.flip(0)
    encoder = sk.pack_encoder(torch.zeros(2, d_sae), bias)
    counts_seen = []
    gate = chunked._gate_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                keys, count, limit = args[3], args[4], args[5]
                guarded = torch.full((n + 1, options["SLOTS"]), -5)
                guarded[:n] = keys
                gate[grid](*args[:3], guarded, *args[4:], **options)
                assert bool((guarded[n] == -5).all()), "the last row ran over"
                keys.copy_(guarded[:n])
                assert int(count.max()) <= options["SLOTS"]
                seen = bias[: args[9] + args[10]].view(torch.int32)
                if int(limit[0]):
                    assert int((seen >= limit[0]).sum()) >= k
                counts_seen.append(int(count[0]))

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_gate_kernel", Spy())
        got = triton_backend.encode_topk(torch.zeros(n, 2), encoder, k, plan)
    assert len(counts_seen) == 5 and counts_seen[-1] == k
    assert_equal(got, float64_topk(torch.zeros(n, 2), encoder, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scores_are_not_rounded_to_the_weights_dtype(dtype, device):
    x, weight = torch.randn(5, 64).to(device, dtype), torch.randn(33, 64).to(device, dtype)
    got = chunked.product(x, weight.t(), torch.empty((5, 33), device=device))
    assert got.dtype == torch.float32 and got.shape == (5, 33)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


def test_sixteen_bit_encoders(device):
    x, encoder = integers(4, 11, 150, dtype=torch.bfloat16, permute=True)
    assert_equal(run(x, encoder, 6, small(), device), float64_topk(x, encoder, 6))


def test_same_result_for_every_plan(device):
    """Row by row or together, in one chunk or in many: the same bits."""
    x, encoder = integers(6, 9, 333, permute=True)
    want = float64_topk(x, encoder, 12)
    for plan in (small(1, 333, 512), small(6, 17, 16), small(4, 128, 128)):
        assert_equal(run(x, encoder, 12, plan, device), want)


@CPU_ONLY
def test_indices_beyond_two_to_the_31(tmp_path):
    """Scores and buffers of more than 2^31 entries, of which a sparse file holds the few pages touched."""
    stride, slots, rows = 1 << 30, 32, [0, 1, 2]
    scores = torch.from_file(str(tmp_path / "scores"), shared=True, size=2 * stride + 64, dtype=torch.float32)
    for row in rows:
        scores[row * stride : row * stride + 20] = torch.arange(20).float() + row
    keys = torch.full((3, slots), -1)
    state = torch.zeros((3, 3), dtype=torch.int32)
    bias = torch.zeros(20)
    options = {"ROWS": 4, "BLOCK": 32, "TILES": 1, "SLOTS": slots, "PERMUTED": False, "num_warps": 1}
    chunked._gate_kernel[(1,)](scores, bias, bias, keys, *state, 3, 20, 0, 20, stride, 5, 5, **options)
    assert state[0].tolist() == [5, 5, 5]
    for row in rows:
        found = (keys[row, :5] >> 32).int().view(torch.float32)
        assert sorted(found.tolist()) == [15.0 + row, 16.0 + row, 17.0 + row, 18.0 + row, 19.0 + row]


@CPU_ONLY
def test_reopened_groups_beyond_two_to_the_31(tmp_path):
    """A dictionary of 2^20 features x 2304: its last group is multiplied again at offsets above 2^31."""
    from saerl_kernels._triton.groups import _reopen_kernel

    d_sae, d_in, k = 1 << 20, 2304, 2
    weight = torch.from_file(
        str(tmp_path / "weight"), shared=True, size=d_sae * d_in, dtype=torch.float16
    ).view(d_sae, d_in)
    weight[d_sae - 1] = 1.0
    groups = d_sae // 32
    bits = torch.zeros((1, 2, groups), dtype=torch.int32)
    place = torch.zeros((1, 1, groups), dtype=torch.int8)
    last = groups - 1  # the group of the last feature, at its last position
    bits[0, 1, last] = -1
    kept = torch.tensor([3.0]).view(torch.int32)
    keys = torch.zeros((1, k), dtype=torch.int64)
    keys[0, 0] = (int(kept) << 32) | (0x7FFFFFFF - last)
    count, opened = torch.ones(2, 1, dtype=torch.int32)
    options = {"D": d_in, "T": 1, "SIZE": 32, "KP": 32, "BM": 16, "BK": 256, "BG": 256, "UPCAST": True}
    values, indices = torch.zeros(2, 1, k, dtype=torch.int32)
    bias = torch.zeros(d_sae)
    x = torch.ones(1, d_in, dtype=torch.float16)
    args = (bits, place, keys, count, opened, values, indices, d_sae, groups, k)
    _reopen_kernel[(1,)](x, weight, bias, bias, *args, **options, PERMUTED=False, COUNT=True)
    assert values.view(torch.float32).tolist() == [[d_in, 3.0]] and indices.tolist() == [[d_sae - 1, last]]


@settings(max_examples=12)
@given(st.data())
def test_fuzz_every_plan(data):
    draw = data.draw
    d_sae = draw(st.integers(1, 160))
    k = draw(st.integers(1, min(d_sae, 33)))
    options = {"low": draw(st.sampled_from([-200, -40, 5])), "permute": draw(st.booleans())}
    x, encoder = integers(draw(st.integers(1, 6)), 7, d_sae, seed=draw(st.integers(0, 99)), **options)
    for j in draw(st.lists(st.integers(0, d_sae - 1), max_size=4)):
        encoder.bias[j] = draw(st.sampled_from([float("inf"), float("nan"), -float("inf"), 2.0**90]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    T, size = draw(st.integers(1, 3)), draw(st.sampled_from([32, 64]))
    groups = Plan("groups", T, size, BM=16, BN=4 * size, BK=32, warps=4, tree=draw(st.booleans()))
    chunks = small(draw(st.integers(1, 6)), draw(st.integers(1, 170)), draw(st.sampled_from([16, 64])))
    want = float64_topk(x, encoder, k)
    for plan in (groups, chunks):
        assert_equal(run(x, encoder, k, plan, device), want)


def test_plans_fit_their_shapes():
    for n in (1, 3, 1000, 2048, 70_000):
        for d_sae in (1, 100, 65536, 1 << 20):
            plan = chunked_plan(n, d_sae)
            assert plan.algorithm == "chunked" and plan.BM * plan.BN <= 1 << 22
            assert min(n, 2048) <= plan.BM and min(d_sae, 2048) <= plan.BN
    for k in (1, 32, 512, 5000):
        for plan in candidates(65536, k, 90):
            if plan.algorithm == "chunked":
                assert chunked.slots(k, plan.BK) >= k + plan.BK
