"""Several processes, one run: the few collective operations that data parallelism takes here.

``torchrun --nproc-per-node 2 -m saerl_fast.cli train ...`` starts processes that hold the same model, pools
and plan. Each takes a contiguous share of every batch and samples with the random numbers that a single
process would use for it, so rollouts are the same for any number of processes and the update is the same up
to the order of summation. Gradients are added up explicitly, once, after the last micro-batch: the loss is
normalised by the tokens of the whole batch already, so a plain sum is right, where a
DistributedDataParallel wrapper would take the mean, and after every backward pass.

Errors: processes meet in ``gather``, which carries a SaerlError of one to all of them. One raised
anywhere else is announced by ``broadcast_error`` and arrives at the others' next meeting. In a single
process everything here returns at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saerl_fast.errors import SaerlError

T = TypeVar("T")
PATIENCE = timedelta(hours=4)  # a process may wait that long for another's slow reward function


class SharedError(SaerlError):
    """A SaerlError that every process of the run has raised."""


def start() -> None:
    """Join the processes that torchrun started, each with its own GPU where there are GPUs."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if gpus and local >= gpus:
        raise SaerlError(f"process {local} of this machine has no GPU, it has {gpus}; start {gpus} processes")
    if gpus:
        torch.cuda.set_device(local)
    # Its functions take the group of this moment as their default and would keep it beyond `shutdown`, with
    # threads that abort the process when the interpreter ends; transformers imports it only later.
    from torch.distributed import nn  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)


def shutdown() -> None:
    """Wait for all processes, then part: torchrun ends the others as soon as one has ended with an error."""
    if size() > 1:
        dist.all_gather_object([None] * size(), None)
        dist.destroy_process_group()


def size() -> int:
    """Number of processes in this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes the logs, checkpoints and models."""
    return dist.get_rank() if size() > 1 else 0


def shard(n: int) -> slice:
    """This process's share of ``n`` rows, contiguous and in rank order."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def gather(make: Callable[[], T]) -> list[T]:
    """``make()`` of every process in rank order (picklable; no GPU tensors).

    A SaerlError in one of them is raised in all, as a SharedError.
    """
    if size() == 1:
        return [make()]
    mine: tuple[Any, str | None] = (None, None)
    cause = None
    try:
        mine = (make(), None)
    except SaerlError as err:
        mine, cause = (None, str(err)), err
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine)
    for _, error in found:
        if error is not None:
            raise SharedError(error) from cause
    return [value for value, _ in found]


def on_first(make: Callable[[], Any]) -> None:
    """Run ``make`` in process 0 while the others wait; its SaerlError is raised in all."""

    def run() -> None:
        if rank() == 0:
            make()

    gather(run)


def broadcast_error(error: SaerlError) -> None:
    """Raise ``error`` in the other processes when they next meet, unless they have raised it already."""
    if size() > 1 and not isinstance(error, SharedError):
        dist.all_gather_object([None] * size(), (None, str(error)))


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if size() == 1:
        return
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum every parameter's gradient over all processes; one that no process has stays None."""
    if size() == 1:
        return
    have = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    all_reduce([have])
    used = [p for p, count in zip(parameters, have.tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce([p.grad for p in used if p.grad is not None])


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite the tensors with process 0's."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
