"""The bfloat16 screen of the CPU encoder: what it returns is the float32 result to the bit, on any input.

Integers are exact in every order of summation and compared with the reference. Other inputs are compared with
the float32 dot products of ``select.product``, which sums as the screen's last step does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saerl_kernels as sk
from saerl_kernels import _numba
from saerl_kernels._numba import screen, screen_rows, select
from tests.encoders import assert_equal, integers, poison  # noqa: F401

pytestmark = pytest.mark.usefixtures("poison")


def encode(x: torch.Tensor, encoder: sk.PackedEncoder, k: int) -> tuple[sk.TopK, int]:
    """The screened result, and how many rows the margin left to the float32 path."""
    left = []

    def whole(rows, encoder, k):
        left.append(len(rows))
        return _numba._encode_blocks(rows, encoder, k)

    return screen.encode_topk(encoder.prepare(x), encoder.natural(), k, whole), sum(left)


def float32_topk(x: torch.Tensor, encoder: sk.PackedEncoder, k: int) -> sk.TopK:
    rows, weight = encoder.prepare(x).float().numpy(), encoder.weight.float().numpy()
    scores = np.empty((len(rows), len(weight)), dtype=np.float32)
    select.product(rows, weight, encoder.bias.numpy(), scores, 0, len(weight))
    return sk.reference.topk(torch.from_numpy(np.where(scores > 0, scores, 0)), k)


def gaussian(n=24, d_in=160, d_sae=1500, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d_in, generator=g), torch.randn(d_in, d_sae, generator=g) / d_in**0.5
    return x, sk.pack_encoder(W, torch.randn(d_sae, generator=g) / 10, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [(24, 160, 1500, 20), (70, 131, 1031, 1), (9, 768, 4096, 64), (3, 5, 300, 2), (1, 1, 90, 5)],
    ids=str,
)
def test_float32_result_to_the_bit(dtype, n, d_in, d_sae, k):
    x, encoder = gaussian(n, d_in, d_sae, dtype=dtype)
    got, left = encode(x, encoder, k)
    if d_in > 1:
        assert left == 0
        assert_equal(got, float32_topk(x, encoder, k))
    else:  # with one input everything ties or nearly so
        torch.testing.assert_close(got.values, float32_topk(x, encoder, k).values)


def test_few_candidates_are_left():
    """At the target's shape about 65 features of 16384 are scored in float32; no margin would leave 32."""
    x, encoder = gaussian(32, 768, 16384)
    seen = []
    rank = screen_rows.rank_candidates

    def spy(bits, columns, counts, *rest):
        seen.append(int(counts.sum()))
        rank(bits, columns, counts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen_rows, "rank_candidates", spy)
        encode(x, encoder, 32)
    assert 32 * 40 < sum(seen) < 32 * 90


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integers_with_ties(permute, dtype):
    x, encoder = integers(40, 37, 900, dtype=dtype, permute=permute)
    got, _ = encode(x, encoder, 12)
    assert_equal(got, sk.reference.encode_topk(x, encoder, 12))


def test_rows_that_the_margin_leaves_open():
    """Everything ties: no margin tells features apart, and the float32 path settles the row."""
    x, encoder = gaussian()
    encoder.bias.fill_(1.0)
    x[3] = x[20] = 0.0
    got, left = encode(x, encoder, 20)
    assert left == 2
    assert got.indices[3].tolist() == got.indices[20].tolist() == list(range(20))
    assert_equal(sk.TopK(got.values[4:20], got.indices[4:20]), float32_topk(x[4:20], encoder, 20))


