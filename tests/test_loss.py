import math

import pytest
import torch

from saerl_fast.config import LossConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.loss import BatchSize, advantages, check_loss, policy_loss


def parts(n: int = 6, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 1, 5, 2, 4, 2])[:n]
    total = int(lengths.sum())
    old = -torch.rand(total, generator=g) * 3
    new = (old + 0.3 * torch.randn(total, generator=g)).requires_grad_()
    ref = old + 0.2 * torch.randn(total, generator=g)
    return new, old, torch.randn(n, generator=g), lengths, ref


def by_hand(new, old, adv, lengths, ref, cfg, max_new_tokens):
    """Token by token, in Python."""
    at, sequences = 0, []
    for a, n in zip(adv.tolist(), lengths.tolist(), strict=True):
        terms = []
        for i in range(at, at + n):
            r = math.exp(new[i].item() - old[i].item())
            clipped = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
            d = ref[i].item() - new[i].item()
            terms.append(-min(r * a, clipped * a) + cfg.beta * (math.exp(d) - d - 1))
        sequences.append(terms)
        at += n
    if cfg.kind == "grpo":
        return sum(sum(t) / len(t) for t in sequences) / len(sequences)
    flat = sum(sum(t) for t in sequences)
    return flat / (at if cfg.kind == "dapo" else len(sequences) * max_new_tokens)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_equals_the_formula(kind: str, beta: float) -> None:
    new, old, adv, lengths, ref = parts()
    cfg = LossConfig(kind=kind, beta=beta)
    size = BatchSize(6, int(lengths.sum()), 8)
    loss, sums = policy_loss(new, old, adv, lengths, size, cfg, ref)
    assert loss.item() == pytest.approx(by_hand(new, old, adv, lengths, ref, cfg, 8), rel=1e-5)
    assert sums["mismatch"].item() == pytest.approx((new - old).abs().sum().item(), rel=1e-5)
    assert (sums["kl"].item() > 0) == (beta > 0)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_micro_batches_add_up_to_the_batch(kind: str) -> None:
    new, old, adv, lengths, ref = parts()
    cfg = LossConfig(kind=kind, beta=0.05)
    size = BatchSize(6, int(lengths.sum()), 8)
    whole, _ = policy_loss(new, old, adv, lengths, size, cfg, ref)
    gradient = torch.autograd.grad(whole, new)[0]
    total, summed, at = 0.0, torch.zeros_like(new), 0
    for rows in ([0, 1], [2], [3, 4, 5]):
        tokens = int(lengths[rows].sum())
        span = slice(at, at + tokens)
        piece, _ = policy_loss(new[span], old[span], adv[rows], lengths[rows], size, cfg, ref[span])
        total += piece.item()
        summed += torch.autograd.grad(piece, new)[0]
        at += tokens
    assert total == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(summed, gradient)


def test_clipping_is_asymmetric_and_stops_the_gradient() -> None:
    ratios = torch.tensor([1.25, 1.35, 0.85, 0.75, 1.35, 0.75])
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    new = ratios.log().requires_grad_()
    one = torch.ones(6, dtype=torch.long)
    loss, sums = policy_loss(new, torch.zeros(6), adv, one, BatchSize(6, 6, 1), LossConfig())
    loss.backward()
    # 1.25 and 0.85 lie inside; 1.35 up and 0.75 down are clipped; the last two pull back and are kept
    assert (new.grad != 0).tolist() == [True, False, True, False, True, True]
    assert sums["clipped"].item() == 2
    wanted = -(1.25 + 1.28 - 0.85 - 0.80 - 1.35 + 0.75) / 6
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    values, used = advantages(rewards, LossConfig())
    assert used.tolist() == [True, False, True]
    torch.testing.assert_close(values[0], torch.tensor([0.8659, -0.8659, -0.8659, 0.8659]), atol=1e-4, rtol=0)
    assert values[1].abs().max() == 0
    torch.testing.assert_close(values[2], torch.tensor([-0.5, -0.5, -0.5, 1.5]), atol=1e-3, rtol=0)
    plain = torch.tensor([-1.0, -1.0, -1.0, 3.0])
    torch.testing.assert_close(advantages(rewards, LossConfig(scale_rewards=False))[0][2], plain)
    torch.testing.assert_close(advantages(rewards, LossConfig(kind="dr_grpo"))[0][2], plain)
    single, none = advantages(torch.tensor([[1.0], [0.0]]), LossConfig())
    assert single.tolist() == [[0.0], [0.0]] and not none.any()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (LossConfig(kind="ppo"), "'ppo'"),
        (LossConfig(beta=-1), "beta=-1"),
        (LossConfig(clip_low=-0.1), "-0.1"),
    ],
)
def test_bad_settings(cfg: LossConfig, message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        check_loss(cfg)
