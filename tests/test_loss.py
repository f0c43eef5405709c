import math
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from saerl_fast.config import LOSSES, LossConfig, RolloutConfig, TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.loss import (
    KINDS,
    BatchSize,
    advantages,
    clip_range,
    get_loss,
    overlong_penalty,
    policy_loss,
)


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
    low, high = clip_range(cfg)
    at, sequences = 0, []
    for a, n in zip(adv.tolist(), lengths.tolist(), strict=True):
        span = range(at, at + n)
        mean = math.exp(sum(new[i].item() - old[i].item() for i in span) / n)
        terms = []
        for i in span:
            r = mean if cfg.kind == "gspo" else math.exp(new[i].item() - old[i].item())
            clipped = min(max(r, low), high)
            d = ref[i].item() - new[i].item()
            term = -clipped * a * new[i].item() if cfg.kind == "cispo" else -min(r * a, clipped * a)
            terms.append(term + cfg.beta * (math.exp(d) - d - 1))
        sequences.append(terms)
        at += n
    if cfg.kind in ("grpo", "gspo"):
        return sum(sum(t) / len(t) for t in sequences) / len(sequences)
    flat = sum(sum(t) for t in sequences)
    return flat / (len(sequences) * max_new_tokens if cfg.kind == "dr_grpo" else at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_equals_the_formula(kind: str, beta: float) -> None:
    new, old, adv, lengths, ref = parts()
    cfg = LossConfig(kind=kind, beta=beta)
    size = BatchSize(6, int(lengths.sum()), 8)
    loss, sums = policy_loss(new, old, adv, lengths, size, cfg, ref)
    assert loss.item() == pytest.approx(by_hand(new, old, adv, lengths, ref, cfg, 8), rel=1e-5)
    assert (sums["kl"].item() > 0) == (beta > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_equal_those_of_trl(kind: str, beta: float) -> None:
    """GRPOTrainer._compute_loss itself, given these log-probabilities in place of a model's."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    new, old, adv, lengths, ref = parts(seed=3)
    cfg = LossConfig(kind=kind, beta=beta)
    mask = torch.arange(8) < lengths[:, None]

    def padded(flat: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    low, high = clip_range(cfg)
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(new), torch.zeros(mask.shape), None),
        loss_type={"gspo": "grpo"}.get(kind, kind),
        importance_sampling_level="sequence" if kind == "gspo" else "token",
        epsilon_low=1 - low,
        epsilon_high=high if kind == "cispo" else high - 1,  # TRL's is the cap itself there
        beta=beta,
        max_completion_length=8,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {name: torch.zeros(6, 1, dtype=torch.long) for name in ("prompt_ids", "prompt_mask")}
    inputs |= {"completion_ids": torch.zeros(6, 8, dtype=torch.long), "completion_mask": mask.long()}
    inputs |= {"advantages": adv, "old_per_token_logps": padded(old), "ref_per_token_logps": padded(ref)}
    theirs = trainer._compute_loss(fake, fake.model, inputs | {"num_items_in_batch": mask.sum()})
    ours, _ = policy_loss(new, old, adv, lengths, BatchSize(6, int(lengths.sum()), 8), cfg, ref)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, new)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind: str) -> None:
    new, old, adv, lengths, ref = (part.detach() for part in parts())
    cfg = LossConfig(kind=kind, beta=0.1, clip_low=0.15 if kind != "cispo" else None, clip_high=0.2)
    size = BatchSize(6, int(lengths.sum()), 8)
    weights = (new - old).exp().clamp(*clip_range(cfg)).double()  # what cispo's stop-gradient holds fixed
    per_token = adv.double().repeat_interleave(lengths)

    def loss(x: torch.Tensor) -> torch.Tensor:
        if kind == "cispo":
            d = ref.double() - x
            return (-weights * per_token * x + cfg.beta * (d.exp() - d - 1)).sum() / size.tokens
        return policy_loss(x, old.double(), adv.double(), lengths, size, cfg, ref.double())[0]

    point = new.double().requires_grad_()
    ours = policy_loss(point, old.double(), adv.double(), lengths, size, cfg, ref.double())[0]
    step = 1e-6
    wanted = [
        (loss(point.detach() + step * e) - loss(point.detach() - step * e)) / (2 * step)
        for e in torch.eye(len(new), dtype=torch.float64)
    ]
    torch.testing.assert_close(torch.autograd.grad(ours, point)[0], torch.stack(wanted), rtol=1e-4, atol=1e-7)


def test_on_policy_all_token_means_have_one_gradient() -> None:
    new, _, adv, lengths, _ = parts()
    size = BatchSize(6, int(lengths.sum()), 8)
    same = new.detach().clone()
    dapo, cispo, grpo, gspo = (
        torch.autograd.grad(policy_loss(new, same, adv, lengths, size, LossConfig(kind=kind))[0], new)[0]
        for kind in ("dapo", "cispo", "grpo", "gspo")
    )
    torch.testing.assert_close(dapo, cispo)
    torch.testing.assert_close(grpo, gspo)


def test_cispo_bounds_the_weight_and_keeps_every_gradient() -> None:
    new = torch.tensor([9.0, 3.0, 0.1]).log().requires_grad_()
    one = torch.ones(3, dtype=torch.long)
    loss, sums = policy_loss(
        new, torch.zeros(3), torch.ones(3), one, BatchSize(3, 3, 1), LossConfig(kind="cispo")
    )
    loss.backward()
    torch.testing.assert_close(new.grad, -torch.tensor([5.0, 3.0, 0.1]) / 3)
    assert sums["clipped"].item() == 1


def test_gspo_clips_whole_completions() -> None:
    lengths = torch.tensor([2, 2])
    new = torch.tensor([0.5, -0.5, 0.3, 0.3]).requires_grad_()  # means 0 and 0.3
    loss, sums = policy_loss(
        new, torch.zeros(4), torch.ones(2), lengths, BatchSize(2, 4, 2), LossConfig(kind="gspo")
    )
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([-0.25, -0.25, 0.0, 0.0]))
    assert sums["clipped"].item() == 2 and loss.item() == pytest.approx(-(1 + 1.0004) / 2)


def test_overlong_penalty_is_that_of_trl() -> None:
    make = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
    lengths = torch.arange(1, 21)
    cfg = TrainConfig(rollout=RolloutConfig(max_new_tokens=20), loss=LossConfig(overlong_window=8))
    theirs = make(20, 8)([[0] * n for n in lengths.tolist()])
    assert overlong_penalty(lengths, cfg).tolist() == pytest.approx(theirs)
    assert overlong_penalty(lengths, cfg)[-1] == -1 and overlong_penalty(lengths, cfg)[11] == 0
    cfg.loss.overlong_window = 0
    assert not overlong_penalty(lengths, cfg).any()


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


def test_a_group_whose_task_rewards_are_equal_has_no_signal_however_they_are_shaped() -> None:
    task = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]], dtype=torch.float64)
    penalty = torch.tensor([0.0, 0.0, -0.05, -0.1], dtype=torch.float64)
    for kind in ("dapo", "dr_grpo"):
        values, used = advantages(task, LossConfig(kind=kind), task + penalty)
        assert used.tolist() == [False, False, True] and values[:2].abs().max() == 0
        alone, _ = advantages((task + penalty)[2:], LossConfig(kind=kind))
        torch.testing.assert_close(values[2:], alone)
    same, _ = advantages(task, LossConfig(), task)
    assert torch.equal(same, advantages(task, LossConfig())[0])


def test_completions_without_a_reward_are_left_out_of_their_group() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 0, nan], [1, nan, 1, nan], [nan] * 4, [1, 0, nan, nan]])
    values, used = advantages(rewards, LossConfig())
    assert used.tolist() == [True, False, False, True]
    pair, _ = advantages(torch.tensor([[1.0, 0.0]]), LossConfig())
    torch.testing.assert_close(values[0], torch.tensor([pair[0, 0], 0, pair[0, 1], 0]))
    assert values[1:3].abs().max() == 0 and values.isfinite().all()


def test_rewards_of_any_size_keep_their_differences() -> None:
    small = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), LossConfig())[0]
    for offset, scale in ((1e9, 1.0), (0.0, 1e29), (-1e12, 1e3)):
        wide = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64) * scale + offset
        values, used = advantages(wide, LossConfig())
        assert used.all() and values.dtype == torch.float32
        torch.testing.assert_close(values, small, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weighs_the_policy_term_of_each_token(kind: str) -> None:
    from saerl_fast.rl.loss import importance_weights

    g = torch.Generator().manual_seed(0)
    now = (-torch.rand(7, generator=g)).requires_grad_()
    sampled, reference = now.detach() + torch.randn(7, generator=g), now.detach() - 0.3
    weights = importance_weights(now, sampled, 0.8)
    torch.testing.assert_close(weights, (now.detach().exp() / sampled.exp()).clamp(max=0.8))
    assert not weights.requires_grad and 0 < int((weights == 0.8).sum()) < 7
    share = (torch.tensor([1.5, -0.5]), torch.tensor([3, 4]), BatchSize(2, 7, 10))
    for beta in (0.0, 0.2):
        cfg = LossConfig(kind=kind, beta=beta)

        def gradient(importance, beta=beta, cfg=cfg):
            loss, _ = policy_loss(now, now.detach(), *share, cfg, reference, importance)
            return torch.autograd.grad(loss, now)[0]

        plain, rest = gradient(None), gradient(torch.zeros(7))  # rest: of the KL term alone
        if kind != "gspo":  # whose ratio joins the tokens of a completion
            torch.testing.assert_close(gradient(weights) - rest, weights * (plain - rest))
        assert bool(rest.any()) == (beta > 0)
        torch.testing.assert_close(gradient(torch.ones(7)), plain)


@pytest.mark.parametrize("value", [0.9, 0.1, 1 / 3])
def test_groups_without_signal_have_exactly_no_advantage(value: float) -> None:
    """The mean of three times 0.9 is not 0.9 in floats."""
    values, used = advantages(torch.full((1, 3), value), LossConfig())
    assert not used.any() and not values.any()


# --- a loss from outside ---------------------------------------------------------------------------

CODE = """
import torch
from saerl_fast.rl.loss import Loss, completion_mean

SEEN = []

def reinforce(tokens):
    SEEN.append(tokens)
    return -tokens.advantages * tokens.logprobs

def dapo(tokens):
    part = tokens.ratio.clamp(tokens.low, tokens.high) * tokens.advantages
    return -torch.minimum(tokens.ratio * tokens.advantages, part)

gspo = Loss(dapo, completion_mean, (3e-4, 4e-4), sequence=True)
unscaled = Loss(reinforce, scaled=False)
nothing = lambda tokens: None
scalar = lambda tokens: tokens.logprobs.mean()
cut_off = lambda tokens: tokens.logprobs.detach()

def breaks(tokens):
    raise IndexError("no such token")

def too_large(tokens):
    raise torch.OutOfMemoryError("no room")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "saerl_losses.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name, **more: LossConfig(kind=f"saerl_losses:{name}", **more)
    sys.modules.pop("saerl_losses", None)
    get_loss.cache_clear()


def test_the_table_and_the_config_name_the_same_losses() -> None:
    assert tuple(KINDS) == LOSSES


def test_a_loss_from_outside_gets_the_tokens_and_is_averaged(mine) -> None:
    new, old, adv, lengths, ref = parts()
    size = BatchSize(6, int(lengths.sum()), 8)
    loss, _ = policy_loss(new, old, adv, lengths, size, mine("reinforce"))
    torch.testing.assert_close(loss, -(adv.repeat_interleave(lengths) * new).sum() / size.tokens)
    (tokens,) = sys.modules["saerl_losses"].SEEN
    assert tokens.logprobs is new and tokens.old_logprobs is old and tokens.lengths is lengths
    torch.testing.assert_close(tokens.ratio, (new - old).exp())
    assert (tokens.low, tokens.high) == (0.8, 1.28) and tokens.advantages.shape == new.shape
    with_kl, sums = policy_loss(new, old, adv, lengths, size, mine("reinforce", beta=0.1), ref)
    assert with_kl > loss and sums["kl"] > 0
    assert clip_range(mine("reinforce", clip_low=0.5))[0] == 0.5


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_the_built_in_losses_could_be_from_outside(mine, name) -> None:
    """One contract: the same number, bit for bit."""
    new, old, adv, lengths, ref = parts()
    size = BatchSize(6, int(lengths.sum()), 8)
    theirs, sums = policy_loss(new, old, adv, lengths, size, mine(name, beta=0.1), ref)
    ours, wanted = policy_loss(new, old, adv, lengths, size, LossConfig(kind=name, beta=0.1), ref)
    assert torch.equal(ours, theirs) and sums["clipped"] == wanted["clipped"]


def test_advantages_of_a_loss_that_is_not_scaled(mine) -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    torch.testing.assert_close(advantages(rewards, mine("unscaled"))[0][0], torch.tensor([-1.0, -1, -1, 3]))
    assert advantages(rewards, mine("reinforce"))[0].max() < 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", r"returned a NoneType; return a tensor \[17\]"),
        ("scalar", r"returned shape \[\]; return a tensor \[17\]"),
        ("cut_off", "has no gradient"),
        ("breaks", "raised IndexError: no such token .*saerl_losses.py line .*; mend it"),
        ("gone", "has no function 'gone'; it has .*reinforce"),
    ],
)
def test_a_wrong_loss_is_one_sentence(mine, name, said) -> None:
    new, old, adv, lengths, _ = parts()
    with pytest.raises(SaerlError, match=f"saerl_losses:{name}.*{said}"):
        policy_loss(new, old, adv, lengths, BatchSize(6, 17, 8), mine(name))
    with torch.no_grad():  # nothing to differentiate, nothing to complain about
        policy_loss(new, old, adv, lengths, BatchSize(6, 17, 8), mine("reinforce"))


def test_running_out_of_memory_is_left_to_the_optimizer(mine) -> None:
    new, old, adv, lengths, _ = parts()
    with pytest.raises(torch.OutOfMemoryError):
        policy_loss(new, old, adv, lengths, BatchSize(6, 17, 8), mine("too_large"))
