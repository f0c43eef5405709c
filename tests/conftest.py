"""Shared by every test: Triton's interpreter where there is no GPU, few threads, fixed seeds."""

from __future__ import annotations

import importlib.util
import os


def _has_gpu() -> bool:
    # Asked of the driver's device file: torch.cuda would be fine too, but nothing may import triton yet.
    return os.path.exists("/dev/nvidia0") or os.path.exists("/dev/nvidiactl")


if not _has_gpu():  # before anything imports triton, which reads it at import (sae_lens imports triton)
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which inherits the first one's
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import random  # noqa: E402
import signal  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ["tests.smollm2"]  # the fixture `smollm2`, a real language model

torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), 2, torch.get_num_threads()))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored in what nohup starts

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile(
        "saerl",
        deadline=None,
        max_examples=40,
        derandomize=True,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.function_scoped_fixture,
        ],
    )
    hypothesis.settings.load_profile("saerl")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; the same test bodies run on both."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
