"""A minute that says whether every Triton launcher runs on this GPU and is right: the first part of gpu.py.

Inputs are small integers, whose sums are exact in every order, so results are compared to the bit. Without a
GPU the same calls run in Triton's interpreter, at smaller shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import saerl_kernels as sk
from benchmarks.harness import DEVICE


def launchers() -> dict[str, Callable[[], None]]:
    """Name -> a call that raises AssertionError where Triton's result is not the reference's."""
    from saerl_kernels import _triton
    from saerl_kernels._triton import tune

    gpu = DEVICE.type == "cuda"
    major, minor = torch.cuda.get_device_capability(DEVICE) if gpu else (9, 0)
    arch = 10 * major + minor
    n, d_in, d_sae, k = (300, 256, 8192, 16) if gpu else (5, 32, 512, 4)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (n, d_in), generator=g).float()
    W = torch.randint(-2, 3, (d_in, d_sae), generator=g).float()
    b = torch.randint(-40, 6, (d_sae,), generator=g).float()
    encoders = {
        kind: sk.pack_encoder(W, b, dtype=getattr(torch, kind), permute=True).to(DEVICE)
        for kind in ("bfloat16", "float32")
    }
    rows = x.to(DEVICE)
    kept = sk.reference.encode_topk(x, encoders["float32"].to("cpu"), k)
    codes = sk.TopK(kept.values.to(DEVICE), kept.indices.to(DEVICE))
    decoder = W.t().contiguous().to(DEVICE)

    def encode(kind: str, plan: tune.Plan | None, count: int = k) -> None:
        encoder = encoders[kind]
        got = _triton.encode_topk(encoder.prepare(rows), encoder, count, plan)
        same(got, sk.reference.encode_topk(x, encoders["float32"].to("cpu"), count))

    def looped(loop: str) -> None:
        plan = tune.groups_plan(encoders["bfloat16"], k)
        if plan and loop in tune.loops(plan.T, arch):
            encode("bfloat16", tune.with_loop(plan, loop))

    def gradients() -> None:
        grad = torch.randint(-2, 3, (n, d_in), generator=g).float()
        weight = (grad.to(DEVICE), codes.indices, decoder)
        same([_triton.value_grads(*weight)], [(grad[:, None] * W.t()[kept.indices.long()]).sum(-1)])
        # chunk=4 makes features of several chunks, which the third kernel adds up
        got = _triton.weight_grads(grad.to(DEVICE), codes.values, codes.indices, d_sae, chunk=4)
        dense = torch.zeros(n, d_sae).scatter_add_(1, kept.indices.long(), kept.values)
        same(got, [dense.t() @ grad, dense.sum(0)])

    def pooled() -> None:
        offsets = [0, 1, n - 1, n]
        for reduce in ("max", "mean"):
            got = sk.encode_pool(rows, offsets, encoders["float32"], k, reduce, backend="triton")
            want = sk.reference.encode_pool(x, offsets, encoders["float32"].to("cpu"), k, reduce)
            same(got[:3], want[:3])

    def clusters() -> None:
        points = sk.CSR.from_dense(torch.rand(40, 64, generator=g) * (torch.rand(40, 64, generator=g) < 0.2))
        found = [
            sk.spherical_kmeans(points.to(device), 4, max_iter=3, backend=backend)
            for device, backend in ((DEVICE, "triton"), ("cpu", "torch"))
        ]
        same([found[0].labels], [found[1].labels])
        torch.testing.assert_close(found[0].centroids.cpu(), found[1].centroids, rtol=1e-5, atol=1e-6)

    def thresholds() -> None:
        want = sk.reference.encode_threshold(x, encoders["float32"].to("cpu"), threshold=20.0)
        for encoder in (encoders["float32"], encoders["bfloat16"]):  # on a GPU the second is one kernel
            same(sk.encode_threshold(rows, encoder, threshold=20.0, backend="triton")[:3], want[:3])
        plain = encoders["float32"].natural()
        limit = torch.full((d_sae,), 20.0, device=DEVICE)
        same(sk.CSR.concat(_triton.above.above_in_blocks(plain.prepare(rows), plain, limit))[:3], want[:3])

    def decoded() -> None:
        want = torch.zeros(n, d_sae).scatter_add_(1, kept.indices.long(), kept.values) @ W.t()
        same([sk.sparse_decode(*codes, decoder, backend="triton")], [want])
        starts = torch.arange(n + 1, device=DEVICE) * k
        csr = sk.CSR(starts, codes.indices.reshape(-1), codes.values.reshape(-1), d_sae)
        same([sk.decode_csr(csr, decoder, backend="triton")], [want])

    def ranked() -> None:
        scores = x @ W
        same(sk.topk(scores.to(DEVICE), k, backend="triton"), sk.reference.topk(scores, k))

    chunked = tune.chunked_plan(n, d_sae) if gpu else tune.Plan("chunked", BM=4, BN=256, BK=128, warps=4)
    screen = tune.Plan("screen", BM=16, BN=128, BK=32, warps=4)
    if gpu:
        screen = tune.gpu_plan(16, (2, 32), arch)._replace(algorithm="screen")
    return {
        "encode_topk default": lambda: encode("bfloat16", None),
        "encode_topk plain loop": lambda: looped("plain"),
        "encode_topk fused loop": lambda: looped("fused"),
        "encode_topk specialised loop": lambda: looped("specialised"),
        "encode_topk chunked": lambda: encode("bfloat16", chunked),
        "encode_topk float32": lambda: encode("float32", None),
        "encode_topk screen": lambda: encode("float32", screen),
        "encode_topk above 1024": lambda: encode("float32", None, min(1100, d_sae)),
        "encode_threshold": thresholds,
        "topk": ranked,
        "sparse_decode, decode_csr": decoded,
        "gradients": gradients,
        "encode_pool": pooled,
        "spherical_kmeans": clusters,
    }


def same(got: object, want: object) -> None:
    for found, expected in zip(got, want, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=0, check_dtype=False)
