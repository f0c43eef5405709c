"""What each of the two processes of test_distributed.py does: ``python -m tests.two_processes FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from saerl_fast.config import EvalConfig, LossConfig, WarmupConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl import distributed
from saerl_fast.rl.checkpoint import model_tensors
from saerl_fast.rl.interrupt import Stopped
from tests.tiny_lm import tiny_model
from tests.training import adaptive_plan, run, small, sums


def one_sided(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Only some prompts can be told apart, so that a process may hold no group with a signal."""
    return [
        text.count("a") / max(len(text), 1) if prompt[0] in "024" else 0.0
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def settings(**change: Any) -> Any:
    base = {"lr": 3e-4, "steps": 4, "save_every": 2, "rollout_log": 3}
    base |= {"warmup": WarmupConfig(steps=2, batch_size=3, lr=1e-3), "eval": EvalConfig(every=2, samples=2)}
    return small(**(base | change))


def whole_run(out: Path, *, beta: float = 0.0, resume: bool = False, reward: Any = one_sided) -> Any:
    """Warm-up, adaptive plan, captured features, evaluations, checkpoints: all that processes share."""
    torch.set_num_threads(1)
    model = tiny_model()
    plan, capture = adaptive_plan(model, sums(10))
    cfg = settings(loss=LossConfig(beta=beta), dynamic_sampling=int(beta > 0))
    return run(out, cfg, model=model, plan=plan, capture=capture, resume=resume, reward=reward)


def screened_run(out: Path) -> Any:
    """Groups in two stages, of which the second may have fewer prompts than there are processes."""
    torch.set_num_threads(1)
    cfg = settings(dynamic_sampling=1)
    cfg.rollout.screen = 2
    return run(out, cfg, model=tiny_model(), reward=one_sided)


def failing(on: int, after: int) -> Any:
    calls = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) > after and distributed.rank() == on:
            raise RuntimeError("no more")
        return one_sided(prompts, completions)

    return reward


def main(folder: Path) -> None:
    distributed.start()
    me, found = distributed.rank(), {}
    assert distributed.size() == 2

    found["blocks"] = [distributed.shard(n).indices(n)[:2] for n in (5, 1, 0)]
    found["shared"] = distributed.gather(lambda: me * 10)
    parts = [torch.full((3,), me + 1.0), torch.full((2, 2), me * 2.0)]
    distributed.all_reduce(parts)
    found["sums"] = [part.tolist() for part in parts]
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    weights[0].grad = torch.ones(2)
    if me == 1:
        weights[1].grad = torch.ones(2)
    distributed.all_reduce_gradients(weights)
    found["gradients"] = [None if w.grad is None else w.grad.tolist() for w in weights]

    model, plan, _ = whole_run(folder / "together")
    found["same"] = len({str(values) for values in distributed.gather(lambda: _ends(model))}) == 1
    found["plans"] = distributed.gather(plan.next_batch)
    model, _, _ = whole_run(folder / "alone-then-together", resume=True)
    whole_run(folder / "kl", beta=0.1)
    screened_run(folder / "screened")
    try:
        whole_run(folder / "together-then-alone", reward=failing(1, 6))
    except SaerlError as err:
        found["failed"] = [type(err).__name__, str(err)]

    def interrupting(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2 and me == 1:  # the first step, in one process only
            os.kill(os.getpid(), signal.SIGTERM)
        return one_sided(prompts, completions)

    calls: list[int] = []
    try:
        run(folder / "interrupted", settings(save_every=0), reward=interrupting)
    except Stopped as err:
        found["interrupted"] = [len(calls), err.number]
    try:
        if me == 0:
            raise SaerlError("the disk is full")
        distributed.gather(lambda: None)
    except SaerlError as err:
        distributed.broadcast_error(err)
        found["told"] = [type(err).__name__, str(err)]
    distributed.shutdown()
    tasks = Path("/proc/self/task")
    found["threads"] = [
        name for name in (t.joinpath("comm").read_text() for t in tasks.iterdir()) if "gloo" in name
    ]
    (folder / f"found-{me}.json").write_text(json.dumps(found))


def _ends(model: Any) -> list[float]:
    return [float(tensor.double().sum()) for tensor in model_tensors(model).values()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
