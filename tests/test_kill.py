"""SIGKILL at chosen places of a run; resumed, it must be the uninterrupted run bit for bit.

One subprocess forks a child for each place, so that the libraries are loaded once. The child kills itself,
which is as sudden as being killed from outside and always happens at the same place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saerl_fast.config import EvalConfig, WarmupConfig
from saerl_fast.rl.checkpoint import load_latest
from tests.tiny_lm import tiny_model
from tests.training import adaptive_plan, assert_same_run, run, same_weights, small, sums, vowels

ROOT = Path(__file__).parents[1]
# place -> (module, what is called there, in which call of it the process dies, before or after it, the
# step of the checkpoint that is then the latest)
PLACES = {
    "sampling": ("saerl_fast.rl.generate", "sample", 28, "before", 2),
    "backward": ("saerl_fast.rl.update", "policy_loss", 3, "after", 2),
    "optimizer": ("saerl_fast.rl.optimizer", "Optimizer.step", 2 + 3, "after", 2),
    "evaluation": ("saerl_fast.rl.evaluate", "score_rewards", 4, "before", 0),
    "rollouts logged": ("saerl_fast.rl.logs", "JsonlLog.write", 13, "after", 2),
    "checkpoint written": ("saerl_fast.rl.checkpoint", "_write", 3, "after", 2),
    "checkpoint not renamed": ("saerl_fast.rl.checkpoint", "_sync", 5, "after", 2),
    "checkpoint renamed": ("saerl_fast.rl.checkpoint", "_files", 3, "before", 4),
    "summary": ("saerl_fast.rl.finish", "write_json", 1, "before", 4),
}


def full_run(out: Path, *, resume: bool = False) -> Any:
    """Warm-up, then four steps of an adaptive plan with captured features; checkpoints after 0, 2 and 4."""
    torch.set_num_threads(1)
    model = tiny_model()
    plan, capture = adaptive_plan(model, sums(10))
    cfg = small(
        steps=4,
        save_every=2,
        warmup=WarmupConfig(steps=2, batch_size=4, lr=1e-3),
        eval=EvalConfig(every=2, samples=2),
    )
    model, plan, _ = run(out, cfg, model=model, plan=plan, capture=capture, resume=resume, reward=vowels)
    return model, plan


def die_at(module: str, name: str, number: int, when: str) -> None:
    """Replace a function by one that kills this process in its ``number``-th call."""
    import importlib

    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, counted)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    adaptive_plan(tiny_model(), sums(10))  # imports and compiles what the children need; no autograd yet
    for place, (module, name, number, when, _) in PLACES.items():
        child = os.fork()
        if child == 0:
            die_at(module, name, number, when)
            full_run(folder / place)
            os._exit(0)  # the place was never reached
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, place


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    path = f"{ROOT}:{ROOT / 'kernels/torch-ext'}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_kill", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("straight")
    threads = torch.get_num_threads()
    model, plan = full_run(folder / "run")
    yield folder / "run", model, plan.next_batch()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("place", PLACES)
def test_resumes_bit_for_bit(killed: Path, straight: Any, place: str) -> None:
    folder, model, batch = straight
    found = load_latest(killed / place)
    assert (found.step if found else 0) == PLACES[place][-1]
    resumed, plan = full_run(killed / place, resume=True)
    assert_same_run(folder, killed / place)
    assert same_weights(model, resumed)
    assert plan.next_batch() == batch
    assert (killed / place / "summary.json").is_file()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
