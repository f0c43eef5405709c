"""Ops inside torch.compile, their tags, and one token's NaN. torch.func: test_transforms.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import decode, library, train
from tests.encoders import BACKENDS

newer = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="torch.compile refuses them before 2.10",
)
CPU_ONLY = [name for name in BACKENDS if name != "triton"]


def parameters(d_in=8, d_sae=40):
    g = torch.Generator().manual_seed(3)
    W, D = torch.randn(d_sae, d_in, generator=g), torch.randn(d_sae, d_in, generator=g)
    parts = (W, torch.randn(d_sae, generator=g), D, torch.randn(d_in, generator=g))
    return [part.requires_grad_() for part in parts], torch.randn(12, d_in, generator=g)


def step(x, W, b, D, c, backend="auto"):
    """A training step's loss: TopK, a reconstruction, and the auxiliary one of dead features."""
    kept = sk.encode_topk_train(x, W.t(), b, 5, b_dec=c, backend=backend)
    error = x - sk.sparse_decode(*kept, D, c, backend=backend)
    dead = torch.arange(3, 30, 3, device=x.device)
    spare = sk.encode_topk_train(x, W.t(), b, 2, b_dec=c, features=dead, relu=False, backend=backend)
    rest = error.detach() - sk.sparse_decode(*spare, D, backend=backend)
    return error.square().mean() + rest.square().mean() / 32


def batch_step(x, W, b, D, c, backend="auto"):
    kept = sk.encode_batch_topk_train(x, W.t(), b, 5, b_dec=c, backend=backend)
    return (x - sk.sparse_decode(*kept, D, c, backend=backend)).square().mean()


@newer
@pytest.mark.parametrize("backend", CPU_ONLY)
@pytest.mark.parametrize("loss", [step, batch_step])
def test_a_whole_training_step_compiles(loss, backend):
    weights, x = parameters()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(x, *weights, backend=backend)
    want = loss(x, *weights, backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights))


@newer
def test_rows_of_any_length_compile():
    weights, _ = parameters()
    csr = sk.CSR.from_dense(torch.relu(torch.randn(6, 40)))
    values = csr.values.requires_grad_()

    def loss(values, D):
        return sk.decode_csr(sk.CSR(csr.indptr, csr.indices, values, 40), D).square().sum()

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(values, weights[2])
    want = loss(values, weights[2])
    torch.testing.assert_close(
        torch.autograd.grad(got, (values, weights[2])), torch.autograd.grad(want, (values, weights[2]))
    )


@newer
@pytest.mark.parametrize("backend", CPU_ONLY)
@pytest.mark.parametrize(("k", "reduce"), [(5, "mean"), (None, "last")])
def test_pooling_compiles(k, reduce, backend):
    """Offsets of several lengths, as a tensor and as a list, with a mask and weights."""
    torch.compiler.reset()
    (W, b, _, _), x = parameters()
    encoder = sk.pack_encoder(W.t(), b, threshold=0.5, normalize_activations="layer_norm", permute=True)
    mask, weights = torch.arange(12) % 3 > 0, torch.rand(12)

    def pooled(x, offsets, mask=None, weights=None):
        options = {"mask": mask, "weights": weights, "backend": backend}
        found = sk.encode_pool(x, offsets, encoder, k, reduce, **options)
        return found._replace(values=found.values * 2)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    for offsets, *rest in (
        (torch.tensor([0, 4, 12]),),
        (torch.tensor([0, 4, 4, 12]), mask, weights),
        ([0, 12], None, weights),
    ):
        got, want = compiled(x, offsets, *rest), pooled(x, offsets, *rest)
        assert torch.equal(got.to_dense(), want.to_dense()) and got.n_rows == len(offsets) - 1
    with pytest.raises(ValueError, match="offsets must end with n_tokens=12"):
        compiled(x, torch.tensor([0, 4, 11]))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_decode_is_a_sound_op(flat, check):
    values, D = torch.rand(4, 3).requires_grad_(), torch.randn(9, 5).requires_grad_()
    indices = torch.randint(0, 9, (4, 3), dtype=torch.int32)
    indptr = None
    if flat:
        indptr, indices = torch.tensor([0, 2, 2, 12]), indices.reshape(-1)
        values = values.detach().reshape(-1).requires_grad_()
    torch.library.opcheck(decode._decode_op, (values, indptr, indices, D, check, "auto"))


