"""A batch of the plan: sampled, rewarded, told to the plan; in one stage or in two.

With ``train.rollout.screen`` of k, every prompt has k rollouts first, and the rest of its group only where
the rewards of these differ, as in SPEED (Zhang et al., SPEED-RL: Faster training of reasoning models via
online curriculum learning, arXiv 2506.09016). A group that would have differed later is missed. All rollouts
count. ``train.dynamic_sampling`` fills such batches up. SPEED makes the first stage of a coming batch in the
same call as the rest of this one and keeps what is over; here a step ends with what it began.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerl_fast.rl import distributed, seeds
from saerl_fast.rl.clock import Clock
from saerl_fast.rl.evaluate import pass_rates, score_rollouts, warn_of_range
from saerl_fast.rl.generate import generate
from saerl_fast.rl.loss import advantages, overlong_penalty
from saerl_fast.rl.rewards import Notes
from saerl_fast.rl.rollouts import Draw, Rollouts, concat, select, widen
from saerl_fast.rl.seeds import derived_seed


def draw(run: Any, step: int, number: int, clock: Clock) -> list[Draw]:
    """The next batch of ``run``, a `saerl_fast.rl.trainer.Run`; of two stages, the groups that went on, and
    those that ended after the first.
    """
    cfg = run.cfg.rollout
    with clock("plan"):
        ids = distributed.gather(run.plan.next_batch)[0]  # one order, even if machines round differently
    seed = derived_seed(run.seed, seeds.ROLLOUT, step, number)
    drawn = [_sample(run, ids, cfg.screen or cfg.group_size, seed, clock, run.capture)]
    if cfg.screen:
        drawn = _continued(run, drawn[0], derived_seed(run.seed, seeds.REST, step, number), clock)
    with clock("plan"):
        for part in drawn:
            _tell(run, part)
    return drawn


def _continued(run: Any, made: Draw, seed: int, clock: Clock) -> list[Draw]:
    """The groups whose rewards differ with all their rollouts, and the others as they are."""
    going = made.used.nonzero()[:, 0]
    if not len(going):
        return [made]
    begun, left = _some(made, going), _some(made, (~made.used).nonzero()[:, 0])
    size = run.cfg.rollout.group_size - made.rollouts.group_size
    rest = _sample(run, begun.ids, size, seed, clock, None)
    rollouts, rewards = widen(begun.rollouts, rest.rollouts), np.hstack([begun.rewards, rest.rewards])
    notes = Notes(metrics=made.notes.metrics, parts=made.notes.parts)
    notes.add(Notes(metrics=rest.notes.metrics, parts=rest.notes.parts))
    whole = Draw(
        begun.ids, begun.prompts, begun.columns, rollouts, rewards, *_weigh(run, rollouts, rewards), notes
    )
    return [whole, left] if left.ids else [whole]


def _sample(run: Any, ids: list[str], group: int, seed: int, clock: Clock, capture: Any) -> Draw:
    """``group`` rollouts of each prompt with their rewards; each process makes a share of them."""
    cfg = run.cfg
    rows = [run.row[name] for name in ids]
    # not Pool.select: a small pool may repeat a prompt inside a batch
    columns = {name: [column[i] for i in rows] for name, column in run.pool.columns.items()}
    prompts = [run.pool.texts[i] for i in rows]
    here = distributed.shard(len(ids))
    part = {name: column[here] for name, column in columns.items()}

    def sample() -> tuple[Rollouts, np.ndarray, Notes] | None:
        tokens = [run.pool.ids[i] for i in rows[here]]
        if not tokens:  # a second stage may have fewer prompts than there are processes
            return None
        if capture is not None and hasattr(capture, "expect"):
            own = run.pool.own
            capture.expect(tokens, None if own is None else [own[i] for i in rows[here]])
        given: dict[str, Any] = {"seed": seed, "first": here.start, "capture": capture}
        settings = replace(cfg.rollout, group_size=group, screen=0) if cfg.rollout.screen else cfg.rollout
        make = generate if run.engine is None else run.engine.generate
        made = make(run.model, run.tokenizer, tokens, settings, **given)
        for phase, seconds in made.timings.items():
            clock.add(phase, seconds)
        with clock("reward"):
            notes = Notes()
            rewards = score_rollouts(
                made,
                part,
                prompts[here],
                run.reward,
                prefill=run.pool.prefill,
                pay_truncated=cfg.reward_truncated,
                state=run.state,
                notes=notes,
            )
        return made.to("cpu") if distributed.size() > 1 else made, rewards, notes

    shares = [share for share in distributed.gather(sample) if share is not None]
    rollouts = concat([made for made, _, _ in shares]).to(run.model.device)
    rewards = np.concatenate([found for _, found, _ in shares])
    notes = Notes()
    for _, _, found in shares:
        notes.add(found)
    if run.writes and not run.warned:
        run.warned = warn_of_range(rewards, cfg.pass_threshold)
    return Draw(ids, prompts, columns, rollouts, rewards, *_weigh(run, rollouts, rewards), notes)


def _weigh(run: Any, rollouts: Rollouts, rewards: np.ndarray) -> tuple[Tensor, Tensor]:
    """Advantages [P, G], and which groups carry a signal, bool [P]."""
    task = torch.from_numpy(rewards)
    shaped = task + overlong_penalty(rollouts.lengths.cpu(), run.cfg).view_as(task)
    return advantages(task, run.cfg.loss, shaped)


def _some(made: Draw, groups: Tensor) -> Draw:
    """Some groups of a draw, int64 [n], without its notes."""
    rows = groups.tolist()
    return Draw(
        [made.ids[i] for i in rows],
        [made.prompts[i] for i in rows],
        {name: [column[i] for i in rows] for name, column in made.columns.items()},
        select(made.rollouts, groups),
        made.rewards[rows],
        made.advantage[groups],
        made.used[groups],
    )


def _tell(run: Any, part: Draw) -> None:
    """The plan observes the prompts that the reward judged."""
    ids, rates = part.ids, pass_rates(part.rewards, run.cfg.pass_threshold)
    features, known = part.rollouts.features, np.flatnonzero(~np.isnan(rates))
    if len(known) == len(ids):
        run.plan.observe(ids, rates, features)
    elif len(known):
        some = None if features is None else features.select_rows(torch.from_numpy(known))
        run.plan.observe([ids[i] for i in known], rates[known], some)
