"""The encoders to train with: selections, gradients, determinism, memory, torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import saerl_kernels as sk
from saerl_kernels import _grads
from saerl_kernels._batch import batch_topk
from saerl_kernels.dispatch import implementation
from tests.encoders import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    return request.param


def problem(n, d_in, d_sae, device, dtype=torch.float32, shift=0.0):
    g = torch.Generator().manual_seed(n * d_in + d_sae)
    at = {"device": device, "dtype": dtype}
    x = torch.randn(n, d_in, generator=g).to(**at)
    W = (torch.randn(d_in, d_sae, generator=g) / d_in**0.5).to(**at).requires_grad_()
    b = (torch.randn(d_sae, generator=g) * 0.1 + shift).to(**at).requires_grad_()
    c = (torch.randn(d_in, generator=g) * 0.1).to(**at).requires_grad_()
    return x.requires_grad_(), W, b, c


def gradients(kept, target, inputs):
    """Of a loss that weighs every selected feature differently."""
    loss = (kept.values * target[: len(kept.values)].gather(1, kept.indices.long())).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k", "shift"),
    [(5, 7, 31, 3, 0.0), (1, 1, 1, 1, 0.0), (9, 130, 67, 5, 0.0), (4, 6, 40, 40, -0.5), (6, 9, 33, 8, -3.0)],
    ids=str,
)
@pytest.mark.parametrize("mode", ["topk", "signed", "batch", "features"])
def test_equals_reference(backend, n, d_in, d_sae, k, shift, mode, device):
    x, W, b, c = problem(n, d_in, d_sae, device, shift=shift)
    options = {"b_dec": c}
    if mode == "signed":
        options["relu"] = False
    if mode == "features":
        options["features"] = torch.randperm(d_sae, device=device)[: max(1, d_sae // 2)]
        k = min(k, len(options["features"]))
    name = "encode_batch_topk_train" if mode == "batch" else "encode_topk_train"
    got = getattr(sk, name)(x, W, b, k, backend=backend, **options)
    want = getattr(sk.reference, name)(x, W, b, k, **options)
    assert got.values.dtype == torch.float32 and got.indices.dtype == torch.int32
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.indices, want.indices)
    target = torch.randn(n, d_sae, device=device)
    found, expected = (gradients(kept, target, (x, W, b, c)) for kept in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["topk", "signed", "batch"])
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_gradcheck(name, mode, device):
    if name == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    inputs = problem(4, 5, 12, device, torch.float64)
    options = {"relu": False} if mode == "signed" else {}

    def values(x, W, b, c):
        if mode == "batch":
            return sk.encode_batch_topk_train(x, W, b, 2, b_dec=c, backend=name).values
        return sk.encode_topk_train(x, W, b, 3, b_dec=c, backend=name, **options).values

    # the interpreter is slow; ranking in float32 needs no smaller step than this
    assert torch.autograd.gradcheck(values, inputs, fast_mode=name == "triton", eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_products_give_full_gradients(backend, dtype, device):
    """float32 master weights, products in 16 bits: gradients are float32 and close to the reference's."""
    x, W, b, c = problem(8, 16, 48, device)
    got = sk.encode_topk_train(x, W, b, 4, b_dec=c, dtype=dtype, backend=backend)
    want = sk.reference.encode_topk_train(x, W, b, 4, b_dec=c, dtype=dtype)
    torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)
    target = torch.randn(8, 48, device=device)
    found, expected = (gradients(kept, target, (x, W, b, c)) for kept in (got, want))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert {a.dtype for a in found} == {torch.float32}
    half = problem(8, 16, 48, device, dtype)
    for a in gradients(sk.encode_topk_train(half[0], *half[1:3], 4, backend=backend), target, half[:3]):
        assert a.dtype == dtype and bool(a.isfinite().all())


