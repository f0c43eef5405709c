"""Transforms of torch.func, forward mode, second derivatives, fake and meta tensors: right, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode

import saerl_kernels as sk

g = torch.Generator().manual_seed(0)
W, D = torch.randn(8, 40, generator=g), torch.randn(40, 8, generator=g)
b = torch.randn(40, generator=g)
x = torch.randn(3, 4, 8, generator=g)
ENCODER = sk.pack_encoder(W, b, threshold=0.5)
BOTH = sk.pack_both_signs(ENCODER)
KEPT = sk.encode_topk(x, ENCODER, 5)
CODES = sk.encode_threshold(x, ENCODER)
COLUMNS = torch.arange(8).expand(4, 8)
SOME, ENDS = torch.tensor([1, 9, 3]), torch.tensor([0, 32])

# Of rows [..., 8]; what does not depend on the data alone has a shape to be known before.
FIXED = {
    "encode_topk": lambda r: sk.encode_topk(r, ENCODER, 5).values,
    "module": lambda r: sk.SparseEncoder(ENCODER, k=5, output="dense")(r),
    "abs_topk": lambda r: sk.encode_abs_topk(r, BOTH, 5).values,
    "group_max": lambda r: sk.encode_group_max(r, ENCODER, 5).values,
    "topk": lambda r: sk.topk(r, 3).values,
    "train": lambda r: sk.encode_topk_train(r, W, b, 5).values,
    "features": lambda r: sk.encode_topk_train(r, W, b, 2, features=SOME, relu=False).values,
    "decode": lambda r: sk.sparse_decode(r, COLUMNS[: len(r)], D),
    "decoder": lambda r: sk.sparse_decode(KEPT.values[0], KEPT.indices[0] % 4, r),
}  # fmt: skip
FREE = {
    "encode_threshold": lambda r: sk.encode_threshold(r, ENCODER).values,
    "pool": lambda r: sk.encode_pool(r, [0, 4], ENCODER, 5).values,
    "batch": lambda r: sk.encode_batch_topk_train(r, W, b, 5).values,
    "decode_csr": lambda r: sk.decode_csr(sk.CSR(ENDS, torch.zeros(32).int(), r.reshape(-1), 40), D),
    "merge": lambda r: sk.merge_topk([sk.TopK(r.abs(), COLUMNS.int())], 3).values,
    "k-means": lambda r: sk.kmeans_assign(sk.CSR(ENDS // 4, COLUMNS[0].int(), r[0], 40), D[:, :2]),
    "pack": lambda r: sk.pack_encoder(r.t()).weight,
}  # fmt: skip
OPS = {**FIXED, **FREE}


def tangent(op):
    with forward_ad.dual_level():
        return op(forward_ad.make_dual(x[0], torch.ones_like(x[0])))


TRANSFORMS = {
    "vmap": lambda op: torch.func.vmap(op)(x),
    "grad": lambda op: torch.func.grad(lambda r: op(r).sum())(x[0]),
    "jvp": lambda op: torch.func.jvp(op, (x[0],), (x[0],)),
    "jacrev": lambda op: torch.func.jacrev(op)(x[0]),
    "jacfwd": lambda op: torch.func.jacfwd(op)(x[0]),
    "functionalize": lambda op: torch.func.functionalize(op)(x[0]),
    "forward mode": tangent,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_a_transform_is_refused_where_torch_would_fail_or_return_zeros(op, transform):
    with pytest.raises(NotImplementedError, match="takes any leading dimensions, and gradients"):
        TRANSFORMS[transform](OPS[op])


def test_an_ensemble_of_encoders_is_refused():
    modules = [sk.SparseEncoder(sk.pack_encoder(W * i, b), k=5, output="dense") for i in (1, 2)]
    _, buffers = torch.func.stack_module_state(modules)
    with pytest.raises(NotImplementedError, match="weight is inside torch.vmap"):
        torch.vmap(lambda state: torch.func.functional_call(modules[0], state, (x[0],)))(buffers)


def test_what_is_right_stays_allowed():
    """Outside the op, and in the parts that are plain torch."""
    bias = torch.randn(8)
    got = torch.func.grad(lambda c: sk.sparse_decode(KEPT.values, KEPT.indices, D, c).square().sum())(bias)
    want = 2 * sk.sparse_decode(KEPT.values, KEPT.indices, D, bias).sum((0, 1))
    torch.testing.assert_close(got, want)
    columns = torch.arange(8).int()
    assert torch.equal(torch.func.vmap(lambda v: sk.TopK(v, columns).to_dense(8))(x[0]), x[0])
    jacobian = torch.autograd.functional.jacobian(FIXED["train"], x[0])
    assert jacobian.shape == (4, 5, 4, 8) and int(jacobian.count_nonzero()) > 0


@pytest.mark.parametrize("op", ["train", "features", "batch", "decode", "decoder", "decode_csr"])
def test_second_derivatives_are_refused(op):
    rows = x[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(OPS[op](rows).square().sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only: leave out create_graph"):
        first.sum().backward()


@pytest.mark.parametrize("op", FIXED)
def test_fake_and_meta_tensors_have_the_shape(op):
    want = FIXED[op](x[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = FIXED[op](mode.from_tensor(x[0]))
    assert got.shape == want.shape and got.dtype == want.dtype


def test_meta_tensors():
    rows, encoder = x.to("meta"), sk.pack_encoder(W.to("meta"), b.to("meta"), threshold=0.5)
    assert sk.encode_topk(rows, encoder, 5).indices.shape == (3, 4, 5)
    assert sk.topk(rows, 2).values.device.type == "meta"
    module = sk.SparseEncoder(encoder, k=5)
    assert module(rows).values.shape == (3, 4, 5)
    module.to_empty(device="cpu")
    module.load_state_dict(sk.SparseEncoder(ENCODER, k=5).state_dict())
    assert torch.equal(module(x).values, KEPT.values) and module.bias.dtype == torch.float32
    for call in (
        lambda: sk.encode_threshold(rows, encoder),
        lambda: sk.encode_pool(rows[0], [0, 4], encoder, 5),
        lambda: sk.encode_batch_topk_train(rows[0], W.to("meta"), b.to("meta"), 5),
    ):
        with pytest.raises(ValueError, match="a meta tensor has none"):
            call()


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch.compile refuses custom ops before 2.10")
@pytest.mark.parametrize("op", ["encode_threshold", "group_max", "topk"])
def test_more_ops_compile_whole(op):
    got = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")(x[0])
    assert torch.equal(got, OPS[op](x[0]))


def test_a_derivative_inside_a_graph_is_not_zero_without_a_word():
    compiled = torch.compile(
        lambda r: torch.func.jvp(FIXED["decode"], (r,), (r,))[1], fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="(?s)maybe_current_level|takes any leading"):
        compiled(x[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested"])
def test_other_layouts_are_refused(kind):
    rows = {
        "sparse_coo": x[0].to_sparse,
        "sparse_csr": x[0].to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([x[0], x[1, :2]]),
    }[kind]()
    for op in ("encode_topk", "encode_threshold", "topk", "train"):
        with pytest.raises(ValueError, match=f"is a {kind} tensor; give a dense one"):
            OPS[op](rows)


def test_complex_tensors_are_refused_rather_than_halved():
    z = {size: torch.ones(size, dtype=torch.complex64) for size in (8, 40)}
    for call in (
        lambda: sk.pack_encoder(W, z[40]),
        lambda: sk.pack_encoder(W, b, b_dec=z[8]),
        lambda: sk.pack_encoder(W, b, threshold=z[40]),
        lambda: sk.encode_threshold(x, ENCODER, threshold=z[40]),
        lambda: sk.topk(x.cfloat(), 2),
        lambda: sk.encode_topk_train(x, W, z[40], 3),
        lambda: sk.encode_topk_train(x, W, b, 3, b_dec=z[8]),
        lambda: sk.sparse_decode(*KEPT, D, z[8]),
        lambda: sk.encode_topk(x.cfloat(), ENCODER, 3),
    ):
        with pytest.raises(ValueError, match="is complex; give|must be floating point"):
            call()


def test_negative_views_and_subclasses():
    rows = torch.view_as_complex(torch.randn(4, 8, 2)).conj().imag  # torch negates it lazily
    assert rows.is_neg()
    for op in ("encode_topk", "encode_threshold", "topk", "decode", "train"):
        assert torch.equal(OPS[op](rows), OPS[op](rows.resolve_neg()))
    plain = type("Plain", (torch.Tensor,), {})
    assert torch.equal(FIXED["encode_topk"](x.as_subclass(plain)), KEPT.values)
