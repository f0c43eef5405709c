"""What only a GPU can show: CUDA graphs, torch.compile, no synchronisation, real plans at real sizes."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton.tune import (
    Plan,
    candidates,
    chunked_plan,
    gpu_plan,
    loops,
    plan_encode,
    sizes,
    with_loop,
)
from tests.encoders import assert_equal, float64_topk, integers

pytestmark = pytest.mark.gpu
PLANS = [
    Plan("groups", 3, BM=64, BN=128, BK=32, warps=4, tree=False),
    Plan("groups", 1, BM=64, BN=128, BK=32, warps=4, tree=False, loop="nested"),
    Plan("chunked", BM=64, BN=512, BK=256, warps=4),
]


def problem(n: int = 150, d_in: int = 64, d_sae: int = 4096) -> tuple[torch.Tensor, sk.PackedEncoder]:
    x, encoder = integers(n, d_in, d_sae, dtype=torch.bfloat16, permute=True)
    return x.cuda().bfloat16(), encoder.to("cuda")


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_captured_in_a_cuda_graph(plan):
    x, encoder = problem()
    static = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels and sets up cuBLAS outside the capture
        triton_backend.encode_topk(static, encoder, 16, plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = triton_backend.encode_topk(static, encoder, 16, plan)
    for rows in (x, x.flip(0)):
        static.copy_(rows)
        graph.replay()
        assert_equal(kept, float64_topk(rows, encoder, 16))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_host_synchronisation(plan):
    x, encoder = problem()
    triton_backend.encode_topk(x, encoder, 16, plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = triton_backend.encode_topk(x, encoder, 16, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(kept, float64_topk(x, encoder, 16))


def test_under_torch_compile():
    x, encoder = problem()
    compiled = torch.compile(lambda x: sk.encode_topk(x * 1, encoder, 16), fullgraph=True)
    assert_equal(sk.TopK(*compiled(x)), float64_topk(x, encoder, 16))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_deterministic(plan):
    x, W = torch.randn(300, 256, device="cuda"), torch.randn(256, 8192, device="cuda")
    encoder = sk.pack_encoder(W.bfloat16())
    first = triton_backend.encode_topk(x.bfloat16(), encoder, 64, plan)
    for _ in range(5):
        assert_equal(triton_backend.encode_topk(x.bfloat16(), encoder, 64, plan), first)


@pytest.mark.parametrize(("d_in", "d_sae"), [(768, 32768), (1000, 20001)])
def test_the_loops_give_the_same_bits(d_in, d_sae):
    """Real values, several bands and waves, and T = 1, so that groups are opened again; ten times."""
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    x = torch.randn(3000, d_in, device="cuda").bfloat16()
    encoder = sk.pack_encoder(torch.randn(d_in, d_sae, device="cuda").bfloat16())
    plan = gpu_plan(16, (1, sizes(16, arch)[0]), arch)
    want = triton_backend.encode_topk(x, encoder, 64, with_loop(plan, "plain"))
    for loop in loops(1, arch) * 10:
        assert_equal(triton_backend.encode_topk(x, encoder, 64, with_loop(plan, loop)), want)


@pytest.mark.parametrize("k", [1, 64, 512])
def test_every_candidate_of_the_tuner(k):
    """At a real size: each plan that compiles on this chip gives the same set up to float32 rounding."""
    from triton.runtime.errors import OutOfResources

    x = torch.randn(1000, 768, device="cuda").bfloat16()
    W = torch.randn(768, 32768, device="cuda").bfloat16()
    encoder = sk.pack_encoder(W)
    want = sk.encode_topk(x, encoder, k, backend="torch")
    major, minor = torch.cuda.get_device_capability()
    plans = [
        *candidates(32768, k, major * 10 + minor),
        chunked_plan(1000, 32768),
        plan_encode(1000, encoder, k),
    ]
    ran = 0
    for plan in plans:
        try:
            got = triton_backend.encode_topk(x, encoder, k, plan)
        except OutOfResources:
            continue
        ran += 1
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)
        assert (got.indices == want.indices).float().mean() > 0.99
    assert ran >= 3


def test_float32_screen_at_a_real_size(monkeypatch):
    """The tensor cores' own rounding: screened values are float32's, and hardly a row is left over."""
    x, W = torch.randn(1000, 2048, device="cuda"), torch.randn(2048, 32768, device="cuda") / 45
    encoder = sk.pack_encoder(W, torch.randn(32768, device="cuda") / 10)
    major, minor = torch.cuda.get_device_capability()
    plan = gpu_plan(16, (2, 32), major * 10 + minor)._replace(algorithm="screen")
    whole = []
    launch = triton_backend.launch_chunked
    monkeypatch.setattr(
        triton_backend, "launch_chunked", lambda x, *args: whole.append(len(x)) or launch(x, *args)
    )
    got = triton_backend.encode_topk(x, encoder, 64, plan)
    assert sum(whole) < 10
    scores = x.double() @ W.double() + encoder.bias.double()
    want = scores.topk(64)
    torch.testing.assert_close(got.values.double(), want.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.values.double(), scores.gather(1, got.indices.long()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif("torch.cuda.device_count() < 2")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_on_a_second_gpu(plan):
    x, encoder = problem()
    x, encoder = x.to("cuda:1"), encoder.to("cuda:1")
    assert_equal(triton_backend.encode_topk(x, encoder, 16, plan), float64_topk(x, encoder, 16))
