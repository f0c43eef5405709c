"""AdamW that also works for bfloat16 weights, and the model's state around an update."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.rl import distributed

log = logging.getLogger(__name__)


class Optimizer:
    """AdamW over the trainable parameters; float32 master copies where those are half precision.

    At a learning rate of 1e-6 an update is far below the spacing of bfloat16 numbers and would be
    rounded away, so half-precision weights are updated in float32 and copied back. Gradients of
    micro-batches are added up in float32 for the same reason: call :meth:`collect` after each backward.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise SaerlError("the model has no trainable parameters; unfreeze some")
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, betas=betas)

    def collect(self) -> None:
        """Move half-precision gradients of the last backward into the float32 sums."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def step(self, lr: float, max_norm: float) -> float:
        """Clip to ``max_norm`` (0: no clipping), update, clear; returns the norm before clipping.

        Gradients of several processes are added up first, so all of them make the same update. A norm that
        is not finite leaves weights and moments as they are, with a line in the log.
        """
        distributed.add_up_gradients(self.masters)
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_norm if max_norm > 0 else float("inf")))
        if not math.isfinite(norm):
            log.warning("the gradient norm is %s: this update is skipped", norm)
            self.clear()
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.clear()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and master copies as flat named tensors."""
        state = {
            f"{index}.{name}": value
            for index, values in self.adamw.state_dict()["state"].items()
            for name, value in values.items()
        }
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is not parameter:
                state[f"{index}.master"] = master.detach()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, for the same model."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, _, name = key.partition(".")
            if int(index) >= len(self.masters):
                raise SaerlError(f"the checkpoint's optimizer has parameter {index}, which the model lacks")
            if name == "master":
                with torch.no_grad():
                    self.masters[int(index)].copy_(value)
            else:
                moments.setdefault(int(index), {})[name] = value
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": moments, "param_groups": groups})


@contextmanager
def training_mode(model: Any, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Settings of an update: no dropout (log-probabilities must match the sampled ones), checkpointing.

    transformers recomputes activations only in training mode, so that mode is used just for this.
    """
    was_training = model.training
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
