"""The contenders of bench_rl_step.py, each in a process of its own, taking one step when told to.

A contender is a whole trainer with its own training loop: `train` of saerl_fast.rl.trainer, or TRL's
GRPOTrainer. Both call `Turn` at the end of every optimizer step, which reports the step and then waits for
the parent's next word; so trainers can be run step about, and none sees another's memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import process_mb
from saerl_fast.config import Config, PlanConfig, load_config
from saerl_fast.plan import Plan, build_plan
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.loss import BatchSize, advantages, clip_range, policy_loss
from saerl_fast.rl.rewards import get_reward
from saerl_fast.rl.trainer import train
from saerl_fast.sae.capture import FeatureCapture
from saerl_fast.sae.files import load_sae
from saerl_fast.session import Session
from saerl_fast.signals.scores import Scores
from saerl_fast.stages.console import Echo
from saerl_fast.stages.pipeline import score_stage
from saerl_fast.stages.preflight import set_up

DEMO = Path(__file__).resolve().parents[1] / "examples"
LR = 1e-6  # so small that every contender goes on sampling from the same distribution


@dataclass(frozen=True)
class Job:
    """What the contenders of a comparison are told."""

    model: str  # folder, hub id or GGUF file
    dtype: str
    threads: int | None
    prompts: int  # a step
    group: int
    new_tokens: int
    ends: bool  # False: no end token can be sampled, so every completion has new_tokens tokens
    reward: str  # exact, or spread: every group has a signal
    folder: str  # for files
    limit: int | None = None  # prompts in the pool
    signals: bool = False  # the adaptive plan over scores found in `folder`, features captured
    steps: int = 1000

    def config(self) -> Config:
        """The demo's configuration, for this model and these sizes."""
        overrides = [
            f"run_dir={self.folder}",
            f"model.path={self.model}",
            f"model.dtype={self.dtype}",
            f"threads={self.threads or ''}",
            f"data.train={DEMO / 'demo/pool.jsonl'}",
            f"data.eval={DEMO / 'demo/eval.jsonl'}",
            f"data.limit={self.limit or ''}",
            "data.chat=never",
            f"train.steps={self.steps}",
            f"train.lr={LR}",
            "train.warmup_steps=0",
            f"train.micro_tokens={1 << 30}",  # one micro-batch, as for TRL
            "train.save_every=0",
            "train.eval.every=0",
            f"train.rollout.prompts_per_step={self.prompts}",
            f"train.rollout.group_size={self.group}",
            f"train.rollout.max_new_tokens={self.new_tokens}",
            "difficulty.n_labels=0",
            "sae.steps=60",  # what encoding costs does not depend on how well the SAE was trained
        ]
        if Path(self.model) != DEMO / "demo/model":
            overrides.append("sae.layer=")
        return load_config(DEMO / "demo.yaml", overrides)

    def session(self) -> Session:
        """Model, tokenizer and pools, loaded alike for every contender."""
        session = Session.open(self.config())
        if not self.ends:
            session.tokenizer.add_special_tokens({"eos_token": "<never>"})
            never = session.tokenizer.eos_token_id
            if never < session.model.get_output_embeddings().weight.shape[0]:
                raise RuntimeError(f"{self.model} can sample token {never}, which was to end nothing")
            session.model.generation_config.eos_token_id = session.model.config.eos_token_id = never
        return session

    def vanilla(self, session: Session) -> Plan:
        """Shuffled prompts, the same for every contender."""
        scores = Scores({"prompt_id": session.train.column("prompt_id")})
        sizes = {"batch_size": self.prompts, "total_steps": self.steps, "seed": 0}
        return build_plan(scores, PlanConfig(schedule="vanilla"), **sizes)

    def score(self) -> Callable[..., list[float]]:
        if self.reward == "spread":
            return lambda prompts, completions, **_: [float(i % 2) for i in range(len(completions))]
        return get_reward(self.reward)


class Turn:
    """The end of a step: report it, then wait to be told to take the next.

    A report is a dict: ``seconds`` of the step (the whole process's CPU time on one thread, else wall time),
    ``peak_mb`` (allocated on a GPU; on a CPU resident, beyond what was when this object was made, with the
    model loaded) and what the contender adds. The parent's word is a list of prompt ids, which a contender
    may follow; None ends the process.
    """

    def __init__(self, pipe: Any, job: Job) -> None:
        self.pipe, self.cuda = pipe, torch.cuda.is_available()
        self.clock = time.process_time if not self.cuda and job.threads == 1 else time.perf_counter
        self.order: list[str] = []
        self._held = 0.0
        if not self.cuda:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, reached while loading
            self._held = process_mb("VmRSS")
        self._started = 0.0

    def seconds(self) -> float:
        """Since the parent's last word."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock() - self._started

    def __call__(self, **report: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else process_mb("VmHWM") - self._held
        self.pipe.send(report | {"peak_mb": peak})
        word = self.pipe.recv()
        if word is None:
            raise _Stop
        self.order = word
        self._started = self.clock()


class _Stop(Exception):
    """The parent has seen enough."""


def work(kind: str, job: Job, pipe: Any) -> None:
    """A process's main function; ``kind``: ours, trl, agreement (of the two) or prepare (SAE and scores)."""
    try:
        set_up(job.config())
        if kind == "prepare":
            score_stage(job.config(), Echo(quiet=True))
            pipe.send({})
        elif kind == "ours":
            _ours(job, pipe)
        else:
            _trl(job, pipe, kind == "agreement")
    except _Stop:
        pass
    except BaseException as err:
        pipe.send({"error": f"{type(err).__name__}: {err}"})
        raise


