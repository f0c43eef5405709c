"""The real launchers, compiled and not run: a Triton driver that pretends to be a GPU.

    python tests/fake_driver.py ARCH       writes JSON to stdout

Every launcher is called with CPU tensors, so that Triton's own specialisation of the arguments (1, multiples
of 16, int64) and its binding of their names happen as on the GPU; the last step, which hands a kernel to
CUDA, is left out. A kernel launched without the JIT has to be the one that it takes for these arguments.
Reported of every compiled variant: shared memory and ``usage``; of every launcher: launches, how many of
them by the JIT, and host microseconds per call.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

ARCH = int(sys.argv[1])
variants: dict = {}
launches: list = []  # of each: by the JIT
running: list = []  # in JITFunction.run
comparing = True


class Launcher:
    """Takes the place of a compiled kernel's last step, in CUDA."""

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        launches.append(bool(running))
        if comparing and not running:
            of = self.metadata
            other = self.src.fn.run(
                *args, grid=(x, y, z), warmup=True, num_warps=of.num_warps, num_stages=of.num_stages
            )
            assert other.hash == of.hash, f"{self.src.fn.__name__} is not compiled for {args}"


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20}  # the test compares what is compiled with each chip's

    def load_binary(self, name, kernel, shared, device):
        return object(), 1, 0, 0, 1024  # module, function, registers, spilled, threads


