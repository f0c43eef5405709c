"""sparse_decode: values and gradients on every backend."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk

BACKENDS = ["torch", "numba", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "d_sae", "d_in"), [((5, 7), 31, 19), ((2, 3, 1), 4, 130), ((1, 9), 9, 1)], ids=str
)
def test_equals_reference(backend, dtype, shape, d_sae, d_in, device):
    values = torch.rand(shape, device=device)
    indices = torch.randint(0, d_sae, shape, device=device, dtype=torch.int32)
    W, b = torch.randn(d_sae, d_in, device=device).to(dtype), torch.randn(d_in, device=device).to(dtype)
    got = sk.sparse_decode(values, indices, W, b, backend=backend)
    want = sk.reference.sparse_decode(values, indices, W, b)
    assert got.dtype == dtype and got.shape == (*shape[:-1], d_in)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_gradients(backend, device):
    values = torch.rand(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    indices = torch.randint(0, 6, (2, 3, 4), device=device)  # features repeat within and across rows
    W = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, w, c: sk.sparse_decode(v, indices, w, c, backend=backend),
        (values, W, b),
        fast_mode=backend == "triton",  # the interpreter takes 20 s for the full Jacobian
    )


def test_gradients_of_16_bit_decoders(backend, device):
    values = torch.rand(6, 4, device=device, requires_grad=True)
    indices = torch.randint(0, 9, (6, 4), device=device)
    W = torch.randn(9, 8, device=device).bfloat16().requires_grad_()
    sk.sparse_decode(values, indices, W, backend=backend).float().square().sum().backward()
    assert values.grad.dtype == torch.float32 and W.grad.dtype == torch.bfloat16
    v, w = values.detach().requires_grad_(), W.detach().float().requires_grad_()
    sk.reference.sparse_decode(v, indices, w).square().sum().backward()
    torch.testing.assert_close(values.grad, v.grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(W.grad.float(), w.grad, rtol=3e-2, atol=3e-2)


def test_empty_batch(backend, device):
    W = torch.randn(9, 8, device=device, requires_grad=True)
    values, indices = torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device, dtype=torch.int32)
    out = sk.sparse_decode(values, indices, W, backend=backend)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert bool((W.grad == 0).all())


def test_round_trip(device):
    """With k = d_sae and tied orthonormal weights, decoding restores the positive part."""
    x = torch.rand(5, 8, device=device)
    encoder = sk.pack_encoder(torch.eye(8, device=device))
    kept = sk.encode_topk(x, encoder, 8)
    torch.testing.assert_close(sk.sparse_decode(*kept, torch.eye(8, device=device)), x)


def test_errors():
    W = torch.randn(9, 8)
    values, indices = torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="must have one shape"):
        sk.sparse_decode(values, indices[:, :2], W)
    with pytest.raises(ValueError, match="must be integers"):
        sk.sparse_decode(values, values, W)
    with pytest.raises(ValueError, match="b_dec has shape"):
        sk.sparse_decode(values, indices, W, torch.zeros(7))
    with pytest.raises(ValueError, match=r"outside 0\.\.8"):
        sk.sparse_decode(values, indices + 9, W)
