"""CSR helpers against their dense meaning."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import csr as ops


def random_csr(n_rows: int, n_cols: int, density: float, seed: int, device: torch.device) -> sk.CSR:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 5, (n_rows, n_cols), generator=g).float()  # small integers: ties
    dense *= torch.rand(n_rows, n_cols, generator=g) < density
    return sk.CSR.from_dense(dense).to(device)


shapes = st.tuples(
    st.integers(0, 9), st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99)
)


def test_repr_is_one_line():
    csr = sk.CSR.from_dense(torch.eye(3, 5))
    assert repr(csr) == "CSR(3 x 5, nnz=3, float32, cpu)"
    assert f"{[csr]}" == "[CSR(3 x 5, nnz=3, float32, cpu)]"


@hypothesis.given(shapes)
def test_transpose(device, shape):
    csr = random_csr(*shape, device)
    turned = ops.transpose(csr)
    assert turned.n_rows == csr.n_cols and turned.n_cols == csr.n_rows
    assert [t.dtype for t in turned[:3]] == [t.dtype for t in csr[:3]]
    assert torch.equal(turned.to_dense(), csr.to_dense().t())
    for a, b in zip(ops.transpose(turned)[:3], csr[:3], strict=True):
        assert torch.equal(a, b)  # so columns ascend within its rows


@hypothesis.given(shapes, st.integers(1, 12))
def test_top_features(device, shape, k):
    csr = random_csr(*shape, device)
    k = min(k, csr.n_cols)
    got, want = ops.top_features(csr, k), sk.reference.topk(csr.to_dense(), k)
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)
    assert got.indices.dtype == torch.int32


def test_top_features_of_other_than_positive_entries():
    csr = sk.CSR(torch.tensor([0, 4]), torch.tensor([0, 1, 3, 5]).int(), torch.tensor([-1.0, 2, 0, 3]), 6)
    got = ops.top_features(csr, 4)
    assert got.values.tolist() == [[3, 2, 0, 0]] and got.indices.tolist() == [[5, 1, 0, 2]]


def test_idf(device):
    dense = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0]], device=device)
    got = ops.idf(sk.CSR.from_dense(dense), floor=0.5)
    torch.testing.assert_close(got.cpu(), 0.5 + torch.tensor([4 / 4, 4 / 2, 4 / 1]).log())


def test_rows_with_counts_entries_of_many_parts(device, monkeypatch):
    csr = random_csr(40, 7, 0.4, 0, device)
    once, split = ops.rows_with(csr), torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, _: split(self, 3))
    assert torch.equal(ops.rows_with(csr), once) and once.sum() == csr.nnz
    assert torch.equal(once, (csr.to_dense() != 0).sum(0))
    assert ops.rows_with(sk.CSR.empty(4, 3, device)).tolist() == [0, 0, 0]


@hypothesis.given(shapes)
def test_l2_rows_and_scale_columns(device, shape):
    csr = random_csr(*shape, device)
    weights = torch.arange(csr.n_cols, device=device).float()
    scaled = ops.scale_columns(csr, weights)
    assert torch.equal(scaled.to_dense(), csr.to_dense() * weights)
    assert scaled.nnz == int((csr.to_dense() * weights != 0).sum())
    rows = ops.l2_rows(scaled)
    want = torch.nn.functional.normalize(scaled.to_dense().double(), dim=1).float()
    torch.testing.assert_close(rows.to_dense(), want, rtol=1e-6, atol=0)
    assert rows.nnz == scaled.nnz


def test_weights_of_an_earlier_part_work_for_a_stack(device):
    parts = [random_csr(5, 7, 0.4, seed, device) for seed in (1, 2)]
    stacked = sk.CSR.concat(parts)
    weights = ops.idf(stacked)
    apart = sk.CSR.concat([ops.l2_rows(ops.scale_columns(part, weights)) for part in parts])
    together = ops.l2_rows(ops.scale_columns(stacked, weights))
    for a, b in zip(apart[:3], together[:3], strict=True):
        assert torch.equal(a, b)


def test_errors(device):
    csr = random_csr(3, 4, 0.5, 0, device)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\), expected \(4,\)"):
        ops.scale_columns(csr, torch.ones(3))
    with pytest.raises(ValueError, match="k=5 is larger than n_cols=4"):
        ops.top_features(csr, 5)
    with pytest.raises(ValueError, match="does not fit the int32"):
        ops.transpose(csr._replace(indptr=torch.zeros(1, dtype=torch.int64).expand((1 << 31) + 2)))


def test_row_selection_refuses_what_is_not_rows(device):
    csr = sk.CSR.from_dense(torch.eye(3, device=device))
    assert csr.select_rows([]).n_rows == 0
    assert csr.select_rows(torch.tensor([True, False, True])).n_rows == 2
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), expected \(3,\)"):
        csr.select_rows(torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"integers or a boolean mask, got torch\.float32"):
        csr.select_rows(torch.tensor([0.7]))


def test_shapes_that_do_not_hold_the_rows_are_refused():
    kept = sk.TopK(torch.ones(6, 2), torch.tensor([[3, 9]] * 6, dtype=torch.int32))
    rows = kept.to_csr(10)
    assert rows.to_coo((2, 3, 10)).shape == (2, 3, 10)
    for shape in ((2, 4, 10), (6, 9), (6, 11), (2, -1, 10), (-2, -3, 10), (), (60,)):
        with pytest.raises(ValueError, match="does not hold 6 rows of n_cols=10"):
            rows.to_coo(shape)
    with pytest.raises(ValueError, match="n_cols=9 is too small: an index is 9"):
        kept.to_csr(9)
