"""A GPU's float32 encoder through a bfloat16 screen: the result is the float32 scores' to the bit.

Integers are exact in every order of summation. Other inputs are compared with ``float32_topk``, which sums in
the order of the kernel that scores; without a GPU all of it runs in Triton's interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton import chunked, screen, tune
from saerl_kernels._triton.tune import Plan
from tests.encoders import assert_equal, float64_topk, integers, poison  # noqa: F401
from tests.test_screen import attacks

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning"),  # NumPy's, of infinities
]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the order of sums is the interpreter's")


def small(T: int = 2, size: int = 32, tree: bool = True) -> Plan:
    return Plan("screen", T, size, BM=16, BN=4 * size, BK=64, warps=4, tree=tree)


def encode(x: torch.Tensor, encoder: sk.PackedEncoder, k: int, plan: Plan | None = None):
    """The screened result, and which rows it left to the float32 product."""
    left, launch = [], triton_backend.launch_rescore

    def spy(*args):
        keys, opened = launch(*args)
        left.append(opened)
        return keys, opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "launch_rescore", spy)
        kept = triton_backend.encode_topk(encoder.prepare(x), encoder, k, plan or small())
    return kept, torch.cat(left).bool().cpu()


def float32_topk(x: torch.Tensor, encoder: sk.PackedEncoder, k: int) -> sk.TopK:
    """Every feature scored as the kernel scores its candidates: LANES partial sums, then their sum."""
    plain, lanes = encoder.natural(), screen.LANES
    steps = -(-encoder.d_in // lanes)
    rows, weight = (np.zeros((len(part), steps, lanes), np.float32) for part in (x, plain.weight))
    for wide, part in ((rows, x), (weight, plain.weight)):
        wide.reshape(len(part), -1)[:, : encoder.d_in] = part.numpy()
    scores = np.empty((len(x), encoder.d_sae), np.float32)
    with np.errstate(all="ignore"):
        for row, out in zip(rows, scores, strict=True):
            sums = np.zeros((encoder.d_sae, lanes), np.float32)
            for step in range(steps):
                sums += weight[:, step] * row[step]
            out[:] = sums.sum(axis=1) + plain.bias.numpy()
    return sk.reference.topk(torch.from_numpy(np.where(scores > 0, scores, 0)), k)


def gaussian(n=6, d_in=300, d_sae=1500, seed=0, permute=False):
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d_in, generator=g), torch.randn(d_in, d_sae, generator=g) / d_in**0.5
    return x, sk.pack_encoder(W, torch.randn(d_sae, generator=g) / 10, permute=permute)


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k", "plan"),
    [
        (5, 37, 900, 12, small()),
        (3, 61, 300, 1, small(1)),  # three columns of margin fill the last step
        (2, 62, 200, 200, small(3)),  # k = d_sae; the margin takes another step
        (1, 130, 260, 7, small(2, 64)),
        (2, 9, 150, 40, small(2, tree=False)),
        (2, 3, 1, 1, small()),
    ],
    ids=str,
)
def test_integers_with_ties(n, d_in, d_sae, k, plan, permute, device):
    x, encoder = integers(n, d_in, d_sae, permute=permute)
    got, left = encode(x.to(device), encoder.to(device), k, plan)
    assert not left.any()
    assert_equal(got, float64_topk(x, encoder, k))


@CPU_ONLY
@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_float32_result_to_the_bit(permute):
    for d_in, k, plan in ((300, 20, small()), (257, 1, small(1)), (96, 40, small(3, 64))):
        x, encoder = gaussian(4, d_in, permute=permute)
        got, left = encode(x, encoder, k, plan)
        assert not left.any()
        assert_equal(got, float32_topk(x, encoder, k))


@CPU_ONLY
@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_winners_are_not_those_with_the_largest_bounds(permute):
    """Forty features closer to each other than bfloat16 can tell: float32 scores decide, not bounds."""
    g = torch.Generator().manual_seed(3)
    x, W = torch.randn(1, 128, generator=g), -torch.ones(128, 1000)
    W[:, torch.randperm(1000, generator=g)[:40]] = x.t() * (1 + torch.randn(128, 40, generator=g) / 3000)
    encoder = sk.pack_encoder(W, permute=permute)
    bounds = screen.screen_of(encoder)
    upper = (screen.halve(x).float() @ bounds.weight.float().t())[0]
    want = float32_topk(x, encoder, 20)
    natural = upper if encoder.permutation is None else upper[torch.argsort(encoder.permutation)]
    assert len(set(natural.topk(20).indices.tolist()) & set(want.indices[0].tolist())) < 19
    got, left = encode(x, encoder, 20, small(3))
    assert not left.any()
    assert_equal(got, want)


LEFT = (  # more than 512 of the 1200 features may win, in single groups or for want of a usable margin
    "cancelling",
    "copies a bit apart",
    "copies half a bfloat16 apart",
    "huge",
    "beyond the guard",
    "tiny",
    "denormal",
    "denormal inputs, large weight",
    "large bias",
    "rounds to infinity",
    "on the rounding border",
)


@CPU_ONLY
@pytest.mark.parametrize("case", attacks(), ids=lambda case: case[0])
def test_attacks(case):
    """Screened rows are the float32 scores' to the bit; rows that are left are the float32 product's."""
    name, x, W, b = case
    x, encoder, k = x[:3], sk.pack_encoder(W, b), 16
    got, left = encode(x, encoder, k)
    assert bool(left.any()) == (name in LEFT)
    want = float32_topk(x, encoder, k)
    if left.any():
        plain = triton_backend.encode_topk(x[left], encoder, k, tune.chunked_plan(int(left.sum()), len(b)))
        want.values[left], want.indices[left] = plain
    assert_equal(got, want)


@CPU_ONLY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_and_features_that_are_not_finite(value):
    """A feature costs a candidate; a row that is infinite scores every feature, a row with NaN none."""
    x, encoder = gaussian(4, d_in=40, d_sae=400)  # 400 candidates fit
    x[1, 9] = value
    encoder.weight[70, 3], encoder.bias[71] = value, value
    got, left = encode(x, encoder, 20)
    assert not left.any()
    assert_equal(got, float32_topk(x, encoder, 20))
    x, encoder = gaussian(4, d_in=40)
    x[1, 9] = value
    got, left = encode(x, encoder, 20)
    assert left.tolist() == [False, value == value, False, False]
    rest = [0, 2, 3]
    want = float32_topk(x[rest], encoder, 20)
    assert_equal(sk.TopK(got.values[rest], got.indices[rest]), want)
    assert_equal(sk.TopK(got.values[1:2], got.indices[1:2]), float32_topk(x[1:2], encoder, 20))


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_ties_in_bulk(permute, device):
    """Rows of zeros: all scores are equal, to be settled by the order of features."""
    W = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0))
    encoder = sk.pack_encoder(W, torch.ones(2048), permute=permute).to(device)
    got, left = encode(torch.zeros(3, 8, device=device), encoder, 16)
    assert left.all() == permute  # in a random order each group may hide one of the first features
    assert got.indices.tolist() == [list(range(16))] * 3 and bool((got.values == 1).all())


def test_copies_of_features(device):
    W = torch.randint(-3, 4, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    encoder = sk.pack_encoder(W[:, torch.arange(512) // 16], torch.ones(512))
    x = torch.randint(-3, 4, (3, 8), generator=torch.Generator().manual_seed(1)).float()
    got, left = encode(x.to(device), encoder.to(device), 40)
    assert not left.any()
    assert_equal(got, float64_topk(x, encoder, 40))


@pytest.mark.parametrize("T", [1, 2])
def test_winners_that_a_group_hides(T, device):
    """All winners in one group, of which T are kept: it is opened, and scored like the others."""
    x, encoder = integers(3, 11, 400, low=-9)
    encoder.bias[:416:13] += 200.0  # group 0 of 16 takes one column of 16, one further each time
    groups = 16
    position = torch.arange(32)
    columns = position * groups + (position * (groups // 32)) % groups
    encoder.bias[columns[columns < 400]] += 400.0
    got, left = encode(x.to(device), encoder.to(device), 20, small(T))
    assert not left.any()
    assert_equal(got, float64_topk(x, encoder, 20))


def test_only_candidates_are_scored(device):
    """Weights below the bound are never read in float32: they could be anything."""
    x, encoder = gaussian(1)
    want, _ = encode(x.to(device), encoder.to(device), 8, small(3))
    encoder = encoder.to(device)
    bounds = screen.screen_of(encoder)
    upper = (
        chunked.product(screen.halve(x.to(device)), bounds.weight.t(), torch.empty(1, 1500, device=device))[0]
        + bounds.bias
    )
    scores = (x.to(device) @ encoder.weight.t() + encoder.bias)[0]
    least = scores[upper.topk(8).indices].min()
    candidates = upper >= least - 1e-5
    assert 8 <= int(candidates.sum()) < 40
    encoder.weight.data[~candidates] = torch.nan  # what no version counter sees
    assert_equal(encode(x.to(device), encoder, 8, small(3))[0], want)


def test_few_candidates_are_left(device):
    """At d_in 768 and k 64 of 16384 features, bounds leave about 95, or 115 where bfloat16 truncates."""
    x, encoder = gaussian(16, 768, 16384)
    x, encoder = x.to(device), encoder.to(device)
    bounds = screen.screen_of(encoder)
    upper = (
        chunked.product(screen.halve(x), bounds.weight.t(), torch.empty(16, 16384, device=device))
        + bounds.bias
    )
    scores = x @ encoder.weight.t() + encoder.bias
    least = scores.gather(1, upper.topk(64).indices).amin(1, keepdim=True)
    count = (upper >= least).sum(1)
    assert 64 < float(count.float().mean()) < 130 and int(count.max()) < screen.slots(64) // 2


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(-40, 30), st.integers(-40, 30), st.integers(1, 900))
def test_the_bound_holds(seed, up, down, d_in):
    """On the device's own tensor cores, entry by entry, with spread exponents and large biases."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(8, d_in, generator=g), torch.randn(40, d_in, generator=g)
    x, w = x * 2.0**up * torch.randn(8, d_in, generator=g).exp(), w * 2.0**down
    x[1] = (1 + 2.0**-8) * 2.0**up  # half-way between two bfloat16 numbers, all in one direction
    w[1] = (1 + 2.0**-8) * 2.0**down
    x[2], w[2], x[3, ::2] = 0.0, 0.0, -x[3, ::2]
    bias = torch.randn(40, generator=g) * 2.0 ** (up + down)
    bias[3] = 2.0 ** (up + down + 14)
    encoder = sk.pack_encoder(w.t().contiguous(), bias).to(device)
    bounds, half = screen.screen_of(encoder), screen.halve(x.to(device))
    upper = (
        chunked.product(half, bounds.weight.t(), torch.empty(len(half), bounds.d_sae, device=device))
        + bounds.bias
    )
    exact = x.double() @ w.double().t() + bias.double()
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1) + bias.double().abs()
    room = screen.accumulation(d_in) * size  # what the float32 score may be off by
    room[2] = 0.0
    assert bool((upper.cpu().double() >= exact + room).all())
    assert torch.equal(upper[2].cpu(), bias)


