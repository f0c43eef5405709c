"""GRPO under a plan: one optimizer step per batch of rollouts.

A step: the plan names the prompts; each is prefetched once and sampled G times (a capture object sees
that prefill); rewards become pass rates, which the plan is told, and advantages; one clipped
policy-gradient step is made from micro-batches. As there is exactly one step per batch, the sampled
log-probabilities are those of the policy being updated, so they serve as the old ones and no forward
pass is spent on recomputing them. What the two engines (cached decoding, full forward) disagree by is
logged as ``mismatch``, the mean absolute difference per token; steps where it is more than rounding explains
are counted in the summary (``mismatch_steps``), and warned of, as is all that goes wrong in training
(``saerl_fast.rl.health``). gspo's clip range is narrower than that
difference in half precision, so it alone takes the full forward's values, detached, as the old ones.

Groups whose rewards are all equal have zero advantages: they are left out of the forward and backward
passes but counted in the rollouts, in the loss's normaliser and in every figure of the log except
``loss``, ``entropy``, ``clipped``, ``kl`` and ``mismatch``, which are about the groups used. With
``train.dynamic_sampling`` a step draws further batches from the plan while too few groups have a signal
(``saerl_fast.rl.rollouts``). Every draw counts: in the rollouts, in the plan's memory and as one of the
plan's steps, so a schedule paced for ``total_steps`` ends early and the plan goes on after its end.
With ``train.rollout.screen`` a group is made in two stages (``saerl_fast.rl.draws``).

All randomness comes from (seed, purpose, step), so a resumed run needs no generator state to go on; the
global generators, which a reward may use, are seeded at the start of every step. For several processes see
``saerl_fast.rl.distributed``: a checkpoint of N processes goes on with any number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerl_fast.config import SCREENED, TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import written
from saerl_fast.records.lock import Lock, lock
from saerl_fast.records.log import write_logs
from saerl_fast.records.packed import Rows
from saerl_fast.rl import checkpoint as ckpt
from saerl_fast.rl import distributed, lora, seeds
from saerl_fast.rl.clock import Clock
from saerl_fast.rl.draws import draw
from saerl_fast.rl.evaluate import current_rates, evaluate, known_mean, pass_rates
from saerl_fast.rl.finish import finish
from saerl_fast.rl.health import Health
from saerl_fast.rl.interrupt import Stopped, graceful_interrupt
from saerl_fast.rl.logs import RunLogs, write_held_out
from saerl_fast.rl.rescue import DUE, Rescue
from saerl_fast.rl.rewards import Notes, State, with_timeout
from saerl_fast.rl.rewards.dry import read_answers
from saerl_fast.rl.rollouts import join
from saerl_fast.rl.seeds import derived_seed
from saerl_fast.rl.update import Learner
from saerl_fast.rl.warmup import warm_up
from saerl_fast.rl.ways import tolerance

if TYPE_CHECKING:
    from saerl_fast.plan import Plan
    from saerl_fast.rl.engine import Engine
    from saerl_fast.session import Session

log = logging.getLogger(__name__)


def train(
    session: Session,
    plan: Plan,
    reward: Callable[..., Any],
    cfg: TrainConfig,
    out_dir: str | Path,
    *,
    capture: Any | None = None,
    engine: Engine | None = None,
    resume: bool = False,
    seed: int = 0,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    enough: Callable[[Sequence[tuple[int, float]]], bool] | None = None,
) -> dict[str, Any]:
    """Train ``session.model`` in place for ``cfg.steps`` steps; returns (and writes) the summary.

    ``capture``: a context manager around each prefill with ``features()`` -> CSR, one row per prompt, handed
    to ``plan.observe``. ``engine`` makes the rollouts when ``cfg.rollout.engine`` is not transformers.
    ``echo`` gets a line of text per row of the log, ``progress`` (steps done, steps), at the start as well.
    ``enough`` may end the run earlier: it is asked after each step, with the steps and accuracies of the
    evaluations so far. Files in ``out_dir``: metrics.jsonl, eval_items.jsonl and eval_prompts.jsonl,
    rollouts.jsonl, checkpoints/, summary.json and model/. With ``cfg.lora.rank`` > 0 the warm-up and the
    steps train adapters alone, the reference policy (``cfg.loss.beta`` > 0) is the model without them, so as
    it was before the warm-up, and at the end they are written to adapter/ and merged into ``model`` and
    model/. Merging rounds in half precision, so there model/ is float32 (``cfg.lora.merge_dtype``), the model
    with its rounded weights is evaluated too, and the summary has both figures (``rl/lora.py``).

    With ``resume`` the run goes on from its latest intact checkpoint, bit for bit on a CPU; without any
    checkpoint it starts afresh. The first interrupt (Ctrl-C, SIGTERM, SIGHUP) of any of the processes
    finishes the step, saves and raises Stopped, a KeyboardInterrupt, in all; a second one stops at once. An
    error (of a reward, say) saves what came before it. ``out_dir`` is held as long (see
    `saerl_fast.records.lock`).
    """
    run = Run(
        session.model,
        session,
        plan=plan,
        reward=reward,
        cfg=cfg,
        out_dir=Path(out_dir),
        capture=capture,
        engine=engine,
        seed=seed,
        echo=echo,
        enough=enough,
    )
    with ExitStack() as stack:
        distributed.on_first(lambda: setattr(run, "held", stack.enter_context(lock(out_dir))))
        start = run.open(resume)
        stack.callback(run.close)
        stack.push(run.rescued)
        run.interrupted = stack.enter_context(graceful_interrupt())
        if start is None:
            run.begin()
            run.heed("step 0 is saved", 0)
        elif run.counters.pop(DUE, False):
            run.evaluate(start)
            run.save(start)
        if progress is not None:
            progress(start or 0, cfg.steps)
        step = start or 0
        ended = run.ended(step)
        while not ended:
            step += 1
            run.step(step)
            if step == cfg.steps or (cfg.eval.every and step % cfg.eval.every == 0):
                run.evaluate(step)
            ended = run.ended(step)
            if ended or (cfg.save_every and step % cfg.save_every == 0):
                run.save(step)
            if progress is not None:
                progress(step, cfg.steps)
            if not ended:
                run.heed(f"step {step} is saved", step)
        summary = finish(run, step)
        run.heed("the run was at its end and is complete")
    return summary


@dataclass
class Run:
    """The state of a run between steps: model, optimizer, plan, counters, logs."""

    model: Any  # the session's, or the adapters around it
    session: Session
    plan: Plan
    reward: Callable[..., Any]
    cfg: TrainConfig
    out_dir: Path
    capture: Any | None
    engine: Engine | None
    seed: int
    echo: Callable[[str], None] | None
    enough: Callable[[Sequence[tuple[int, float]]], bool] | None = None

    def __post_init__(self) -> None:
        cfg = self.cfg
        if (cfg.rollout.engine == "transformers") != (self.engine is None):
            raise SaerlError(f"train.rollout.engine={cfg.rollout.engine} is not the engine given to train()")
        self.pool, self.tokenizer = self.session.train, self.session.tokenizer
        self.row = Rows(self.pool.column("prompt_id"))
        unknown = self.row.lacking(self.plan.prompt_ids)
        if unknown:
            raise SaerlError(f"the plan has prompt {unknown[0]!r}, which the pool lacks; make the plan again")
        if distributed.size() > cfg.rollout.prompts_per_step:
            raise SaerlError(
                f"{distributed.size()} processes cannot share train.rollout.prompts_per_step="
                f"{cfg.rollout.prompts_per_step}; start fewer processes or raise it"
            )
        if cfg.rollout.screen and self.plan.learns:
            raise SaerlError(SCREENED.format(cfg.rollout.screen, self.plan.schedule))
        read_answers(self.reward, (self.session.train, self.session.eval))
        self.reward = with_timeout(self.reward, cfg.reward_timeout)
        self.state = State(max_steps=cfg.steps)
        self.warned = False  # of rewards outside [0, 1]
        self.writes = distributed.rank() == 0
        self.held: Lock | None = None  # by the process that writes
        self.logs: RunLogs | None = None  # of the process that writes
        self.interrupted: Callable[[], int] = lambda: 0
        self.counters: dict[str, Any] = dict.fromkeys(("rollouts", "tokens", "groups", "groups_used"), 0)
        self.counters |= {"seconds": {}}
        self.rescue = Rescue(self._state, self._save)

    def say(self, line: str) -> None:
        if self.writes:
            (self.echo or log.info)(line)

    def ended(self, step: int) -> bool:
        """Whether no step is left, or ``enough`` says that none is needed."""
        if step >= self.cfg.steps or self.enough is None:
            return step >= self.cfg.steps
        return self.enough([(int(at), value) for at, value in self.counters.get("curve", ())])

    def clock(self) -> Clock:
        return Clock(self.model.device, self.counters["seconds"])

    # --- life of a run -----------------------------------------------------------------------------

    def open(self, resume: bool) -> int | None:
        """Restore the latest checkpoint when resuming, open the logs; its step, or None for a fresh start."""
        found = ckpt.load_latest(self.out_dir) if resume else None
        logs: dict[str, Any] = {}
        health = None
        self.model = lora.add_adapters(self.model, self.cfg.lora, derived_seed(self.seed, seeds.ADAPTER, 0))
        if found is not None:
            ckpt.load_model_tensors(self.model, found.model)
            self.learner = Learner(self.model, self.cfg)
            self.learner.optimizer.load_state_dict(found.optimizer)
            if self.learner.reference is not None:
                ckpt.load_model_tensors(self.learner.reference, found.reference)
            self.plan.load_state_dict(found.plan)
            self.counters = found.counters
            fitted = self.counters.pop("micro_tokens")
            logs, health = self.counters.pop("logs", {}), self.counters.pop("health", None)
            self.learner.optimizer.micro_tokens = min(self.cfg.micro_tokens, fitted)
            self.say(f"resuming after step {found.step} from {found.path}")
            written[found.path] = None
        elif resume:
            self.say(f"no checkpoint in {self.out_dir}: starting at step 0")
        at = found.step if found is not None else None
        self.rescue.saved = -1 if at is None else at
        if len(set(distributed.gather(lambda: at))) > 1:
            raise SaerlError(f"the processes find different checkpoints in {self.out_dir}; share the folder")
        self.health = Health(self.cfg, tolerance(self.model, self.cfg.rollout.temperature), health)
        distributed.broadcast(list(ckpt.model_tensors(self.model).values()))
        if not self.writes:
            return at
        if found is None:
            ckpt.set_aside(self.out_dir)
            write_held_out(self.out_dir, self.session.eval)
        told: dict[str, Any] = {"echo": self.echo, "trackers": self.cfg.trackers, "steps": self.cfg.steps}
        self.logs = RunLogs(self.out_dir, at, logs, self.counters, **told)
        return at

    def begin(self) -> None:
        """Warm-up, the frozen reference, the first evaluation, and a checkpoint of what training changed."""
        cfg = self.cfg
        self._seed_globals(0)
        if cfg.warmup.steps > 0:
            clock = self.clock()
            with clock("warmup"):
                stop = partial(self.heed, "nothing is saved before the warm-up has ended")
                row = warm_up(self.model, self.tokenizer, self.pool, cfg, self.seed, after_step=stop)
            self._record({"step": 0, "kind": "warmup", **row, "time": clock.seconds})
        self.learner = Learner(self.model, cfg)
        if cfg.eval.every > 0 or cfg.steps == 0:
            self.evaluate(0)
        if cfg.warmup.steps > 0 or cfg.steps == 0:
            self.save(0)

    def save(self, step: int) -> None:
        state = self._state()
        with self.clock()("save"):
            distributed.on_first(self.check)
            distributed.on_first(lambda: self._save(step, state))
        self.rescue.saved = step

    def _state(self) -> dict[str, Any]:
        """Of plan, counters, alarms and logs, as they are after a whole step."""
        written = self.logs.written() if self.logs else {}
        counters = self.counters | {"logs": written, "health": self.health.state}
        return {"plan": self.plan.state_dict(), "counters": counters}

    def _save(self, step: int, state: dict[str, Any]) -> None:
        learner, counters = self.learner, state["counters"]
        state |= {"counters": counters | {"micro_tokens": learner.optimizer.micro_tokens}}
        state |= {"model": self.model, "reference": learner.reference, "keep": self.cfg.keep}
        ckpt.save_checkpoint(self.out_dir, step, optimizer=learner.optimizer.state_dict(), **state)
        write_logs(self.out_dir, counters["logs"], counters)

    def rescued(self, kind: type[BaseException] | None, *_: object) -> None:
        """At an error: save what came before it, unless ``out_dir`` is held no longer."""
        if self.writes and kind is not None and issubclass(kind, Exception):
            with suppress(SaerlError):
                self.check()
                self.rescue.save(self.say)

    def check(self) -> int:
        """The signal that has come, 0 for none; SaerlError when ``out_dir`` was removed or taken over."""
        if self.held is not None:
            self.held.check()
        return self.interrupted()

    def heed(self, said: str, step: int | None = None) -> None:
        """End the run if a signal has come to any of the processes, with ``step`` saved."""
        number = max(distributed.gather(self.check))
        if number:
            if step is not None and step != self.rescue.saved:
                self.save(step)
            self.say(f"interrupted: {said} in {self.out_dir}")
            raise Stopped(number)

    def close(self) -> None:
        if self.logs:
            self.logs.close()
        if self.cfg.lora.rank and hasattr(self.model, "unload"):
            self.model.unload()  # stopped early: the caller gets its model back as it was

    def _seed_globals(self, step: int) -> None:
        """So that rewards that draw at random do so again after a resume."""
        from transformers import set_seed

        set_seed(derived_seed(self.seed, seeds.GLOBAL, step, distributed.rank()))

    def _record(self, row: dict[str, Any], *, blind: bool = False) -> None:
        if self.logs is None:
            return
        begun = self.health.see(row, blind=blind) if row["kind"] in ("train", "eval") else {}
        self.logs.metrics.log(row)
        for name, sentence in begun.items():
            log.warning("step %d: %s: %s", row["step"], name, sentence)

    # --- one step ----------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        cfg, clock = self.cfg, self.clock()
        self.rescue.keep(step - 1)
        self._seed_globals(step)
        self.state.global_step = step - 1  # steps made, as transformers counts them
        if self.plan.asks:
            with clock("plan"):
                pool = self.pool.select([self.row.get(name) or 0 for name in self.plan.prompt_ids])
                self.plan.know(current_rates(self.model, self.tokenizer, pool, cfg))
        wanted, number = cfg.rollout.prompts_per_step, 1
        draws = draw(self, step, 0, clock)
        while number <= cfg.dynamic_sampling and sum(int(d.used.sum()) for d in draws) < wanted:
            draws += draw(self, step, number, clock)
            number += 1
        rollouts, advantage, used = join(draws, wanted)
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))
        self.rescue.drop()
        update = self.learner.update(rollouts, advantage, used, lr, clock)
        lengths = torch.cat([part.rollouts.lengths for part in draws])
        counts = {
            "rollouts": len(lengths),
            "tokens": int(lengths.sum()),
            "groups": sum(len(part.ids) for part in draws),
            "groups_used": int(used.sum()),
        }
        for name, value in counts.items():
            self.counters[name] += value
        if self.logs:
            self.logs.write_rollouts(step, draws[0], cfg.rollout_log)
        rewards = np.concatenate([part.rewards.ravel() for part in draws])
        rates = np.concatenate([pass_rates(part.rewards, cfg.pass_threshold) for part in draws])
        notes = Notes()
        for part in draws:
            notes.add(part.notes)
        finished = torch.cat([part.rollouts.finished for part in draws])
        row = {
            "step": step,
            "kind": "train",
            "reward": float(known_mean(rewards[None])[0]),
            "pass_rate": float(known_mean(rates[None])[0]),
            **update,
            **counts,
            "length": counts["tokens"] / counts["rollouts"],
            "finished": float(finished.float().mean()),
            "lr": lr,
            "plan": self.plan.metrics(),
            **notes.means(),
            "time": clock.seconds,
        }
        active = [getattr(part.rollouts.features, "nnz", None) for part in draws]
        blind = self.plan.wants_features and active == [0] * len(draws)
        self._record(row | ({"draws": number} if cfg.dynamic_sampling else {}), blind=blind)

    # --- around the steps --------------------------------------------------------------------------

    def evaluate(self, step: int) -> None:
        clock = self.clock()
        self.rescue.keep(step, due=True)
        with clock("eval"):
            pool, seed = self.session.eval, derived_seed(self.seed, seeds.EVAL, 0)
            self.state.global_step = step
            result = evaluate(self.model, self.tokenizer, pool, self.reward, self.cfg, seed, self.state)
        if self.logs:
            self.logs.items.write({"step": step, **item} for item in result.items)
        self.counters.setdefault("accuracy_first", result.mean)
        self.counters["accuracy"] = result.mean
        if self.enough is not None:
            self.counters["curve"] = [*self.counters.get("curve", ()), [step, result.mean]]
        self.counters["accuracy_best"] = max(result.mean, self.counters.get("accuracy_best", result.mean))
        judged = sum(item["score"] is not None for item in result.items)
        row = {"step": step, "kind": "eval", "accuracy": result.mean, "n": judged}
        self._record(row | {"mode": result.mode, "tokens": result.tokens, "time": clock.seconds})
