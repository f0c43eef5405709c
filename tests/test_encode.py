"""encode_topk and encode_threshold against the reference, on every backend.

Inputs are small integers unless a test says otherwise: their products are exact in float32 whatever the
order of summation, so results must be equal to the bit, and ties are everywhere.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton.groups import group_column
from saerl_kernels._triton.tune import Plan
from tests.encoders import BACKENDS, assert_equal, float64_topk, integers, poison  # noqa: F401

pytestmark = pytest.mark.usefixtures("poison")


def small(T: int, size: int = 32, tree: bool = True) -> Plan:
    """A tile of the grouped encoder that the interpreter can afford."""
    return Plan("groups", T, size, BM=16, BN=4 * size, BK=32, warps=4, tree=tree)


def usable(backend: str, device: torch.device) -> None:
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")


def assert_csr(got: sk.CSR, want: sk.CSR) -> None:
    assert got.n_cols == want.n_cols
    assert torch.equal(got.indptr.cpu(), want.indptr.cpu())
    assert torch.equal(got.indices.cpu(), want.indices.cpu())
    torch.testing.assert_close(got.values.cpu(), want.values.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [(5, 37, 211, 7), (17, 13, 131, 1), (3, 7, 29, 29), (1, 64, 1031, 32), (33, 5, 513, 3), (2, 3, 1, 1)],
    ids=lambda v: str(v),
)
def test_topk_equals_reference(backend, n, d_in, d_sae, k, device):
    usable(backend, device)
    x, encoder = integers(n, d_in, d_sae)
    got = sk.encode_topk(x.to(device), encoder.to(device), k, backend=backend)
    assert_equal(got, sk.reference.encode_topk(x, encoder, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_shapes_strides(backend, dtype, device):
    usable(backend, device)
    x, encoder = integers(12, 19, 150, dtype=dtype)
    wide = torch.stack([x, x + 1], dim=-1).to(dtype)  # every other element belongs to x
    strided = wide[..., 0].view(2, 6, 19).transpose(0, 1)
    assert not strided.is_contiguous()
    got = sk.encode_topk(strided.to(device), encoder.to(device), 5, backend=backend)
    assert got.values.shape == (6, 2, 5)
    want = sk.reference.encode_topk(x, encoder, 5)
    assert torch.equal(got.values.cpu(), want.values.view(2, 6, 5).transpose(0, 1))
    assert torch.equal(got.indices.cpu(), want.indices.view(2, 6, 5).transpose(0, 1))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_an_encoder_of_any_tensors(backend, permute, device):
    """Parameters, a transposed weight, a bias that is a column or narrow: kernels read memory as it lies."""
    usable(backend, device)
    x, encoder = (part.to(device) for part in integers(5, 16, 200, low=-20))
    weight, bias = encoder.weight.t().contiguous().t(), torch.stack([encoder.bias, encoder.bias + 9], 1)[:, 0]
    want, above = (
        sk.reference.encode_topk(x, encoder, 7),
        sk.reference.encode_threshold(x, encoder, threshold=3),
    )
    for parts in (
        (torch.nn.Parameter(encoder.weight), torch.nn.Parameter(bias)),
        (weight, encoder.bias.bfloat16()),
        (weight, bias.double()),
    ):
        made = sk.PackedEncoder(
            *parts, threshold=bias.new_full((1,), 3).expand(200), permute=permute
        )._permuted()
        assert_equal(sk.encode_topk(x, made, 7, backend=backend), want)
        if backend in ("numba", "triton"):
            assert_equal(sk.encode_topk(x, made, 7, backend=backend, batch_invariant=True), want)
        assert_csr(sk.encode_threshold(x, made, backend=backend), above)
        compiled = torch.compile(sk.encode_topk, backend="eager", fullgraph=True)
        assert_equal(compiled(x, made, 7, backend=backend), want)
        torch.compiler.reset()


def test_a_parameter_of_an_encoder_is_watched(device):
    """Detaching it must not hide that an optimizer writes to it."""
    x, encoder = (part.to(device) for part in integers(3, 8, 60, permute=True))
    weight = torch.nn.Parameter(encoder.weight)
    made = sk.PackedEncoder(weight, encoder.bias, permutation=encoder.permutation)
    before = sk.encode_topk(x, made, 5, backend="torch")
    with torch.no_grad():
        weight.mul_(0)
        encoder.bias.fill_(1)
    assert bool((before.values > 1).any())
    assert sk.encode_topk(x, made, 5, backend="torch").values.unique().tolist() == [1.0]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_lazy_negatives(backend, device):
    """What torch has yet to negate lies in memory with the other sign."""
    usable(backend, device)
    x, encoder = (part.to(device) for part in integers(5, 16, 200, low=-20))
    lazy = torch._neg_view(-x)
    assert lazy.is_neg() and torch.equal(lazy, x)
    assert_equal(sk.encode_topk(lazy, encoder, 7, backend=backend), sk.reference.encode_topk(x, encoder, 7))
    above = sk.encode_threshold(lazy, encoder, threshold=3, backend=backend)
    assert_csr(above, sk.reference.encode_threshold(x, encoder, threshold=3))
    assert_equal(sk.topk(lazy, 3, backend=backend), sk.reference.topk(x, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend, device):
    usable(backend, device)
    _, encoder = integers(1, 8, 50)
    kept = sk.encode_topk(torch.zeros(3, 0, 8, device=device), encoder.to(device), 4, backend=backend)
    assert kept.values.shape == kept.indices.shape == (3, 0, 4)
    codes = sk.encode_threshold(
        torch.zeros(0, 8, device=device), encoder.to(device), threshold=1.0, backend=backend
    )
    assert codes.n_rows == 0 and codes.nnz == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_ties_go_to_the_lower_index(backend, permute, device):
    usable(backend, device)
    encoder = sk.pack_encoder(torch.ones(4, 300), torch.zeros(300), permute=permute).to(device)
    kept = sk.encode_topk(torch.ones(3, 4, device=device), encoder, 9, backend=backend)
    assert torch.equal(kept.indices.cpu(), torch.arange(9, dtype=torch.int32).expand(3, 9))
    assert bool((kept.values == 4).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_positive_activations(backend, device):
    """Values 0.0 at the lowest features that are not active, wherever the active ones are."""
    usable(backend, device)
    bias = torch.full((140,), -1.0)
    bias[[0, 2, 137]] = torch.tensor([2.0, 5.0, 3.0])
    encoder = sk.pack_encoder(torch.zeros(6, 140), bias).to(device)
    kept = sk.encode_topk(torch.ones(2, 6, device=device), encoder, 6, backend=backend)
    assert kept.values.tolist() == [[5.0, 3.0, 2.0, 0.0, 0.0, 0.0]] * 2
    assert kept.indices.tolist() == [[2, 137, 0, 1, 3, 4]] * 2
    silent = sk.pack_encoder(torch.zeros(6, 140), -torch.ones(140)).to(device)
    kept = sk.encode_topk(torch.ones(1, 6, device=device), silent, 4, backend=backend)
    assert kept.values.tolist() == [[0.0] * 4] and kept.indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf(backend, device):
    usable(backend, device)
    W = torch.zeros(3, 40)
    W[0, 5], W[1, 6], W[2, 7] = 1.0, 1.0, -1.0
    bias = torch.zeros(40)
    bias[30] = 8.0
    encoder = sk.pack_encoder(W, bias).to(device)
    x = torch.tensor([[torch.nan, 2.0, 1.0], [1.0, 1e38, 0.0], [1.0, 2.0, -3.0]], device=device)
    kept = sk.encode_topk(x, encoder, 3, backend=backend)
    assert kept.values[0].tolist() == [0.0] * 3  # a NaN in x reaches every feature
    assert kept.indices[0].tolist() == [0, 1, 2]
    assert kept.indices[1].tolist() == [6, 30, 5]
    assert kept.indices[2].tolist() == [30, 7, 6]
    # Infinite and NaN pre-activations in single features come from the bias.
    bias[31], bias[32], bias[33] = torch.inf, torch.nan, -torch.inf
    encoder = sk.pack_encoder(W, bias).to(device)
    kept = sk.encode_topk(x[2:], encoder, 3, backend=backend)
    assert kept.indices.tolist() == [[31, 30, 7]]
    assert kept.values.tolist() == [[torch.inf, 8.0, 3.0]]
    codes = sk.encode_threshold(x, encoder, threshold=7.5, backend=backend)
    assert codes.indices[codes.indptr[2] :].tolist() == [30, 31]
    with pytest.raises(ValueError, match="NaN or infinite"):
        sk.encode_topk(x, encoder, 3, backend=backend, check=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_huge_outlier(backend, device):
    usable(backend, device)
    x, encoder = integers(4, 16, 260, low=-5)
    x[:, 3] = 2.0**20
    got = sk.encode_topk(x.to(device), encoder.to(device), 11, backend=backend)
    assert_equal(got, sk.reference.encode_topk(x, encoder, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_floats(backend, device):
    """Real-valued inputs: values agree to rounding and each index carries its value."""
    usable(backend, device)
    x, W = torch.randn(40, 96), torch.randn(96, 700) / 10
    encoder = sk.pack_encoder(W, torch.randn(700) / 10)
    got = sk.encode_topk(x.to(device), encoder.to(device), 24, backend=backend)
    want = sk.reference.encode_topk(x, encoder, 24)
    torch.testing.assert_close(got.values.cpu(), want.values, rtol=1e-5, atol=1e-5)
    pre = sk.reference.pre_activations(x, encoder)
    torch.testing.assert_close(
        got.values.cpu(), pre.gather(1, got.indices.cpu().long()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_threshold_equals_reference(backend, permute, device):
    usable(backend, device)
    threshold = torch.arange(211).remainder(7).float() - 1
    x, encoder = integers(37, 23, 211, permute=permute, threshold=threshold)
    want = sk.reference.encode_threshold(x, encoder)
    assert 0 < want.nnz < 37 * 211 // 2
    assert_csr(sk.encode_threshold(x.to(device), encoder.to(device), backend=backend), want)
    got = sk.encode_threshold(x.view(37, 1, 23).to(device), encoder.to(device), threshold=4, backend=backend)
    assert_csr(got, sk.reference.encode_threshold(x, encoder, threshold=4.0))


def counted(x: torch.Tensor, encoder: sk.PackedEncoder, k: int, plan: Plan):
    """The grouped encoder's TopK, and how many groups it opened again."""
    opened = []
    select = triton_backend._select

    def spy(*args):
        result = select(*args)
        opened.append(int(result[2].sum()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "_select", spy)
        return triton_backend.encode_topk(x, encoder, k, plan), sum(opened)


def crowd(layout: str):
    """Winners where the grouped encoder would not have them: (x [6, 11], W [11, 400], bias, their order)."""
    x, encoder = integers(6, 11, 400, low=-9)
    W, bias = encoder.weight.t().clone(), encoder.bias.clone()
    if layout == "one_group":
        bias[group_columns(400)[1, :20].long()] += 200.0
    elif layout == "matryoshka":
        bias += torch.arange(400).flip(0) // 4
    elif layout == "duplicates":
        W, bias = W[:, torch.arange(400) // 8], bias[torch.arange(400) // 8]
    return x, W, bias


@triton.jit
def _columns_kernel(out_ptr, G, F, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.arange(0, SIZE)[None, :]
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    columns = group_column(group, position, G, F, SIZE)
    tl.store(out_ptr + group * SIZE + position, columns, mask=group < G)


def group_columns(d_sae: int, size: int = 32) -> torch.Tensor:
    """The packed columns int32 [groups, size], d_sae where there is none."""
    groups = -(-d_sae // (4 * size)) * 4
    columns = torch.empty(
        groups, size, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    _columns_kernel[(-(-groups // 1024),)](columns, groups, d_sae, SIZE=size, BLOCK=1024)
    return columns.cpu()


@pytest.mark.parametrize("plan", [small(1), small(2, tree=False), small(2, 64), small(3)], ids=str)
@pytest.mark.parametrize("layout", ["one_group", "matryoshka", "duplicates", "random"])
def test_certificate_fires_and_the_answer_stands(plan, layout, device):
    """Winners in one group, T kept of each: groups must be re-opened, and it must help."""
    x, W, bias = crowd(layout)
    encoder = sk.pack_encoder(W, bias, permute=layout == "random").to(device)
    got, opened = counted(x.to(device), encoder, 20, plan)
    assert opened > 0 or plan.T > 1
    assert opened > 0 or layout != "one_group"
    assert_equal(got, sk.reference.encode_topk(x.to(device), encoder, 20))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("d_sae", [1, 5, 129, 300, 1100, 4096, 16384 + 8, 24576, 32768, 65536, 131072, 65537])
def test_groups_spread_what_lies_together(d_sae, size):
    """Every column is in one group, where columns ascend; neighbours and copies of blocks are not.

    But for one pair of neighbours, where the halves meet.
    """
    columns = group_columns(d_sae, size)
    kept = [row[row < d_sae] for row in columns]
    assert all((row.diff() > 0).all() for row in kept)
    assert torch.equal(torch.cat(kept).sort().values, torch.arange(d_sae, dtype=torch.int32))
    owner = torch.full((d_sae + 1,), -1)
    owner[columns.long()] = torch.arange(len(columns))[:, None].expand(-1, size)
    owner = owner[:-1]
    assert (owner[1:] == owner[:-1]).sum() <= 1
    blocks = {d_sae // m for m in (2, 3, 4, 6, 8, 16, 64) if d_sae % m == 0} | {128, 512, 1000}
    for block in blocks if d_sae >= 4096 and d_sae % (4 * size) == 0 else ():
        for shift in range(block, min(d_sae, min(8, len(columns) // 8 - 1) * block), block):
            assert (owner[shift:] != owner[:-shift]).all(), (block, shift)


@pytest.mark.parametrize("plan", [small(1), small(2, 64), small(2, tree=False)], ids=str)
@pytest.mark.parametrize("bulk", ["zero rows", "duplicates", "ones"])
def test_ties_in_bulk_open_few_groups(plan, bulk, device):
    """Where thousands of activations are equal, only groups that may hide one of the lowest are opened."""
    d_sae, k = 2048, 16
    W, bias, x = torch.randn(8, d_sae), torch.ones(d_sae), torch.zeros(6, 8)
    if bulk == "duplicates":
        x = torch.randint(-3, 4, (6, 8)).float()
        W, bias = torch.randint(-3, 4, (8, 32)).float()[:, torch.arange(d_sae) // 64], bias
    elif bulk == "ones":
        x, W = torch.ones(6, 8), torch.ones(8, d_sae)
    encoder = sk.pack_encoder(W, bias).to(device)
    got, opened = counted(x.to(device), encoder, k, plan)
    assert_equal(got, sk.reference.encode_topk(x.to(device), encoder, k))
    assert opened <= 6 * k


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("size", [32, 64])
def test_neighbouring_floats_in_one_group(T, size, device):
    """Activations that differ only in the bits which give way to the position are still told apart."""
    order = torch.randperm(4 * size)
    bias = 1 + order.float() * 2.0**-23
    assert bias.unique().numel() == 4 * size
    encoder = sk.pack_encoder(torch.zeros(4, 4 * size), bias, permute=False).to(device)
    got = triton_backend.encode_topk(torch.zeros(2, 4, device=device), encoder, 30, small(T, size))
    assert_equal(got, sk.reference.encode_topk(torch.zeros(2, 4, device=device), encoder, 30))


@pytest.mark.parametrize("where", ["bias", "row"])
def test_nan_in_the_tree(where, device):
    """NaN of either sign, with infinities beside it, in one row or in one feature."""
    x, encoder = integers(5, 9, 300)
    worst = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )
    if where == "bias":
        encoder.bias[:5], encoder.bias[70:72] = worst, torch.tensor([torch.inf, -torch.inf])
    else:
        x[1, :5] = worst
        x[3, 0] = torch.inf
    for plan in (small(2, 64), small(1), small(2, tree=False)):
        got = triton_backend.encode_topk(x.to(device), encoder.to(device), 12, plan)
        assert_equal(got, sk.reference.encode_topk(x, encoder, 12))


def test_reopening_is_rare(device):
    """On Gaussian activations about as many groups are opened again as the Poisson estimate says."""
    from saerl_kernels._triton.tune import reopened

    d_sae, k, n = 2048, 8, 24
    encoder = sk.pack_encoder(torch.randn(16, d_sae), torch.randn(d_sae)).to(device)
    expected = {pair: n * reopened(d_sae, k, *pair) for pair in ((1, 64), (2, 32))}
    assert expected[2, 32] < 2 < 15 < expected[1, 64]
    for (T, size), groups in expected.items():
        _, opened = counted(torch.randn(n, 16, device=device), encoder, k, small(T, size))
        assert opened <= 2 * groups + 4
    assert opened < n


def test_row_chunks_and_tiles(monkeypatch, device):
    """More rows than scratch holds, and more candidates than one tile."""
    x, encoder = integers(40, 9, 700, permute=True)
    monkeypatch.setattr(triton_backend, "SCRATCH", 1)
    monkeypatch.setattr(triton_backend, "TILE", 16)
    got = triton_backend.encode_topk(x.to(device), encoder.to(device), 6, small(2))
    assert_equal(got, sk.reference.encode_topk(x, encoder, 6))


def test_every_feature_is_asked_for(device):
    """The keys of a program's rows are many more than its candidates."""
    x, encoder = integers(2, 4, 520, low=-90)
    got = triton_backend.encode_topk(x.to(device), encoder.to(device), 520, small(1))
    assert_equal(got, sk.reference.encode_topk(x, encoder, 520))


def test_numba_blocks(monkeypatch):
    from saerl_kernels import _numba

    x, encoder = integers(70, 9, 501)
    monkeypatch.setattr(_numba, "ROWS", 32)
    monkeypatch.setattr(_numba, "MIN_COLUMNS", 37)
    monkeypatch.setattr(_numba, "BLOCK", 1)
    assert_equal(sk.encode_topk(x, encoder, 13, backend="numba"), sk.reference.encode_topk(x, encoder, 13))
    got = sk.encode_threshold(x, encoder, threshold=2.0, backend="numba")
    assert_csr(got, sk.reference.encode_threshold(x, encoder, threshold=2.0))


@pytest.mark.parametrize("n", [1, 3, 7, 8, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_numba_few_rows(n, threads, monkeypatch):
    """Rows that are encoded at once: by our own product, by torch's, and with the features shared out."""
    from saerl_kernels import _numba

    x, encoder = integers(n, 9, 700)
    want = sk.reference.encode_topk(x, encoder, 13)
    wide, W = torch.randn(n, 1000), torch.randn(1000, 2500)  # enough work for threads
    real = sk.pack_encoder(W, torch.randn(2500))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for own in (_numba.FEW_SMALL, 0, 100):
            monkeypatch.setattr(_numba, "FEW_SMALL", own)
            assert_equal(sk.encode_topk(x, encoder, 13, backend="numba"), want)
            got = sk.encode_topk(wide, real, 20, backend="numba")
            torch.testing.assert_close(
                got.values, sk.reference.encode_topk(wide, real, 20).values, rtol=1e-5, atol=1e-4
            )
    finally:
        torch.set_num_threads(before)


def test_numba_threads():
    """Rows split over a pool of threads, also called from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    x, encoder = integers(131, 9, 700)
    want = sk.reference.encode_topk(x, encoder, 13)
    codes = sk.reference.encode_threshold(x, encoder, threshold=2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2) as pool:
            kept = list(pool.map(lambda _: sk.encode_topk(x, encoder, 13, backend="numba"), range(4)))
        for got in kept:
            assert_equal(got, want)
        assert_csr(sk.encode_threshold(x, encoder, threshold=2.0, backend="numba"), codes)
        assert_equal(sk.topk(x, 5, backend="numba"), sk.reference.topk(x, 5))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("n", "width"), [(3, 128), (20, 128), (20, 131), (20, 200), (9, 2)])
def test_torch_ties_at_the_last_place(n, width):
    """Values in eighths of 0 .. 5 tie at the k-th place of many rows, and elsewhere in others."""
    from saerl_kernels import _torch

    scores = torch.randint(-40, 41, (n, width)) / 8
    scores[0, : width // 2], scores[1] = torch.nan, -1.0
    scores[2] = torch.randperm(width) + 1.0  # nothing to settle
    want = torch.where(scores > 0, scores, 0.0)
    got = _torch.exact_topk(scores.clone(), 2, relu=True)
    assert_equal(got, sk.reference.topk(want, 2))
    finite = torch.where(scores.isnan(), -torch.inf, scores)
    assert_equal(_torch.exact_topk(finite.clone(), 2), sk.reference.topk(finite, 2))


@settings(max_examples=30)
@given(st.data())
def test_fuzz(data):
    draw = data.draw
    d_sae = draw(st.integers(1, 200))
    n, d_in, k = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, min(d_sae, 40)))
    options = {"low": draw(st.sampled_from([-200, -40, 5])), "permute": draw(st.booleans())}
    x, encoder = integers(n, d_in, d_sae, seed=draw(st.integers(0, 99)), **options)
    want = sk.reference.encode_topk(x, encoder, k)
    for backend in ("torch", "numba"):
        assert_equal(sk.encode_topk(x, encoder, k, backend=backend), want)


@settings(max_examples=6)
@given(st.integers(1, 300), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 99))
def test_fuzz_groups(d_sae, T, size, seed):
    x, encoder = integers(5, 9, d_sae, seed=seed, permute=seed % 2 == 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    k = min(d_sae, 1 + seed % 5)
    got = triton_backend.encode_topk(x.to(device), encoder.to(device), k, small(T, size))
    assert_equal(got, sk.reference.encode_topk(x, encoder, k))


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_compiles_as_one_custom_op(permute, device):
    x, encoder = integers(6, 12, 90, permute=permute)
    x, encoder = x.view(2, 3, 12).to(device), encoder.to(device)
    compiled = torch.compile(
        lambda x: sk.encode_topk(x, encoder, 5).values * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x), sk.encode_topk(x, encoder, 5).values * 2)
    args = (encoder.prepare(x), encoder.weight, encoder.bias, encoder.permutation, 5, "torch")
    from saerl_kernels.library import encode_rows

    torch.library.opcheck(encode_rows, args)


def test_errors(device):
    x, encoder = integers(2, 8, 30)
    for k in (0, 31, True, 2.0):
        with pytest.raises(ValueError, match="k="):
            sk.encode_topk(x, encoder, k)
    with pytest.raises(ValueError, match="d_in=8"):
        sk.encode_topk(x[:, :7], encoder, 3)
    with pytest.raises(ValueError, match="floating point"):
        sk.encode_topk(x.int(), encoder, 3)
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        sk.encode_topk(x, encoder, 3, backend="cuda")
    with pytest.raises(ValueError, match="no threshold"):
        sk.encode_threshold(x, encoder)
    with pytest.raises(ValueError, match="threshold has shape"):
        sk.encode_threshold(x, encoder, threshold=torch.zeros(29))


def test_backend_choice(monkeypatch):
    from saerl_kernels.dispatch import resolve

    cpu = torch.device("cpu")
    monkeypatch.delenv("SAERL_KERNELS_BACKEND", raising=False)
    assert resolve("auto", cpu) == "numba"
    monkeypatch.setenv("SAERL_KERNELS_BACKEND", "torch")
    assert resolve("auto", cpu) == "torch"
    with sk.use_backend("reference"):
        assert resolve("auto", cpu) == "reference"
        assert resolve("numba", cpu) == "numba"
    assert resolve("auto", cpu) == "torch"
    monkeypatch.setenv("SAERL_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SAERL_KERNELS_BACKEND='fast'"):
        resolve("auto", cpu)
    monkeypatch.delenv("SAERL_KERNELS_BACKEND")
    monkeypatch.setattr("saerl_kernels.dispatch.has_numba", lambda: False)
    assert resolve("auto", cpu) == "torch"
    monkeypatch.setattr("saerl_kernels.dispatch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve("triton", cpu)


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_autocast_changes_nothing(backend, device):
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    _, encoder = integers(1, 12, 90)
    encoder = encoder.to(device)
    for n in (2, 7, 20):  # on a CPU: our own product, one product held whole, or blocks
        x = torch.randn(n, 12, device=device)
        plain = sk.encode_topk(x, encoder, 5, backend=backend)
        rows = sk.encode_pool(x, [0, n], encoder, 5, backend=backend)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert_equal(sk.encode_topk(x, encoder, 5, backend=backend), plain)
            assert torch.equal(sk.encode_pool(x, [0, n], encoder, 5, backend=backend).values, rows.values)


def test_more_than_the_gpu_kernels_hold():
    x, encoder = integers(3, 8, 1100, permute=True)
    got = sk.encode_topk(x, encoder, 1030, backend="triton")
    assert_equal(got, float64_topk(x, encoder, 1030))


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    from types import SimpleNamespace

    from saerl_kernels import _triton
    from saerl_kernels._triton import device as launching
    from saerl_kernels._triton import kmeans

    current = []

    @contextlib.contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(launching.torch.cuda, "device", guard)
    seen = launching.on_device(lambda first, shift: (list(current), shift))
    second = SimpleNamespace(device=torch.device("cuda", 1))
    assert seen(second, shift=3) == ([torch.device("cuda", 1)], 3)
    assert seen(SimpleNamespace(device=torch.device("cpu")), 3) == ([], 3)
    launchers = [getattr(_triton, name) for name in _triton.__all__] + [kmeans.assign, kmeans.update]
    assert all(hasattr(launcher, "__wrapped__") for launcher in launchers)