@newer
def test_a_check_inside_a_graph_is_kept():
    D, values = torch.randn(9, 5), torch.rand(2, 3)
    compiled = torch.compile(
        lambda i: sk.sparse_decode(values, i, D, check=True), fullgraph=True, backend="eager"
    )
    assert compiled(torch.full((2, 3), 8)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"outside 0\.\.8"):
        compiled(torch.full((2, 3), 9))
    free = torch.compile(lambda i: sk.sparse_decode(values, i, D), fullgraph=True, backend="eager")
    assert torch.equal(free(torch.full((2, 3), 9)), torch.zeros(2, 5))


def test_tags_say_what_waits_for_the_device():
    unsafe = torch.Tag.cudagraph_unsafe
    for op, waits in (
        (library.encode_rows, False),
        (library.encode_rows_waiting, True),
        (train._encode_op, False),
        (train._encode_op_waiting, True),
        (train._grads_op, False),
        (decode._decode_op, False),
        (decode._grads_op, False),
    ):
        assert (unsafe in op._opoverload.tags) == waits
    assert library.waits(1025, "auto") and library.waits(3, "torch") and not library.waits(1024, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_broken_token_stays_in_its_row(backend, value):
    """Its row is filled up with 0.0 at features 0, 1, ..: they are not its, and 0 times NaN is NaN."""
    weights, x = parameters()
    W, b, D, _ = weights
    x[5, 2] = value
    b = b.detach()
    kept = sk.encode_topk_train(x, W.t(), b, 5, backend=backend)
    out = sk.sparse_decode(*kept, D, backend=backend)
    loss = (x - out).square().sum()
    assert not bool(torch.isfinite(loss))
    for grad in torch.autograd.grad(loss, (W, D)):
        touched = kept.indices[5][kept.values[5] > 0].long()
        clean = torch.ones(40, dtype=torch.bool).index_fill_(0, touched, False)
        assert bool(torch.isfinite(grad[clean]).all())
        assert int(clean.sum()) >= 35


def test_numpy_is_refused_kindly():
    weights, x = parameters()
    W, b = weights[0].detach(), weights[1].detach()
    encoder = sk.pack_encoder(W.t(), b)
    with pytest.raises(ValueError, match=r"k is a numpy.int64; give int\(k\)"):
        sk.encode_topk(x, encoder, np.int64(3))
    with pytest.raises(ValueError, match="x is a ndarray; give a torch.Tensor"):
        sk.encode_topk(x.numpy(), encoder, 3)
    with pytest.raises(ValueError, match="W_enc is a ndarray"):
        sk.encode_topk_train(x, W.t().numpy(), b, 3)
    with pytest.raises(ValueError, match="values is a ndarray"):
        sk.sparse_decode(np.ones((2, 3)), torch.zeros(2, 3, dtype=torch.int64), W)
    with pytest.raises(ValueError, match="scores is a ndarray"):
        sk.topk(np.ones((2, 3)), 1)


def test_features_that_do_not_compete():
    weights, x = parameters()
    W, b = weights[0], weights[1]
    with pytest.raises(ValueError, match=r"features reach 0\.\.40"):
        sk.encode_topk_train(x, W.t(), b, 1, features=torch.tensor([0, 40]))
    with pytest.raises(ValueError, match="features holds a feature twice"):
        sk.encode_topk_train(x, W.t(), b, 1, features=torch.tensor([3, 7, 3]))