def attacks():
    g = torch.Generator().manual_seed(5)
    x, W = torch.randn(20, 256, generator=g), torch.randn(256, 1200, generator=g) / 16
    b = torch.randn(1200, generator=g) / 10
    yield "plain", x, W, b
    yield "cancelling", torch.cat([x, -x * (1 + 2.0**-9)], 1), torch.cat([W, W]), b
    yield "copies a bit apart", x, W[:, :1].expand(256, 1200) * (1 + torch.arange(1200) * 2.0**-22), b * 0
    yield (
        "copies half a bfloat16 apart",
        x,
        W[:, :1].expand(256, 1200) * (1 + torch.arange(1200) * 2.0**-9),
        b,
    )
    yield "one outlier", torch.where(torch.arange(256) == 7, 2.0**30, x), W, b
    yield "huge", x * 2.0**60, W * 2.0**30, b
    yield "beyond the guard", x * 2.0**90, W * 2.0**30, b
    yield "tiny", x * 2.0**-70, W * 2.0**-60, b * 0
    yield "denormal", x * 2.0**-120, W * 2.0**-10, b * 0
    yield "denormal inputs, large weight", x * 2.0**-135, W * 2.0**80, b * 0
    yield "norms far apart", x, W * torch.logspace(-6, 6, 1200), b
    yield "large bias", x, W, b + 2.0**20
    yield "all negative", x, W, b - 1000
    yield "few positive", x, W, torch.where(torch.arange(1200) % 170 == 3, 0.0, -1000.0)
    yield "zero rows", x * (torch.arange(20) % 2)[:, None], W, b
    yield "rounds to infinity", torch.full((2, 256), 3.4e38), W, b
    yield "on the rounding border", torch.full((4, 256), 1 + 2.0**-8), torch.full((256, 1200), 1 + 2.0**-8), b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", attacks(), ids=lambda case: case[0])