def test_only_what_needs_a_gradient_gets_one(backend, device):
    x, W, b, _ = problem(3, 4, 9, device)
    values = sk.encode_topk_train(x.detach(), W, b.detach(), 2, backend=backend).values
    assert torch.autograd.grad(values.sum(), W)[0].shape == W.shape
    values, indices = sk.encode_topk_train(x, W.detach(), None, 2, backend=backend)
    assert values.requires_grad and not indices.requires_grad
    assert torch.autograd.grad(values.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_and_leading_dimensions(backend, transposed, device):
    x, W, b, _ = problem(6, 8, 20, device)
    weight = W.detach().t().contiguous().requires_grad_()
    given = weight.t() if transposed else W
    got = sk.encode_topk_train(x.view(2, 3, 8), given, b, 4, backend=backend)
    assert got.values.shape == (2, 3, 4)
    got.values.square().sum().backward()
    want = torch.autograd.grad(sk.reference.encode_topk_train(x, W, b, 4).values.square().sum(), W)[0]
    torch.testing.assert_close((weight.grad.t() if transposed else W.grad), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["column", "expanded"])
def test_biases_of_any_strides(backend, layout, device):
    """A GPU kernel reads the bias as it lies in memory: a view with gaps is not whole."""
    x, W, b, c = problem(6, 9, 70, device)
    b = b.detach()
    view = torch.stack([b, b + 5], 1)[:, 0] if layout == "column" else b[:1].expand(70)
    c = torch.stack([c.detach(), c.detach() + 5], 1)[:, 0]
    for call in (sk.encode_topk_train, sk.encode_batch_topk_train):
        got, want = (call(x, W, bias, 5, b_dec=c, backend=backend) for bias in (view, view.contiguous()))
        assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)
    got = sk.encode_topk_train(x, W, view, 5, b_dec=c, backend=backend)
    want = sk.reference.encode_topk_train(x, W, view, 5, b_dec=c)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values)


def test_empty_batch(backend, device):
    _, W, b, c = problem(1, 4, 9, device)
    x = torch.zeros(0, 4, device=device)
    for kept in (
        sk.encode_topk_train(x, W, b, 3, b_dec=c, backend=backend),
        sk.encode_batch_topk_train(x, W, b, 3, b_dec=c, backend=backend),
    ):
        kept.values.sum().backward()
        assert kept.values.shape[0] == 0 and bool((W.grad == 0).all()) and bool((b.grad == 0).all())


@settings(max_examples=15)
@given(data=st.data())
def test_segment_sums(data):
    """Any multiset of entries, with fixed width and as CSR, in chunks shorter than a feature's segment."""
    n, d_sae = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6))
    d_in, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    indices = torch.tensor(
        data.draw(st.lists(st.integers(0, d_sae - 1), min_size=n * k, max_size=n * k)), dtype=torch.int32
    ).view(n, k)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dense, values = torch.randn(n, d_in, generator=g), torch.randn(n, k, generator=g)
    weight = torch.randn(d_sae, d_in, generator=g)
    rows = torch.arange(n).repeat_interleave(k)
    want = torch.zeros(d_sae, d_in).index_add_(0, indices.reshape(-1), values.view(-1, 1) * dense[rows])
    sums = torch.zeros(d_sae).index_add_(0, indices.reshape(-1), values.reshape(-1))
    dots = (dense[rows] * weight[indices.reshape(-1).long()]).sum(-1)
    indptr = torch.arange(n + 1) * k
    for name in BACKENDS:
        module = implementation(name)
        extra = {"chunk": 2} if name == "triton" else {}
        for ptr, shape in ((None, (n, k)), (indptr, (n * k,))):
            entries = values.reshape(shape), indices.reshape(shape)
            total, bias = module.weight_grads(dense, *entries, d_sae, ptr, **extra)
            torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bias, sums, rtol=1e-5, atol=1e-5)
            found = module.value_grads(dense, entries[1], weight, ptr)
            assert found.shape == shape
            torch.testing.assert_close(found.reshape(-1), dots, rtol=1e-5, atol=1e-5)


