"""Spherical k-means on sparse rows: backends against the definition, and Lloyd's promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import csr
from tests.encoders import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    return request.param


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Unwritten outputs fail: what torch.empty returns in the op's files is NaN, or a label far outside."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 30)

    monkeypatch.setattr(torch, "empty", filled)


def rows(n: int, d: int, density: float = 0.4, seed: int = 0, signed: bool = False) -> sk.CSR:
    """Random sparse rows; every fifth is empty where there are several."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) < density)
    if signed:
        dense *= torch.randint(0, 2, (n, d), generator=g) * 2 - 1
    dense[4::5] = 0
    return sk.CSR.from_dense(dense)


def planted(n: int = 240, topics: int = 6, d: int = 97, seed: int = 0) -> tuple[sk.CSR, np.ndarray]:
    """Rows that are active mostly in the ten features of their topic."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, topics, n)
    chance = np.full((n, d), 0.05)
    for name in range(topics):
        chance[topic == name, 10 * name : 10 * name + 10] = 0.7
    dense = (rng.random((n, d)) < chance) * rng.gamma(3.0, 1.0, (n, d))
    dense[:, -1] = 0.1
    return sk.CSR.from_dense(torch.tensor(dense, dtype=torch.float32)), topic


def objective(X: sk.CSR, labels: torch.Tensor, n_clusters: int) -> float:
    """Sum of cosines between rows and their cluster's direction, in float64."""
    unit = csr.l2_rows(X)
    owner = torch.nn.functional.one_hot(labels.long(), n_clusters).double()
    return float((owner.t() @ unit.to_dense().double()).norm(dim=1).sum())