def test_attacks(case, dtype):
    _, x, W, b = case
    encoder = sk.pack_encoder(W, b, dtype=dtype)
    got, left = encode(x, encoder, 16)
    want = float32_topk(x, encoder, 16)
    if left == 0:
        assert_equal(got, want)
        return
    plain = _numba._encode_blocks(encoder.prepare(x), encoder, 16)  # open rows are BLAS's to the bit
    for row in range(len(x)):
        same = [
            torch.equal(got.values[row], w.values[row]) and torch.equal(got.indices[row], w.indices[row])
            for w in (want, plain)
        ]
        assert any(same) or torch.allclose(got.values[row], want.values[row], rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_and_weights_that_are_not_finite(value):
    x, encoder = gaussian()
    x[5, 9] = value
    got, left = encode(x, encoder, 20)
    assert left == 1
    assert_equal(got, _mixed(x, encoder, 20, [5]))
    encoder.weight[700, 3] = value  # then nothing is screened
    got, left = encode(x, encoder, 20)
    assert left == len(x)
    assert_equal(got, _numba._encode_blocks(x, encoder, 20))


def _mixed(x, encoder, k, rows):
    """float32_topk, with ``rows`` from the plain path."""
    want, plain = float32_topk(x, encoder, k), _numba._encode_blocks(x, encoder, k)
    want.values[rows], want.indices[rows] = plain.values[rows], plain.indices[rows]
    return want


def test_blocks_and_bands(monkeypatch):
    x, encoder = gaussian(50, 160, 1500)
    monkeypatch.setattr(screen, "ROWS", 16)
    monkeypatch.setattr(screen, "BLOCK", 1)  # 1024 columns and what is left
    got, left = encode(x, encoder, 20)
    assert left == 0
    assert_equal(got, float32_topk(x, encoder, 20))


def test_threads():
    x, encoder = gaussian(130)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_equal(encode(x, encoder, 20)[0], float32_topk(x, encoder, 20))
    finally:
        torch.set_num_threads(threads)


def test_a_row_has_the_same_bits_in_every_batch():
    x, encoder = gaussian(64)
    together, _ = encode(x, encoder, 20)
    for rows in (slice(3, 4), slice(10, 30)):
        alone, _ = encode(x[rows], encoder, 20)
        assert_equal(alone, sk.TopK(together.values[rows], together.indices[rows]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_fuzz(data):
    draw = data.draw
    n, d_in, d_sae = draw(st.integers(1, 20)), draw(st.integers(1, 60)), draw(st.integers(1, 400))
    k = draw(st.integers(1, d_sae))  # up to d_sae, where the screen is of no use but must stay right
    options = {"low": draw(st.sampled_from([-200, -40, 5])), "permute": draw(st.booleans())}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x, encoder = integers(n, d_in, d_sae, seed=draw(st.integers(0, 99)), dtype=dtype, **options)
    assert_equal(encode(x, encoder, k)[0], sk.reference.encode_topk(x, encoder, k))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(-30, 30), st.integers(-30, 30), st.integers(1, 900))
def test_the_margin_holds(seed, up, down, d_in):
    """|bfloat16 product + bias - exact score| against the bound, entry by entry, with spread exponents."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(8, d_in, generator=g), torch.randn(40, d_in, generator=g)
    x, w = x * 2.0**up * torch.randn(8, d_in, generator=g).exp(), w * 2.0**down
    x[1] = (1 + 2.0**-8) * 2.0**up  # half-way between two bfloat16 numbers, all in one direction
    w[1] = (1 + 2.0**-8) * 2.0**down
    encoder = sk.pack_encoder(w.t().contiguous(), torch.randn(40, generator=g))
    held = screen.screen_of(encoder)
    assert held is not None
    half, norms, rests = screen._halves(x)
    t = torch.mm(half, held.half.t()).float()
    bound = (
        torch.from_numpy(rests[:, None] * held.margin[0] + norms[:, None] * held.margin[1] + held.margin[2])
        + screen.OUT_ROUNDING * t.abs()
    )
    exact = x.double() @ w.double().t()
    assert bool(((t.double() - exact).abs() <= bound.double()).all())
    assert torch.equal(half, x.bfloat16())  # our own rounding is torch's


def test_written_weights_are_noticed():
    x, encoder = gaussian()
    encode(x, encoder, 20)
    first = screen.screen_of(encoder)
    assert screen.screen_of(encoder) is first
    with torch.no_grad():
        encoder.weight.mul_(-1.0)
    assert_equal(encode(x, encoder, 20)[0], float32_topk(x, encoder, 20))
    encoder.bias[7] += 50.0
    got, _ = encode(x, encoder, 20)
    assert bool((got.indices[:, 0] == 7).all())
    assert "screen" not in encoder.to(torch.bfloat16)._cache


def test_training_sees_the_newest_weight(monkeypatch):
    """The optimiser writes to the weight between two steps: nothing of the last step may be used."""
    monkeypatch.setattr(screen, "has_units", lambda: True)
    x, encoder = gaussian(64)
    weight = torch.nn.Parameter(encoder.weight.clone())
    for _ in range(3):
        kept = sk.encode_topk_train(x, weight.t(), encoder.bias, 20, backend="numba")
        now = sk.PackedEncoder(weight.detach().clone(), encoder.bias)
        assert_equal(sk.TopK(kept.values.detach(), kept.indices), float32_topk(x, now, 20))
        weight.data.mul_(-1.0)  # what no version counter sees


def test_taken_by_capability_only(monkeypatch):
    x, encoder = gaussian(64)
    calls = []
    real = screen.encode_topk
    monkeypatch.setattr(screen, "encode_topk", lambda *args: calls.append(1) or real(*args))
    for units in (False, True):
        monkeypatch.setattr(screen, "has_units", lambda units=units: units)
        sk.encode_topk(x, encoder, 20, backend="numba")
        assert len(calls) == units
    sk.encode_topk(x, encoder.to(torch.float16), 20, backend="numba")
    sk.encode_topk(x[:8], encoder, 20, backend="numba")
    sk.encode_topk(x, encoder, 200, backend="numba")
    monkeypatch.setenv("SAERL_KERNELS_SCREEN", "0")
    sk.encode_topk(x, encoder, 20, backend="numba")
    assert len(calls) == 1


def test_units_are_tried_before_they_are_trusted(monkeypatch):
    find = screen.has_units.__wrapped__
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not find()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for rate in (1.2, 2.0):  # Intel's without AMX, and AMD's
        monkeypatch.setattr(screen, "bfloat16_rate", lambda rate=rate: rate)
        assert find() == (rate > 1.5)
    monkeypatch.setattr(screen, "bfloat16_rate", lambda: 1 / 0)  # AMX needs no timing
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert find()
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a, b) * 1.02)  # a product that rounds too much
    assert not find()
