"""AdamW that also works for bfloat16 weights, with gradients from micro-batches that fit into memory."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl import distributed
from saerl_fast.rl.logprobs import micro_batches

log = logging.getLogger(__name__)


class Optimizer:
    """AdamW over the trainable parameters; float32 master copies where those are half precision.

    At a learning rate of 1e-6 an update is far below the spacing of bfloat16 numbers and would be
    rounded away, so half-precision weights are updated in float32 and copied back. Gradients of
    micro-batches are added up in float32 for the same reason. ``micro_tokens``, the size of a micro-batch,
    shrinks when memory runs out.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig) -> None:
        self.model, self.micro_tokens = model, cfg.micro_tokens
        self.gradient_checkpointing = cfg.gradient_checkpointing
        if cfg.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
            raise SaerlError(
                f"train.gradient_checkpointing=true: {type(model).__name__} has none; set it to false"
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise SaerlError("the model has no trainable parameters; unfreeze some")
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.adamw = torch.optim.AdamW(self.masters, betas=cfg.betas, weight_decay=cfg.weight_decay)

    def accumulate(
        self, lengths: Tensor, backward: Callable[[Tensor], Tensor], width: int, owner: Tensor | None = None
    ) -> Tensor:
        """Add up the gradients of this process's rows; returns sums float64 [width] over all processes.

        ``backward(rows)`` makes the backward pass of a micro-batch, given as row numbers, and returns
        figures [width] to be summed. ``lengths`` [n] tokens of each row, ``owner`` as in `micro_batches`.
        When memory runs out, all is done again with smaller micro-batches.
        """
        total = torch.zeros(width, dtype=torch.float64, device=lengths.device)

        def attempt() -> None:
            while True:
                total.zero_()
                try:
                    for rows in micro_batches(lengths, self.micro_tokens, owner):
                        total.add_(backward(rows))
                        self._collect()
                    return
                except torch.OutOfMemoryError:
                    self._clear()
                longest = int(lengths.max())
                if self.micro_tokens <= longest:
                    raise SaerlError(
                        f"out of memory on a single sequence of {longest} tokens; lower "
                        "rollout.max_new_tokens or set train.gradient_checkpointing=true"
                    )
                self.micro_tokens = max(longest, min(self.micro_tokens, int(lengths.sum())) // 2)
                log.warning("out of memory in a micro-batch: micro_tokens is now %d", self.micro_tokens)

        with training_mode(self.model, self.gradient_checkpointing):
            distributed.gather(attempt)
        distributed.all_reduce([total])
        return total

    def step(self, lr: float, max_norm: float) -> float:
        """Clip to ``max_norm`` (0: no clipping), update, clear; returns the norm before clipping.

        Gradients of several processes are added up first, so all of them make the same update. A norm that
        is not finite leaves weights and moments as they are.
        """
        distributed.all_reduce_gradients(self.masters)
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_norm if max_norm > 0 else math.inf))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            with torch.no_grad():
                for parameter, master in self._copies():
                    parameter.copy_(master)
        self._clear()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and master copies as flat named tensors."""
        state = {
            f"{index}.{name}": value
            for index, values in self.adamw.state_dict()["state"].items()
            for name, value in values.items()
        }
        number = {id(master): index for index, master in enumerate(self.masters)}
        return state | {f"{number[id(m)]}.master": m.detach() for _, m in self._copies()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned, for the same model."""
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in state.items():
            index, _, name = key.partition(".")
            if name == "master":
                self.masters[int(index)].data.copy_(value)
            else:
                moments[int(index)][name] = value
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": dict(moments), "param_groups": groups})

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Half-precision parameters with their float32 masters."""
        pairs = zip(self.parameters, self.masters, strict=True)
        return ((parameter, master) for parameter, master in pairs if master is not parameter)

    def _collect(self) -> None:
        """Move half-precision gradients of the last backward into the float32 sums."""
        for parameter, master in self._copies():
            if parameter.grad is not None:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad += parameter.grad
                parameter.grad = None

    def _clear(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None


@contextmanager
def training_mode(model: Any, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Settings of an update: no dropout (log-probabilities must match the sampled ones), checkpointing.

    transformers recomputes the activations only of blocks that are in training mode when they are called. So
    their modules stay out of it, and the blocks themselves leave it while they compute, or they would drop
    out.
    """
    was_training = model.training
    model.eval()
    if gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        marked: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        blocks = [module for module in marked if isinstance(module, GradientCheckpointingLayer)]
        for module in blocks or marked:  # the older kind: the whole model calls its blocks through it
            module.training = True
            module._gradient_checkpointing_func = _outside_training(
                module, module._gradient_checkpointing_func
            )
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)


def _outside_training(module: nn.Module, checkpoint: Any) -> Callable[..., Any]:
    """``checkpoint`` for functions that must find ``module`` out of training mode."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def compute(*args: Any, **kwargs: Any) -> Any:
            before, module.training = module.training, False
            try:
                return function(*args, **kwargs)
            finally:
                module.training = before

        return checkpoint(compute, *args, **kwargs)

    return call