SHAPES = [(1, 1, 1), (1, 7, 1), (9, 13, 9), (30, 31, 3), (6, 1, 2), (12, 5, 257), (5, 128, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_assign_equals_reference(backend, shape, device):
    n, d, n_clusters = shape
    X = rows(n, d, signed=True)
    centroids = torch.randn(n_clusters, d)
    want = sk.reference.kmeans_assign(X, centroids)
    labels, similarity = sk.kmeans_assign(X.to(device), centroids.to(device), backend=backend)
    assert labels.dtype == torch.int32 and similarity.dtype == torch.float32
    assert torch.equal(labels.cpu(), want[0])
    torch.testing.assert_close(similarity.cpu(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_update_equals_reference(backend, shape, device):
    n, d, n_clusters = shape
    X = rows(n, d, signed=True, seed=1)
    labels = torch.arange(n) * 7 % n_clusters
    want = sk.reference.kmeans_update(X, labels, n_clusters)
    got = sk.kmeans_update(X.to(device), labels.to(device), n_clusters, backend=backend).cpu()
    assert got.dtype == torch.float32 and got.shape == (n_clusters, d)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    norm = got.norm(dim=1)
    assert bool(((norm - 1).abs() < 1e-5).logical_or(norm == 0).all())
    given = sk.kmeans_update(
        X.to(device), labels.to(device), n_clusters, transposed=csr.transpose(X.to(device)), backend=backend
    )
    assert torch.equal(given.cpu(), got)


def test_first_among_equals(backend, device):
    """Ties within a tile and across tiles of 256, all-negative products, and empty rows."""
    X = sk.CSR.from_dense(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).to(device)
    centroids = torch.full((300, 2), -1.0, device=device)
    centroids[[70, 90, 280], 0] = 0.5
    labels, similarity = sk.kmeans_assign(X, centroids, backend=backend)
    assert labels.tolist() == [70, 0, 0]
    assert similarity.tolist() == [1.0, -1.0, 0.0]
    none = sk.kmeans_assign(sk.CSR.empty(0, 2, device), centroids, backend=backend)
    assert none[0].shape == none[1].shape == (0,)


@pytest.mark.parametrize(
    ("n", "d", "n_clusters", "init"),
    [(24, 13, 3, None), (10, 7, 8, None), (7, 3, 1, None), (24, 13, 4, "labels"), (24, 13, 3, "centroids")],
    ids=str,
)
def test_whole_algorithm_equals_reference(backend, n, d, n_clusters, init, device):
    X = rows(n, d)
    start = {"labels": torch.arange(n) % n_clusters, "centroids": rows(n_clusters, d, 0.9, 3).to_dense() * 5}
    start = start.get(init)
    want = sk.spherical_kmeans(X, n_clusters, init=start, backend="reference")
    at = None if start is None else start.to(device)
    got = sk.spherical_kmeans(X.to(device), n_clusters, init=at, backend=backend)
    assert torch.equal(got.labels.cpu(), want.labels) and got.n_iter == want.n_iter
    torch.testing.assert_close(got.centroids.cpu(), want.centroids, rtol=1e-5, atol=1e-6)
    assert got.inertia == pytest.approx(want.inertia, rel=1e-5, abs=1e-5)
    assert got.centroids.is_contiguous()


def test_result_is_consistent(backend, device):
    X, _ = planted(20 if backend == "triton" else 240, d=61)
    found = sk.spherical_kmeans(X.to(device), 4, max_iter=2, tol=0, seed=3, backend=backend)
    unit = csr.l2_rows(X.to(device))
    labels, similarity = sk.kmeans_assign(unit, found.centroids, backend=backend)
    assert torch.equal(labels, found.labels) and 1 <= found.n_iter <= 2
    assert found.inertia == pytest.approx(float((1 - similarity.double()).sum()), rel=1e-6)
    again = sk.spherical_kmeans(X.to(device), 4, max_iter=2, tol=0, seed=3, backend=backend)
    assert torch.equal(again.labels, found.labels) and torch.equal(again.centroids, found.centroids)
    assert again.inertia == found.inertia


def test_any_memory_layout_and_no_gradients(backend, device):
    """Views with gaps, 16-bit and transposed centroids, and values that carry gradients."""
    X = rows(9, 7).to(device)
    gaps = sk.CSR(*(torch.stack([part, part], 1)[:, 0] for part in X[:3]), X.n_cols)
    gaps = gaps._replace(values=gaps.values.requires_grad_())
    centroids = torch.randn(3, 7, device=device).bfloat16()
    want = sk.kmeans_assign(X, centroids.float(), backend=backend)
    view = centroids.t().contiguous().t().requires_grad_()
    got = sk.kmeans_assign(gaps, view, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not got[1].requires_grad
    lazy = X._replace(values=torch._neg_view(-X.values))  # not negated yet in memory
    got = sk.kmeans_assign(lazy, torch._neg_view(-centroids.float().t()).t(), backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    labels = torch.stack([want[0], want[0]], 1)[:, 0]
    update = sk.kmeans_update(gaps, labels, 3, backend=backend)
    assert torch.equal(update, sk.kmeans_update(X, want[0], 3, backend=backend)) and not update.requires_grad
    found = sk.spherical_kmeans(gaps, 2, init=view[:2], backend=backend)
    assert torch.equal(found.labels, sk.spherical_kmeans(X, 2, init=centroids[:2], backend=backend).labels)


def test_threads_do_not_change_a_bit(monkeypatch):
    """Four blocks of rows and features on four threads, as on one."""
    pytest.importorskip("numba")
    X, _ = planted(300, d=8200)
    one = sk.spherical_kmeans(X, 5, backend="numba")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    four = sk.spherical_kmeans(X, 5, backend="numba")
    assert torch.equal(one.labels, four.labels) and torch.equal(one.centroids, four.centroids)


@pytest.mark.parametrize("ties", [False, True], ids=["rounded", "ties"])
def test_comparing_with_moved_centroids_only_does_not_change_a_bit(ties):
    """Some centroids move nearer, some away; whole numbers make equal products common."""
    kmeans = pytest.importorskip("saerl_kernels._numba.kmeans")
    g = torch.Generator().manual_seed(0)
    X = rows(400, 37, 0.5, signed=True)
    table = torch.randn(37, 23, generator=g)
    if ties:
        X = X._replace(values=(X.values * 2).round())
        table = (table * 2).round()
    labels, similarity = kmeans.assign(X, table)
    again = 0
    for _ in range(30):
        moved = torch.rand(23, generator=g) < 0.2
        step = torch.randn(37, 23, generator=g) * 0.2
        table = torch.where(moved, table + ((step * 8).round() / 2 if ties else step), table)
        want = kmeans.assign(X, table)
        got = kmeans.reassign(X, table, labels, similarity, moved)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        again += int((want[0] != labels).sum())
        labels, similarity = want
    assert again > 100


def test_where_no_centroid_moved_nothing_changes():
    """Also of rows whose similarity is negative, or zero for want of entries."""
    kmeans = pytest.importorskip("saerl_kernels._numba.kmeans")
    X = rows(200, 37, 0.05)
    table = -torch.rand(37, 1)
    labels, similarity = kmeans.assign(X, table)
    assert (similarity < 0).any() and (similarity == 0).any()
    got = kmeans.reassign(X, table, labels, similarity, torch.zeros(1, dtype=torch.bool))
    assert torch.equal(got[0], labels) and torch.equal(got[1], similarity)


@pytest.mark.parametrize("backend", ["torch", "numba", "reference"])
def test_planted_topics_are_found(backend):
    from sklearn.metrics import adjusted_rand_score

    X, topic = planted()
    found = sk.spherical_kmeans(X, 6, n_init=3, backend=backend)
    assert adjusted_rand_score(topic, found.labels.numpy()) > 0.95
    single = sk.spherical_kmeans(X, 6, backend=backend)
    assert found.inertia <= single.inertia


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("seed", range(3))
def test_objective_never_falls(backend, seed):
    X = rows(90, 40, density=0.15, seed=seed, signed=seed == 2)
    start = torch.randint(0, 9, (90,), generator=torch.Generator().manual_seed(seed))
    runs = [sk.spherical_kmeans(X, 9, init=start, max_iter=i, tol=0, backend=backend) for i in range(8)]
    inertia = [run.inertia for run in runs]
    assert all(b <= a + 1e-4 for a, b in zip(inertia, inertia[1:], strict=False)) and inertia[-1] < inertia[0]
    totals = [objective(X, run.labels, 9) for run in runs]
    assert all(b >= a - 1e-4 for a, b in zip(totals, totals[1:], strict=False))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_permuted_rows_permute_labels(backend):
    X, _ = planted(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    init = X.select_rows([0, 1, 2, 3, 4]).to_dense()
    first = sk.spherical_kmeans(X, 5, init=init, backend=backend)
    second = sk.spherical_kmeans(X.select_rows(order), 5, init=init, backend=backend)
    assert torch.equal(first.labels[order], second.labels)


def test_scale_of_rows_and_duplicates_do_not_matter(backend, device):
    dense = rows(8, 11, 0.5).to_dense()[[0, 1, 2, 3, 5]]
    X = sk.CSR.from_dense(torch.cat([dense, dense * 1e-3, dense * 1e15]))
    found = sk.spherical_kmeans(X.to(device), 3, backend=backend)
    labels = found.labels.view(3, 5)
    assert bool((labels == labels[0]).all())


@pytest.mark.parametrize("n_clusters", [2, 4, 5])
def test_empty_clusters_are_filled(backend, n_clusters, device):
    """All rows start in one cluster; four distinct directions, so a fifth cluster must stay empty."""
    dense = torch.eye(4)[[0, 0, 1, 1, 2, 3, 3]] + 0.05
    X = sk.CSR.from_dense(dense).to(device)
    start = torch.full((7,), n_clusters - 1, device=device)
    for max_iter in (1, 20):
        found = sk.spherical_kmeans(X, n_clusters, init=start, max_iter=max_iter, tol=0, backend=backend)
        sizes = torch.bincount(found.labels.long(), minlength=n_clusters)
        assert int((sizes > 0).sum()) == min(n_clusters, 4)
        assert bool((found.centroids[sizes == 0] == 0).all())
        labels = found.labels.tolist()
        assert labels[0] == labels[1] and labels[2] == labels[3] and labels[5] == labels[6]
    if n_clusters >= 4:
        assert found.inertia == pytest.approx(0, abs=1e-5)


def test_empty_rows_get_label_zero_and_move_nothing(backend, device):
    X, _ = planted(16, d=61)
    bare = sk.CSR.concat([X, sk.CSR.empty(2, X.n_cols)]).to(device)
    with_empty = sk.spherical_kmeans(bare, 3, backend=backend)
    without = sk.spherical_kmeans(X.to(device), 3, backend=backend)
    assert with_empty.labels[-2:].tolist() == [0, 0]
    assert torch.equal(with_empty.labels[:-2], without.labels)
    assert with_empty.inertia == pytest.approx(without.inertia)
    nothing = sk.spherical_kmeans(sk.CSR.empty(3, 5, device), 2, backend=backend)
    assert nothing.labels.tolist() == [0, 0, 0] and nothing.inertia == 0
    assert bool((nothing.centroids == 0).all())


def test_random_problems_equal_reference():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.integers(0, 50), st.data())
    def check(n, d, n_clusters, seed, data):
        hypothesis.assume(n_clusters <= n)
        backend = data.draw(st.sampled_from(["torch", "numba"]))
        # Powers of two apart, so that near-ties that rounding decides are rare; equal rows are common.
        dense = torch.randint(0, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()
        X = sk.CSR.from_dense(dense * 2.0 ** torch.arange(d))
        got = sk.spherical_kmeans(X, n_clusters, seed=seed, backend=backend)
        want = sk.spherical_kmeans(X, n_clusters, seed=seed, backend="reference")
        assert got.inertia == pytest.approx(want.inertia, abs=1e-4)
        assert torch.equal(got.labels, want.labels)
        unit = csr.l2_rows(X).to_dense()
        filled = unit[unit.any(1)]
        n_distinct = len(torch.unique((filled * 1e4).round(), dim=0))
        used = len(torch.unique(got.labels[unit.any(1)]))
        assert used == min(n_clusters, n_distinct)

    check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_clusters=0), "n_clusters=0 must be"),
        (dict(n_clusters=2.0), r"n_clusters=2\.0 must be"),
        (dict(n_clusters=7), "n_clusters=7 is larger than the number of rows, 6"),
        (dict(n_init=0), "n_init=0 must be"),
        (dict(n_init=2.0), r"n_init=2\.0 must be"),
        (dict(max_iter=-1), "max_iter=-1"),
        (dict(tol=float("nan")), "tol=nan"),
        (dict(init=torch.zeros(6, dtype=torch.long), n_init=2), "n_init=2 runs"),
        (dict(init=torch.full((6,), 2)), r"labels reach 2\.\.2, outside 0\.\.1"),
        (dict(init=torch.zeros(5, dtype=torch.long)), r"labels must be integers \[6\]"),
        (dict(init=torch.zeros(2, 5)), r"centroids must be \[n_clusters, 4\]"),
        (dict(init=torch.zeros(3, 4)), "init has 3 centroids"),
        (dict(init=torch.full((2, 4), torch.inf)), "centroids hold NaN or infinite"),
        (dict(init=torch.zeros(2, 4, device="meta")), "X is on cpu, centroids on meta"),
        (dict(init=torch.zeros(6, dtype=torch.long, device="meta")), "X is on cpu, labels on meta"),
        (dict(backend="fast"), "backend='fast' is unknown"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sk.spherical_kmeans(rows(6, 4), **{"n_clusters": 2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(values=torch.tensor([1.0, torch.nan, 1.0])), "row 1 are NaN or infinite"),
        (dict(values=torch.ones(3).double()), "csr.values float32"),
        (dict(values=torch.ones(2)), "must both be"),
        (dict(indices=torch.tensor([0, 1, 0])), r"csr\.indices must be int32"),
        (dict(indices=torch.tensor([0, 3, 0], dtype=torch.int32)), r"reach 0\.\.3, outside 0\.\.2"),
        (dict(indptr=torch.tensor([0, 2, 1, 3])), "falls 1 times"),
        (dict(indptr=torch.tensor([0, 1, 2, 2])), "rise from 0 to nnz=3"),
        (dict(indptr=torch.tensor([0, 1, 2, 3], dtype=torch.int32)), "csr.indptr must be int64"),
        (dict(values=torch.ones(3, device="meta")), "csr is on cpu, cpu and meta"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_matrices(change, message):
    good = sk.CSR(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0], dtype=torch.int32), torch.ones(3), 3)
    bad = good._replace(**change)
    for call in (
        lambda: sk.spherical_kmeans(bad, 2),
        lambda: sk.kmeans_assign(bad, torch.ones(2, 3)),
        lambda: sk.kmeans_update(bad, torch.zeros(3, dtype=torch.int32), 2),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_update_refuses_another_matrix_transpose():
    X = rows(6, 4)
    with pytest.raises(ValueError, match="transposed is 6 x 4"):
        sk.kmeans_update(X, torch.zeros(6, dtype=torch.int32), 2, transposed=X)
    with pytest.raises(ValueError, match="must be floating point"):
        sk.kmeans_assign(X, torch.ones(2, 4, dtype=torch.int32))


def test_update_checks_the_transpose_it_is_given():
    X, labels = rows(6, 4), torch.zeros(6, dtype=torch.int32)
    flipped = sk.csr.transpose(X)
    beyond = flipped._replace(indices=flipped.indices + 6)
    with pytest.raises(ValueError, match=r"csr\.indices reach 6\.\..*outside 0\.\.5"):
        sk.kmeans_update(X, labels, 2, transposed=beyond)
