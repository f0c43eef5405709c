"""Every launcher compiled as on a GPU (fake_driver.py), and what happens where a plan does not launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton import device
from tests.encoders import assert_equal, integers

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
def test_launchers_compile(arch):
    """Arity, names and dtypes fit on every launch; shared memory fits the chip, and nothing spills."""
    triton = pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests/fake_driver.py"), str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    for found in report["variants"]:
        assert found["shared"] <= SHARED_LIMIT[arch], found
        if triton.__version__.startswith(("3.6.", "3.7.")):  # 3.9 spills: see test_compile
            assert not found.get("stack"), found
    calls = report["calls"]
    assert {name: calls[name]["launches"] for name in ("groups", "topk", "decode")} == {
        "groups": 3, "topk": 1, "decode": 1,
    }  # fmt: skip
    # Three blocks of 8 chunks and an end: by the JIT the ends, the first chunk of all, the last of a block.
    # Chunks of 1000 columns begin at multiples of 16 and not, one of one column at 1: none fits the next.
    assert {name: (calls[name]["launches"], calls[name]["by_jit"]) for name in calls if " x " in name} == {
        "chunked, 32 x 512": (27, 5), "chunked, 64 x 1000": (12, 12),
    }  # fmt: skip
    assert calls["chunked, 1 column"]["by_jit"] == calls["chunked, 1 column"]["launches"]
    # Twenty times what a launch costs on a quiet machine: only a launcher that went wrong takes longer.
    assert calls["groups"]["host_us"] < 3 * 400


@pytest.fixture
def refusing(monkeypatch):
    """Plans of these algorithms do not launch; the calls that were tried."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's plans are replaced")
    from triton.runtime.errors import OutOfResources

    tried, refused = [], set()
    real = triton_backend._run

    def run(x, encoder, k, plan):
        tried.append(plan.algorithm)
        if plan.algorithm in refused:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return real(x, encoder, k, plan)

    monkeypatch.setattr(triton_backend, "_run", run)
    monkeypatch.setattr(device, "_refused", set())
    return tried, refused


@pytest.mark.parametrize("refused", [{"groups"}, {"groups", "chunked"}], ids=["groups", "both"])
def test_a_plan_that_does_not_launch_is_replaced_and_said_once(refusing, refused):
    tried, names = refusing
    names |= refused
    x, encoder = integers(4, 16, 3000, permute=True)
    want = sk.reference.encode_topk(x, encoder, 5)
    with pytest.warns(UserWarning, match="does not launch .*shared memory") as said:
        assert_equal(sk.encode_topk(x, encoder, 5, backend="triton"), want)
    assert tried == ["groups", "chunked"]
    assert ["does not launch" in str(one.message) for one in said].count(True) == len(refused)
    del tried[:]
    assert_equal(sk.encode_topk(x, encoder, 5, backend="triton"), want)  # a warning would be an error here
    assert tried == ["chunked"] * (len(refused) == 1)


def test_a_given_plan_raises(refusing):
    from triton.runtime.errors import OutOfResources

    refusing[1].add("chunked")
    x, encoder = integers(4, 16, 3000)
    with pytest.raises(OutOfResources):
        triton_backend.encode_topk(
            x, encoder, 5, triton_backend.Plan("chunked", BM=4, BN=256, BK=128, warps=4)
        )


def test_tiles_by_architecture():
    from saerl_kernels._triton.tune import candidates, gpu_plan

    kept = (2, 32)
    assert gpu_plan(16, kept, 120) == gpu_plan(16, kept, 89) != gpu_plan(16, kept, 90)
    plans = [plan for plan in candidates(65536, 64, 120) if plan.algorithm == "groups"]
    assert plans and all(
        plan.size == 32 and plan.stages * (plan.BM + plan.BN) * plan.BK * 2 < 99 * 1024 for plan in plans
    )
