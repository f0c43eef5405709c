from __future__ import annotations

import pytest
import torch

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.optimizer import Optimizer, training_mode
from tests.families import tiny_family


@pytest.mark.parametrize("name", ["opt", "bart", "gpt2"])
def test_checkpointing_computes_blocks_again_and_drops_nothing_out(name: str) -> None:
    """OPT's and BART's blocks drop out by themselves, GPT-2's by modules."""
    drop = {"resid_pdrop": 0.5, "attn_pdrop": 0.5} if name == "gpt2" else {"dropout": 0.5}
    model = tiny_family(name, **drop)
    ids, starts = torch.arange(3, 12)[None], torch.tensor([4])
    block = next(m for name, m in model.named_modules() if name.endswith(("layers.1", "h.1")))
    completion_logprobs(model, ids, starts, 9 - starts)  # which looks at the model the first time
    found = []
    for checkpointing in (False, True):
        calls: list[int] = []
        inside = next(block.children())  # hooks of the block itself may stay outside
        handle = inside.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        with training_mode(model, checkpointing):
            values, _ = completion_logprobs(model, ids, starts, 9 - starts)
            slopes = torch.autograd.grad(values.sum(), block.parameters(), allow_unused=True)
        handle.remove()
        found.append((values.detach(), [slope for slope in slopes if slope is not None], len(calls)))
        assert not any(module.training for module in model.modules())
    (plain, slopes, once), (again, others, twice) = found
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others, slopes, atol=1e-4, rtol=1e-4)
    assert (once, twice) == (1, 2)  # its activations were made again


def test_a_model_without_checkpointing_says_so_at_once() -> None:
    cfg = TrainConfig(gradient_checkpointing=True)
    with pytest.raises(SaerlError, match="gradient_checkpointing=true: CTRLLMHeadModel has none"):
        Optimizer(tiny_family("ctrl"), cfg)