def test_bands_of_rows(monkeypatch, device):
    """More rows than scratch holds; some of each band are left open, and come back to their places."""
    monkeypatch.setattr(triton_backend, "SCRATCH", 1)
    x, encoder = integers(40, 9, 700)
    encoder.bias[:] = encoder.bias.clamp(min=-3.0)
    x[::7] = 2.0**70  # beyond what is screened
    got, left = encode(x.to(device), encoder.to(device), 6)
    assert left[::7].all() and not left[1::7].any()
    assert_equal(got, float64_topk(x, encoder, 6))


def test_a_row_has_the_same_bits_in_every_batch(device):
    x, encoder = gaussian(5)
    x, encoder = x.to(device), encoder.to(device)
    together, _ = encode(x, encoder, 20)
    for rows in (slice(3, 4), slice(1, 4)):
        assert_equal(encode(x[rows], encoder, 20)[0], sk.TopK(together.values[rows], together.indices[rows]))


@settings(max_examples=10)
@given(st.data())
def test_fuzz(data):
    draw = data.draw
    d_in, d_sae = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    k = draw(st.integers(1, min(d_sae, 60)))
    options = {"low": draw(st.sampled_from([-200, -40, 5])), "permute": draw(st.booleans())}
    x, encoder = integers(3, d_in, d_sae, seed=draw(st.integers(0, 99)), **options)
    for j in draw(st.lists(st.integers(0, d_sae - 1), max_size=4)):
        encoder.bias[j] = draw(st.sampled_from([float("inf"), float("nan"), -float("inf"), 2.0**90]))
    plan = small(draw(st.integers(1, 3)), draw(st.sampled_from([32, 64])), draw(st.booleans()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_equal(encode(x.to(device), encoder.to(device), k, plan)[0], float64_topk(x, encoder, k))


def test_written_weights_are_noticed(device):
    x, encoder = integers(2, 20, 300)
    encoder = encoder.to(device)
    first = screen.screen_of(encoder)
    assert screen.screen_of(encoder) is first
    encoder.weight.mul_(-1.0)
    got, _ = encode(x.to(device), encoder, 9)
    assert screen.screen_of(encoder) is not first
    assert_equal(got, float64_topk(x, encoder.to("cpu"), 9))
    encoder.bias[7] += 500.0
    assert bool((encode(x.to(device), encoder, 9)[0].indices[:, 0] == 7).all())


def test_training_sees_the_newest_weight(monkeypatch, device):
    """Each step packs anew: nothing of the last one may be used, whatever wrote to the weight."""
    monkeypatch.setattr(triton_backend, "plan_encode", lambda *_: small())
    x, encoder = integers(2, 20, 300)
    x, weight = x.to(device), encoder.weight.clone().to(device)
    for _ in range(2):
        kept = sk.encode_topk_train(x, weight.t(), encoder.bias.to(device), 9, backend="triton")
        now = sk.PackedEncoder(weight.cpu().clone(), encoder.bias)
        assert_equal(sk.TopK(kept.values.detach(), kept.indices), float64_topk(x.cpu(), now, 9))
        weight.data.mul_(-1.0)


def test_which_encoders_are_screened(monkeypatch):
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    gpu = {"arch": (9, 0), "capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu["capturing"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu["arch"])

    def chosen(n=4096, d_in=256, d_sae=16384, k=32, dtype=torch.float32):
        weight = torch.empty(1, dtype=dtype).expand(d_sae, d_in)
        return tune.plan_encode(n, sk.PackedEncoder(weight, torch.empty(0)), k).algorithm

    assert {chosen(), chosen(64), chosen(k=128), chosen(d_in=6144), chosen(d_sae=131072)} == {"screen"}
    assert {chosen(63), chosen(d_in=255), chosen(d_in=6145), chosen(d_sae=4095), chosen(k=1000)} == {
        "chunked"
    }
    assert chosen(dtype=torch.bfloat16) == "groups"
    archs = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    screened = [gpu["arch"] for gpu["arch"] in archs if chosen() == "screen"]
    assert screened == [(8, 0), (9, 0), (10, 0), (10, 3)]
    gpu["arch"], gpu["capturing"] = (9, 0), True  # in a CUDA graph nothing may wait
    assert chosen() == "chunked"
    gpu["capturing"] = False
    monkeypatch.setenv("SAERL_KERNELS_SCREEN", "0")
    assert chosen() == "chunked"


def test_a_screen_that_does_not_launch_is_replaced_and_said_once(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(triton_backend, "plan_encode", lambda *_: small())
    monkeypatch.setattr(triton_backend.device, "_refused", set())
    calls = []

    def refuse(*_):
        calls.append(1)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_backend, "launch_rescore", refuse)
    x, encoder = integers(3, 20, 300)
    want = sk.reference.encode_topk(x, encoder, 9)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, encoder = x.to(device), encoder.to(device)
    with pytest.warns(UserWarning, match="screen.*does not launch"):
        assert_equal(sk.encode_topk(x, encoder, 9, backend="triton"), want)
    assert_equal(sk.encode_topk(x, encoder, 9, backend="triton"), want)
    assert len(calls) == 1
