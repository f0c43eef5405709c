"""A backend of somebody else's: what it offers runs, what it lacks torch runs, and is said once."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import _numba, _torch, _torch_kmeans, _triton, dispatch
from tests.encoders import integers

CALLS: list[str] = []


class Toy:
    """One op, and nothing else."""

    @staticmethod
    def encode_topk(x: torch.Tensor, encoder: sk.PackedEncoder, k: int) -> sk.TopK:
        CALLS.append("encode_topk")
        return _torch.encode_topk(x, encoder, k)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(dispatch, "_registered", {})
    CALLS.clear()
    yield
    dispatch.implementation.cache_clear()
    dispatch.kmeans_steps.cache_clear()


def every_op(backend: str) -> dict[str, list[torch.Tensor]]:
    """The results of every public op that takes a backend, gradients among them."""
    x, encoder = integers(9, 6, 40, threshold=3.0)
    W = torch.arange(240.0).reshape(40, 6).remainder(7).requires_grad_()
    kept = sk.encode_topk(x, encoder, 4, backend=backend)
    codes = sk.encode_threshold(x, encoder, backend=backend)
    pooled = sk.encode_pool(x, [0, 4, 9], encoder, 4, "sum", backend=backend)
    values = kept.values.clone().requires_grad_()
    wide = sk.sparse_decode(values, kept.indices, W, backend=backend)
    ragged = sk.decode_csr(pooled, W, backend=backend)
    decoded = torch.autograd.grad(wide.square().sum() + ragged.sum(), (W, values))
    enc = torch.arange(240.0).reshape(6, 40).remainder(5).requires_grad_()
    trained = sk.encode_topk_train(x, enc, None, 4, backend=backend)
    batch = sk.encode_batch_topk_train(x, enc, None, 2, backend=backend)
    (encoded,) = torch.autograd.grad(trained.values.sum() + batch.values.sum(), enc)
    clusters = sk.spherical_kmeans(pooled, 2, backend=backend)
    ranked = sk.topk(x, 2, backend=backend)
    found = {"topk": ranked, "kept": kept, "codes": codes[:3], "pooled": pooled[:3], "train": trained}
    found |= {"batch": batch, "decoded": (wide, ragged, *decoded), "encoded": (encoded,)}
    found |= {"kmeans": clusters[:2], "assign": sk.kmeans_assign(pooled, clusters.centroids, backend=backend)}
    found["update"] = (sk.kmeans_update(pooled, clusters.labels, 2, backend=backend),)
    return {name: [part.detach() for part in parts] for name, parts in found.items()}


def test_a_backend_of_one_op_serves_every_op():
    sk.register_backend("toy", Toy)
    with pytest.warns(UserWarning, match="backend 'toy' has no ") as said:
        got = every_op("toy")
    missing = {str(w.message).split()[4].rstrip(":") for w in said}
    assert missing == {*dispatch.OPS, *dispatch.STEPS} - {"encode_topk"}
    assert len(said) == len(missing), "each is said once"
    assert len(CALLS) >= 3
    want = every_op("torch")
    for name, parts in want.items():
        for ours, theirs in zip(got[name], parts, strict=True):
            assert torch.equal(ours, theirs), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every_op("toy")


def test_steps_of_kmeans_may_be_offered_too():
    def assign(X, table):
        CALLS.append("assign")
        return _torch_kmeans.assign(X, table)

    sk.register_backend("toy", types.SimpleNamespace(kmeans=types.SimpleNamespace(assign=assign)))
    X = sk.CSR.from_dense(torch.eye(4))
    with pytest.warns(UserWarning, match="has no") as said:
        labels = sk.spherical_kmeans(X, 2, backend="toy").labels
    assert torch.equal(labels, sk.spherical_kmeans(X, 2, backend="torch").labels) and CALLS
    assert not any("assign" in str(w.message) for w in said)


def test_use_backend_environment_and_compile(monkeypatch):
    sk.register_backend("toy", Toy)
    x, encoder = integers(3, 6, 40)
    with sk.use_backend("toy"):
        sk.encode_topk(x, encoder, 2)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "toy")
    sk.encode_topk(x, encoder, 2)
    compiled = torch.compile(lambda x: sk.encode_topk(x, encoder, 2).indices, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), sk.reference.encode_topk(x, encoder, 2).indices)
    assert len(CALLS) == 3


def test_a_module_is_imported_at_first_use(monkeypatch):
    sk.register_backend("late", "saerl_toy_backend")
    module = types.ModuleType("saerl_toy_backend")
    module.topk = _torch.topk
    monkeypatch.setitem(sys.modules, "saerl_toy_backend", module)
    assert sk.topk(torch.tensor([[1.0, 2.0]]), 1, backend="late").indices.item() == 1
    sk.register_backend("late", "saerl_no_such_module")
    with pytest.raises(ModuleNotFoundError):
        sk.topk(torch.ones(1, 2), 1, backend="late")


def test_where_it_cannot_run_it_says_so():
    sk.register_backend("toy", Toy, available=lambda device: device.type == "cuda")
    x, encoder = integers(3, 6, 40)
    with pytest.raises(ValueError, match="backend 'toy' cannot run on cpu"):
        sk.encode_topk(x, encoder, 2, backend="toy")
    assert dispatch.resolve("auto", x.device) in ("numba", "torch"), "never chosen by itself"


@pytest.mark.parametrize(
    ("name", "own", "said"),
    [("torch", Toy, "cannot be called 'torch'"), ("my-own", Toy, "'my-own'"), ("toy", object(), "no op")],
)
def test_bad_registrations(name, own, said):
    with pytest.raises(ValueError, match=said):
        sk.register_backend(name, own)
    with pytest.raises(ValueError, match="backend='toy' is unknown; choose one of auto, triton"):
        dispatch.resolve("toy", torch.device("cpu"))


def test_the_lists_of_ops_are_those_of_the_backends():
    assert set(_torch.__all__) == set(dispatch.OPS)
    assert set(_torch_kmeans.__all__) == set(dispatch.STEPS)
    for module in (_numba, _triton):
        assert set(dispatch.OPS) <= set(module.__all__)
    for name in ("numba", "triton"):
        assert all(hasattr(dispatch.kmeans_steps(name), step) for step in dispatch.STEPS)


INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = sys.argv[1]
import torch
import saerl_kernels as sk
from saerl_kernels import _triton
x, encoder = torch.ones(1, 2), sk.pack_encoder(torch.ones(2, 3))
for _ in range(2):
    try:
        print(sk.encode_topk(x, encoder, 1, backend="triton").values.item())
    except ValueError as err:
        print(err)
    os.environ["TRITON_INTERPRET"] = sys.argv[2]  # too late for the kernels
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton runs without its interpreter, too")
@pytest.mark.parametrize(
    ("first", "later", "says"), [("true", "0", "2.0"), ("0", "1", "start with TRITON_INTERPRET=1")], ids=str
)
def test_the_interpreter_is_on_where_triton_says_so(first, later, says):
    """In its spellings of "on", and from when it was imported."""
    command = [sys.executable, "-c", INTERPRETED, first, later]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [says in line for line in done.stdout.splitlines()] == [True, True]
