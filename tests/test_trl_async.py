"""A plan in TRL's AsyncGRPOTrainer: order, rewards told once, stale groups, resuming."""

from __future__ import annotations

import json
import multiprocessing
import queue
import threading
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.columns import to_dataset
from saerl_fast.integrations.trl import plan_trainer
from saerl_fast.integrations.trl_async import Groups, PlanFeed
from tests.test_integrations import IDS, N, make_plan, make_pool, make_tiny

SIZE = 2  # rollouts of a group


def rate(name: str) -> float:
    return int(name[1:]) / N


def give(groups: Groups, number: int, name: str) -> None:
    for _ in range(SIZE):
        groups.reward(number, rate(name))


def test_each_group_is_told_once_and_what_is_on_its_way_comes_again():
    groups = Groups(make_plan("adaptive"), IDS, None)
    names = [IDS[groups.next_row()] for _ in range(7)]
    for number in (1, 0, 4, 5):  # they arrive in the order in which they are done; 5 is still arriving
        give(groups, number, names[number])
    told = [event for event in groups.events if len(event) == 2]
    assert told == [[[names[i]], [rate(names[i])]] for i in (1, 0, 4)]
    state = json.loads(json.dumps(groups.state()))
    assert state["again"] == [names[i] for i in (2, 3, 5, 6)] and state["next"] == 7
    resumed = Groups(make_plan("adaptive"), IDS, None)
    resumed.load(state)
    assert [IDS[resumed.next_row()] for _ in range(4)] == [names[i] for i in (2, 3, 5, 6)]
    assert resumed.next_row() == groups.next_row()  # then both go on with the plan
    assert resumed.plan.step == groups.plan.step == 2
    groups.reward(5, float("nan"))  # one that no reward judges
    give(groups, 6, names[6])
    assert groups.events[-1] == [[names[5]], [rate(names[5])]]


def read(feed: PlanFeed, n: int, out: Any) -> None:
    rows = iter(feed.select(range(5)))
    out.put([next(rows)["prompt_id"] for _ in range(n)])


def test_another_process_is_given_the_rows():
    pytest.importorskip("datasets")
    groups, context = Groups(make_plan("global"), IDS, None), multiprocessing.get_context("spawn")
    listener = Listener(authkey=multiprocessing.current_process().authkey)
    groups.serve(listener)
    out = context.Queue()
    child = context.Process(target=read, args=(PlanFeed(to_dataset(make_pool()), listener.address), 5, out))
    child.start()
    found = out.get(timeout=120)
    child.join(timeout=60)
    plan = make_plan("global")
    assert found == (plan.next_batch() + plan.next_batch())[:5]


class Worker:
    """Makes groups of random tokens in a thread, a few ahead; every third one is told to be old."""

    def __init__(self, stale: int = 0) -> None:
        self.dataset: Any = None
        self.rollout_buffer, self.metrics_queue = queue.Queue(maxsize=6), queue.Queue()
        self.stale, self.made, self.version = stale, list[str](), 0
        self._end = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._make, daemon=True).start()

    def _make(self) -> None:
        for number, row in enumerate(self.dataset):
            self.made.append(row["prompt_id"])
            old = self.stale and number % 3 == 2
            for i in range(SIZE):
                ids = np.array([2 + (number + j) % 9 for j in range(4 + i)])
                sample = SimpleNamespace(
                    input_ids=ids,
                    completion_mask=(np.arange(len(ids)) >= 2).astype(np.int64),
                    old_log_probs=np.full(len(ids), -2.0, dtype=np.float32),
                    advantage=1.0 - 2 * i,
                    model_version=self.version - (100 if old else 0),
                    group_id=number,
                    metrics={"reward": rate(row["prompt_id"])},
                    enqueued_at=None,
                )
                while not self._end.is_set():
                    try:
                        self.rollout_buffer.put(sample, timeout=0.05)
                        break
                    except queue.Full:
                        pass
            if self._end.is_set():
                return

    def stop(self) -> None:
        self._end.set()

    def update_model_version(self, model_version: int) -> None:
        self.version = model_version

    def check_health(self, stale_after_s: float) -> None: ...


def attention(q, k, v, starts_q, starts_k, most_q, most_k, *, softmax_scale, causal, window_size):
    """flash_attn_varlen_func in plain torch: the queries are the last tokens of each sequence."""
    found = []
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        one = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=softmax_scale)
        found.append(one[0].transpose(0, 1))
    return torch.cat(found)


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """Makes a real AsyncGRPOTrainer whose attention kernel and rollout worker run on a CPU."""
    pytest.importorskip("trl")
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    where = "trl.experimental.async_grpo.async_grpo_trainer.get_peak_flops_per_device"
    monkeypatch.setattr(where, lambda *_: 1.0)  # it asks for a GPU's name
    make, tokenizer = make_tiny()
    make().save_pretrained(tmp_path / "model")
    nothing = SimpleNamespace(
        **dict.fromkeys(("init_weight_transfer", "pause", "resume", "destroy"), lambda: None),
        send_weights=lambda pairs: [None for _ in pairs],
    )

    def made(folder: str, plan: Any, worker: Worker, steps: int, **more: Any) -> Any:
        args = AsyncGRPOConfig(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            num_generations=SIZE,
            token_budget=0,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dtype="float32",
        )
        chats = [[{"role": "user", "content": text}] for text in make_pool().column("prompt")]
        data = to_dataset(make_pool()).remove_columns("prompt").add_column("prompt", chats)
        settings = {"train_dataset": data, "rollout_worker": worker, "weight_transfer": nothing} | more
        return plan_trainer(
            plan,
            base=AsyncGRPOTrainer,
            model=str(tmp_path / "model"),
            args=args,
            processing_class=tokenizer,
            reward_funcs=[lambda **columns: [0.0]],
            **settings,
        )

    return made


def test_the_async_trainer_follows_an_adaptive_plan_and_resumes(trainer, tmp_path: Path):
    worker = Worker(stale=3)
    trainer("run", make_plan("adaptive", total_steps=12), worker, 4).train()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "saerl_plan.json").read_text())
    told = [event[0][0] for event in state["events"] if len(event) == 2]
    handed = told + state["again"]
    assert sorted(handed) == sorted(worker.made[: len(handed)]) and state["next"] == len(handed)
    assert len(told) >= 4 and {worker.made[2]} <= {*told}  # a stale group: told, and in nobody's way
    again = Worker()
    folder = str(tmp_path / "run" / "checkpoint-2")
    trainer("run", make_plan("adaptive", total_steps=12), again, 4).train(resume_from_checkpoint=folder)
    assert again.made[: len(state["again"])] == state["again"]
    last = json.loads((tmp_path / "run" / "checkpoint-4" / "saerl_plan.json").read_text())
    assert last["events"][: len(state["events"])] == state["events"]


def test_plain_text_is_refused(trainer, tmp_path):
    with pytest.raises(SaerlError, match="takes conversations"):
        trainer("run", make_plan("vanilla"), Worker(), 1, train_dataset=to_dataset(make_pool()))