def _ours(job: Job, pipe: Any) -> None:
    config, session = job.config(), job.session()
    turn, plan, capture = Turn(pipe, job), job.vanilla(session), None
    if job.signals:
        sizes = {"batch_size": job.prompts, "total_steps": job.steps, "seed": 0}
        plan = build_plan(Scores.load(job.folder), config.plan, **sizes)
        sae = load_sae(Path(job.folder) / "sae").to(session.model.device)
        capture = FeatureCapture(session.model, sae, config.score.reduce, layer=config.sae.layer)
        capture.warm_up()
    drawn: list[str] = []
    choose = plan.next_batch

    def next_batch() -> list[str]:
        drawn[:] = turn.order or choose()
        return list(drawn)

    plan.next_batch = next_batch  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:

        def ended(step: int, steps: int) -> None:
            if not step:  # told before the first one
                return
            seconds = turn.seconds()
            row = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
            result = [row[key] for key in ("reward", "loss", "grad_norm", "tokens")]
            turn(seconds=seconds, tokens=row["tokens"], order=list(drawn), phases=row["time"], result=result)

        turn()
        train(
            session,
            plan,
            job.score(),
            config.train,
            out,
            capture=capture,
            progress=ended,
        )


def _trl(job: Job, pipe: Any, agreement: bool) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config, session = job.config(), job.session()
    turn = Turn(pipe, job)
    row = {name: i for i, name in enumerate(session.train.column("prompt_id"))}
    plan = job.vanilla(session)
    order = [row[name] for _ in range(2 if agreement else job.steps) for name in plan.next_batch()]
    rows = Dataset.from_dict(session.train.columns | {"prompt": session.train.texts}).select(order)
    reward, tokens = job.score(), [0]

    def counting(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        tokens[0] = sum(map(len, completion_ids))
        return reward(**columns)

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **more: Any) -> None:
            if not agreement:
                turn()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            turn(seconds=turn.seconds(), tokens=tokens[0])

    class Compared(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            pipe.send(
                _differences(self, inputs, super()._generate_and_score_completions(inputs), reward, job)
            )
            raise _Stop

    lowest, highest = clip_range(config.train.loss)
    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=job.prompts * job.group,
            gradient_accumulation_steps=1,
            num_generations=job.group,
            max_completion_length=job.new_tokens,
            max_steps=job.steps,
            shuffle_dataset=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            loss_type=config.train.loss.kind,
            epsilon=1 - lowest,
            epsilon_high=highest - 1,
            beta=0.0,
            gradient_checkpointing=False,
            bf16=next(session.model.parameters()).dtype == torch.bfloat16,
            use_cpu=not turn.cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = (Compared if agreement else GRPOTrainer)(
            model=session.model,
            args=args,
            train_dataset=rows,
            reward_funcs=counting,
            processing_class=session.tokenizer,
        )
        trainer.add_callback(Steps())
        trainer.train()


def _differences(
    trainer: Any, inputs: list[dict[str, Any]], made: dict[str, Any], reward: Any, job: Job
) -> dict[str, float]:
    """The largest differences between our advantages, loss and gradients and TRL's, on TRL's rollouts.

    Advantages and the loss in their own units, gradients relative to TRL's largest entry.
    """
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    weights = [p for p in model.parameters() if p.requires_grad]
    starts, lengths = made["prompt_mask"].sum(1), made["completion_mask"].sum(1)
    width = made["prompt_ids"].shape[1]
    completions = [ids[:n] for ids, n in zip(made["completion_ids"], lengths.tolist(), strict=True)]
    prompts = [ids[width - n :] for ids, n in zip(made["prompt_ids"], starts.tolist(), strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.cat(pair) for pair in zip(prompts, completions, strict=True)], batch_first=True
    )
    columns = {name: [row[name] for row in inputs] for name in inputs[0]}
    columns["prompts"] = columns.pop("prompt")
    columns["completions"] = tokenizer.batch_decode(completions, skip_special_tokens=True)
    cfg = job.config().train.loss
    mine, _ = advantages(torch.tensor(reward(**columns)).view(-1, job.group), cfg)
    advantage = mine.flatten().to(ids.device)
    owner = torch.arange(len(ids), device=ids.device) // job.group
    new, _ = completion_logprobs(model, ids, starts, lengths, owner=owner)
    size = BatchSize(len(ids), int(lengths.sum()), job.new_tokens)
    loss, _ = policy_loss(new, new.detach(), advantage, lengths, size, cfg)
    ours = torch.autograd.grad(loss, weights)
    expected = trainer._compute_loss(trainer.model, made)
    theirs = torch.autograd.grad(expected, weights)
    scale = max(float(g.abs().max()) for g in theirs)
    return {
        "advantages": float((advantage - made["advantages"]).abs().max()),
        "loss": float((loss - expected).detach().abs()),
        "gradients": max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale,
        "scale": scale,
    }