class Driver:
    """What JITFunction asks of a driver."""

    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def usage(cubin: bytes) -> dict:
    """Registers of a thread, bytes of its stack, and how many instructions the kernel is."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    if not os.path.exists(os.path.join(tools, "cuobjdump")):
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, code = (
            subprocess.run(
                [os.path.join(tools, tool), flag, file.name], capture_output=True, text=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", used)}
    return {**found, "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))}


def run(self, *args, **kwargs):
    running.append(self)
    kernel = real_run(self, *args, **kwargs)
    running.pop()
    variants.setdefault(kernel.hash, (self.__name__, kernel))
    return kernel


real_run = JITFunction.run
JITFunction.run = run
driver.set_active(Driver())
torch.cuda.get_device_capability = lambda device: divmod(ARCH, 10)
torch.empty = lambda *args, **kwargs: torch.zeros(*args, **kwargs)  # no kernel writes: nothing may be garbage

from saerl_kernels import CSR, pack_encoder  # noqa: E402
from saerl_kernels import _triton as launch  # noqa: E402
from saerl_kernels._triton import above, kmeans, tune  # noqa: E402


def launchers():
    """Name -> a call, with sizes of 1, odd sizes and multiples of 16 among them."""

    def encoder(d_in, d_sae, dtype, permute=True):
        return pack_encoder(torch.zeros(d_in, d_sae), torch.zeros(d_sae), dtype=dtype, permute=permute)

    half, whole = torch.bfloat16, torch.float32
    big, odd, wide = encoder(256, 4096, half), encoder(100, 1000, half, False), encoder(256, 4096, whole)
    rows = {e: torch.zeros(96, e.d_in, dtype=e.dtype) for e in (big, odd, wide)}
    plan = tune.with_loop(tune.gpu_plan(16, (2, tune.sizes(16, ARCH)[0]), ARCH), "plain")
    chunked = tune.chunked_plan(96, 4096)
    yield "groups", lambda: launch.encode_topk(rows[big], big, 32, plan)
    for loop in tune.loops(2, ARCH)[:-1]:
        yield loop, lambda loop=loop: launch.encode_topk(rows[big], big, 32, tune.with_loop(plan, loop))
    yield (
        "groups, k 1, 1 row, odd",
        lambda: launch.encode_topk(rows[odd][:1], odd, 1, plan._replace(T=3, size=32)),
    )
    yield (
        "groups, float32",
        lambda: launch.encode_topk(rows[wide], wide, 32, tune.gpu_plan(32, (3, 32), ARCH)),
    )
    # A program of one warp would sort a row's 1024 keys.
    small = encoder(256, 4097, whole)
    yield "groups, k 1024, few candidates", lambda: launch.encode_topk_invariant(rows[wide], small, 1024)
    flat = encoder(128, 4096, half)  # a product of two steps
    yield (
        "groups, d_in 128",
        lambda: launch.encode_topk(torch.zeros(96, 128, dtype=half), flat, 32, tune.groups_plan(flat, 32)),
    )
    screen = tune.gpu_plan(16, (2, 32), ARCH)._replace(algorithm="screen")  # in the default loop
    vast, single = encoder(256, 65536, whole, False), encoder(100, 1000, whole)
    rows[vast], rows[single] = torch.zeros(96, 256), torch.zeros(1, 100)
    yield "screen", lambda: launch.encode_topk(rows[vast], vast, 64, screen)
    yield (
        "screen, k 512, 1 row, odd",
        lambda: launch.encode_topk(rows[single], single, 512, tune.with_loop(screen, "plain")._replace(T=3)),
    )
    # One row of a dictionary so large that it is selected in several tiles.
    huge = SimpleNamespace(d_sae=24 << 16, permutation=torch.zeros(0, dtype=torch.int32))
    bits, ends = torch.zeros(1, 3, 24 << 10, dtype=torch.int32), torch.zeros(2, 1, 512, dtype=torch.int32)
    args = (bits, bits[:, 1:].to(torch.int8), huge, 1, 512, tune.Plan("groups", 2, 64), tuple(ends))
    yield "selection in tiles", lambda: launch._select(*args)
    yield "chunked", lambda: launch.encode_topk(rows[wide], wide, 32, chunked)
    yield "chunked, k 1, 1 row, odd", lambda: launch.encode_topk(rows[odd][:1], odd, 1, chunked)
    for BM, BN in ((32, 512), (64, 1000)):
        chunks = chunked._replace(BM=BM, BN=BN)
        yield f"chunked, {BM} x {BN}", lambda chunks=chunks: launch.encode_topk(rows[wide], wide, 33, chunks)
    few = encoder(256, 3, whole)
    ones = chunked._replace(BN=1)
    yield "chunked, 1 column", lambda: launch.encode_topk(rows[wide], few, 2, ones)
    yield "topk", lambda: launch.topk(torch.zeros(96, 4096), 32)
    places, fused = torch.zeros(96 * 4096), tune.above_plan(ARCH)
    for name, e, n in (("above", big, 96), ("above, 1 row, odd", odd, 1)):
        yield name, lambda e=e, n=n: above.launch_above(rows[e][:n], e, torch.zeros(e.d_sae), places, fused)
    yield "threshold", lambda: launch.encode_threshold(rows[wide], wide, torch.zeros(4096))
    values, indices = torch.ones(96, 32), torch.zeros(96, 32, dtype=torch.int32)
    decoder = torch.zeros(4096, 256, dtype=half)
    yield "decode", lambda: launch.sparse_decode(values, indices, decoder)
    starts, none = torch.zeros(97, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    yield "decode of a CSR", lambda: launch.decode_csr(starts, none, none.float(), decoder.double())
    yield (
        "gradients of values",
        lambda: launch.value_grads(torch.zeros(96, 256), indices.long(), decoder.float()),
    )
    yield "gradients of weights", lambda: launch.weight_grads(torch.zeros(96, 256), values, indices, 4096)
    codes = CSR(torch.arange(97) * 32, indices.reshape(-1), values.reshape(-1), 4096)
    ends = torch.tensor([0, 96])
    yield "pool", lambda: launch.pool_codes(codes, ends, "sum", None, None)
    for n in (64, 1000):
        yield f"k-means, {n}", lambda n=n: kmeans.assign(codes, torch.zeros(4096, n))
    labels = torch.zeros(96, dtype=torch.int32)
    yield "k-means update", lambda: kmeans.update(codes, labels, 64)


report = {"calls": {}, "variants": []}
for name, call in launchers():
    comparing = True
    call()  # compiles
    comparing = False
    del launches[:]
    begin = time.thread_time()
    for _ in range(3):
        call()
    spent = (time.thread_time() - begin) / 3
    report["calls"][name] = {
        "launches": len(launches) // 3,
        "by_jit": sum(launches) // 3,
        "host_us": spent * 1e6,
    }
for name, kernel in variants.values():
    found = usage(kernel.asm["cubin"])
    report["variants"].append({"kernel": name, "shared": kernel.metadata.shared, **found})
json.dump(report, sys.stdout)