def test_a_feature_of_every_token(backend, device):
    """A segment of 700 entries is summed in chunks on the GPU path, and is right, and is reproducible."""
    dense, values = torch.randn(700, 5, device=device), torch.randn(700, 2, device=device)
    indices = torch.stack([torch.full((700,), 3), torch.arange(700) % 7], 1).int().to(device)
    module = implementation(backend)
    total, sums = module.weight_grads(dense, values, indices, 8)
    again, _ = module.weight_grads(dense, values, indices, 8)
    assert torch.equal(total, again)
    coefficients = torch.zeros(700, 8, dtype=torch.float64, device=device)
    coefficients.scatter_add_(1, indices.long(), values.double())
    torch.testing.assert_close(total.double(), coefficients.t() @ dense.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.double(), coefficients.sum(0), rtol=1e-5, atol=1e-4)


def test_bitwise_deterministic(backend, device):
    x, W, b, c = problem(12, 9, 40, device)
    target = torch.randn(12, 40, device=device)
    for function in (sk.encode_topk_train, sk.encode_batch_topk_train):
        first, second = (
            gradients(function(x, W, b, 6, b_dec=c, backend=backend), target, (x, W, b, c)) for _ in range(2)
        )
        assert all(map(torch.equal, first, second))


class Largest(TorchDispatchMode):
    """The most bytes in any tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return out


def test_no_dense_temporary(backend, device, monkeypatch):
    """The backward pass makes nothing near n * k * d_in, and no n * d_sae matrix."""
    n, d_in, d_sae, k = 20, 16, 128, 12
    monkeypatch.setattr(_grads, "CPU_CHUNK", 1 << 10)
    W, W_dec = (torch.randn(d_sae, d_in, device=device, requires_grad=True) for _ in range(2))
    x, b = torch.randn(n, d_in, device=device), torch.zeros(d_sae, device=device, requires_grad=True)
    values, indices = sk.encode_topk_train(x, W.t(), b, k, backend=backend)
    loss = (x - sk.sparse_decode(values, indices, W_dec, backend=backend)).square().mean()
    with Largest() as seen:
        loss.backward()
    assert seen.size == 4 * d_sae * d_in < 4 * min(n * k * d_in, n * d_sae)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="torch.compile refuses them before 2.10",
)
def test_compiles(device):
    x, W, b, c = problem(6, 8, 32, device)

    def loss(x, W, b, c):
        kept = sk.encode_topk_train(x, W, b, 3, b_dec=c)
        return (kept.values.square() * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, W, b, c), (x, W, b, c))
    want = torch.autograd.grad(loss(x, W, b, c), (x, W, b, c))
    torch.testing.assert_close(got, want)
    from saerl_kernels.train import _encode_op

    for mode in ("topk", "signed"):
        torch.library.opcheck(_encode_op, (x, W.t(), b, c, 3, mode, None, "auto"))
    wide = torch.compile(
        lambda *args: sk.encode_batch_topk_train(*args, 3).values.sum(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(wide(x, W, b), sk.encode_batch_topk_train(x, W, b, 3).values.sum())


@given(data=st.data())
def test_batch_topk_is_exact(data):
    """Small integers as scores: ties everywhere, also at the threshold, NaN and infinities among them."""
    n, d_sae = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    entry = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 2.0, 3.0, 1e-30, 1e30, float("inf"), float("nan")])
    scores = torch.tensor(data.draw(st.lists(entry, min_size=n * d_sae, max_size=n * d_sae))).view(n, d_sae)
    count = data.draw(st.integers(1, n * d_sae))
    clean = torch.where(scores > 0, scores, 0.0)
    chosen = clean.reshape(-1).sort(descending=True, stable=True).indices[:count]
    want = torch.zeros(n * d_sae).index_copy_(0, chosen, clean.reshape(-1)[chosen]).view(n, d_sae)

    def score(rows, weight, bias, out):
        return out.copy_(scores[rows[:, 0].long()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saerl_kernels._batch.linear", score)
        patch.setattr("saerl_kernels._batch.FIRST_ROWS", 1)
        encoder = sk.PackedEncoder(torch.zeros(d_sae, 1), torch.zeros(d_sae))
        rows = torch.arange(n).float().view(n, 1)
        for name in ("torch", "numba"):
            module = implementation(name)
            gather = getattr(module, "gather_survivors", None)
            kept = batch_topk(rows, encoder, count, *([gather] if gather else []))
            dense = torch.zeros(n, d_sae).scatter_add_(1, kept.indices.long(), kept.values)
            assert torch.equal(dense, want)
            assert kept.values.shape[1] == max(1, int((want > 0).sum(1).max()))
            assert bool((kept.values.diff(dim=1) <= 0).logical_or(kept.values[:, 1:].isinf()).all())


def test_batch_topk_counts(backend, device):
    x, W, b, _ = problem(50, 16, 200, device)
    kept = sk.encode_batch_topk_train(x, W, b, 5, backend=backend)
    assert int((kept.values > 0).sum()) == 250
    dense = torch.relu(x @ W + b)
    assert float(kept.values.detach()[kept.values > 0].min()) == pytest.approx(
        float(dense.detach().flatten().topk(250).values[-1]), rel=1e-5
    )


@pytest.mark.parametrize("k", [1.5, 0.37, 5.0, 0.001])
def test_batch_topk_takes_a_fraction_of_k(backend, device, k):
    """SAELens' BatchTopK keeps int(k * n) activations of n rows."""
    x, W, b, _ = problem(50, 16, 200, device)
    kept = sk.encode_batch_topk_train(x, W, b, k, backend=backend)
    want = torch.relu(x @ W + b).detach().flatten().topk(int(k * 50)).values
    got = kept.values.detach()[kept.values > 0].sort(descending=True).values
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    kept.values.sum().backward()
    assert torch.isfinite(W.grad).all() and bool(W.grad.abs().sum() > 0) == (int(k * 50) > 0)


