"""Row top-k of materialised scores: order, ties, odd values, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saerl_kernels as sk
from tests.encoders import BACKENDS


def check(scores: torch.Tensor, k: int, backend: str) -> None:
    got, want = sk.topk(scores, k, backend=backend), sk.reference.topk(scores, k)
    assert got.values.dtype == torch.float32 and got.indices.dtype == torch.int32
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "width", "k"), [(3, 50, 7), (1, 1, 1), (20, 130, 130), (2, 997, 100)], ids=str)
def test_many_ties(backend, n, width, k, device):
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    check(torch.randint(-9, 9, (n, width)).float().to(device), k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_values(backend):
    nan, inf = torch.nan, torch.inf
    rows = [
        [0.0, -0.0, 1.0, nan, -inf, inf, -1.0],
        [nan, nan, -inf, nan, nan, nan, nan],
        [-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45, -0.0],
        [-3.0, -2.0, -2.0, -1.0, -4.0, -3.0, -inf],
    ]
    for k in (1, 3, 7):
        check(torch.tensor(rows), k, backend)
    assert sk.topk(torch.tensor(rows), 7, backend=backend).indices[0].tolist() == [5, 2, 0, 1, 6, 3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend):
    scores = torch.randn(4, 30, 6).bfloat16().transpose(1, 2)
    check(scores, 5, backend)
    assert sk.topk(scores[:0], 5, backend=backend).values.shape == (0, 6, 5)
    with pytest.raises(ValueError, match="k=31 is larger than the row length=30"):
        sk.topk(scores, 31, backend=backend)


def test_sort_kernel_order():
    """The ordering that runs on a GPU; elsewhere tests take the interpreter's cheaper one."""
    from saerl_kernels._triton.finish import _finish_kernel

    if torch.cuda.is_available():
        pytest.skip("covered by every other test on a GPU")
    keys = torch.randperm(10_000)[:20].view(2, 10).long() << 20
    counts = torch.tensor([10, 6], dtype=torch.int32)
    values, indices = torch.zeros(2, 10, dtype=torch.int32), torch.zeros(2, 10, dtype=torch.int32)
    numbers = torch.zeros(1, dtype=torch.int32)
    options = {"ROWS": 2, "KP": 16, "PERMUTED": False, "COUNT": False}
    _finish_kernel[(1,)](keys.clone(), counts, numbers, values, indices, 2, 10, 10, **options)
    for row, count in enumerate(counts.tolist()):
        want = keys[row, :count].sort(descending=True).values
        assert torch.equal(values[row, :count], (want >> 32).int())
        assert torch.equal(indices[row, :count], (0x7FFFFFFF - (want & 0x7FFFFFFF)).int())
    assert values[1, 6:].tolist() == [0] * 4 and indices[1, 6:].tolist() == [0, 1, 2, 3]


@given(st.integers(1, 80), st.integers(1, 5), st.integers(0, 999), st.floats(0.1, 1e30))
def test_fuzz(width, spread, seed, scale):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-spread, spread + 1, (4, width), generator=g) * scale
    for backend in ("torch", "numba"):
        check(scores, 1 + seed % width, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_pattern_of_nan(backend):
    """A NaN of all ones is the least int32 of all: nothing ranks below it, and nothing may lose it."""
    scores = torch.randn(4, 130)
    scores[:, ::3] = -torch.inf
    scores.view(torch.int32)[:, 1::3] = -1
    scores.view(torch.int32)[0] = -1
    for k in (1, 60, 130):
        check(scores, k, backend)


WIDE = ["ascending", "descending", "equal", "few values", "negative", "-inf", "nan", "one tile"]


@pytest.mark.parametrize("layout", WIDE)
def test_wide_rows_in_the_smallest_buffers(layout, monkeypatch, device):
    """Many tiles, buffers of k + a tile, fewer rows at once than there are: rows that fill them fast."""
    from saerl_kernels import _triton as launch

    monkeypatch.setattr(launch, "GATED", 16)
    monkeypatch.setattr(launch, "slots", lambda k, block: 1 << (k + block - 1).bit_length())
    monkeypatch.setattr(launch, "SCRATCH", 2048)
    width = 301
    scores = torch.randn(5, width)
    if layout in ("ascending", "descending"):
        scores = scores.sort(dim=1, descending=layout == "descending").values
    elif layout == "equal":
        scores = torch.full((5, width), -2.5)
    elif layout == "few values":
        scores = (
            torch.randint(-2, 3, (5, width)).float()
            * torch.tensor([1.0, -0.0, 1e-45, 1e38, torch.inf])[:, None]
        )
    elif layout == "negative":
        scores = -scores.abs()
    elif layout == "-inf":
        scores[:, 3:] = -torch.inf
    elif layout == "nan":
        scores[scores > -0.5] = torch.nan
        scores[1] = torch.nan
    elif layout == "one tile":
        scores[:, 160:176] += 100.0
    for k in (1, 20, 110):
        check(scores.to(device), k, "triton")


def test_more_than_the_gpu_kernels_hold():
    check(torch.randint(-9, 9, (2, 1100)).float(), 1030, "triton")