@pytest.mark.parametrize("k", [0, -1.5, float("nan"), True, "2", 200.5])
def test_a_bad_average_is_one_sentence(device, k):
    x, W, b, _ = problem(3, 4, 9, device)
    with pytest.raises(ValueError, match="k="):
        sk.encode_batch_topk_train(x, W, b, k)


def test_errors(device):
    x, W, b, c = (t.detach() for t in problem(3, 4, 9, device))
    for function in (sk.encode_topk_train, sk.encode_batch_topk_train):
        with pytest.raises(ValueError, match="k=10 is larger than"):
            function(x, W, b, 10)
        with pytest.raises(ValueError, match=r"last dimension must be d_in=4"):
            function(x[:, :3], W, b, 2)
        with pytest.raises(ValueError, match=r"b_enc has shape \(4,\), expected \(9,\)"):
            function(x, W, c, 2)
        with pytest.raises(ValueError, match=r"b_dec has shape \(9,\), expected \(4,\)"):
            function(x, W, b, 2, b_dec=b)
        with pytest.raises(ValueError, match="x must be floating point"):
            function(x.int(), W, b, 2)
        with pytest.raises(ValueError, match="float64 is not supported"):
            function(x, W, b, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="features must be integers"):
        sk.encode_topk_train(x, W, b, 2, features=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match="k=3 is larger than the number of features=2"):
        sk.encode_topk_train(x, W, b, 3, features=torch.tensor([1, 2], device=device))
    with pytest.raises(ValueError, match=r"x must be \[n, d_in\]"):
        sk.encode_batch_topk_train(x[None], W, b, 2)


def test_autocast_changes_nothing(backend, device):
    for n in (2, 7, 20):
        x, W, b, c = problem(n, 12, 40, device)
        target = torch.randn(n, 40, device=device)
        for encode in (sk.encode_topk_train, sk.encode_batch_topk_train):
            found = []
            for on in (False, True):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on):
                    kept = encode(x, W, b, 4, b_dec=c, backend=backend)
                    found.append([kept.values, *gradients(kept, target, (x, W, b, c))])
            assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_padding_of_batch_topk_hides_no_activation(backend, device):
    """Rows are padded with 0.0 at feature 0, which is active in every row here."""
    x = torch.ones(3, 2, device=device) * torch.tensor([[1.0], [2.0], [5.0]], device=device)
    kept = sk.encode_batch_topk_train(x, torch.ones(2, 6, device=device), None, 3, backend=backend)
    dense = kept.to_dense(6)
    assert dense.sum() == kept.values.sum() and (dense > 0).sum() == 9
