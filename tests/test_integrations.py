from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.integrations.columns import add_scores, to_dataset
from saerl_fast.integrations.journal import rates_of
from saerl_fast.integrations.trl import PlanRepeatSampler, plan_trainer
from saerl_fast.plan import Plan, build_plan
from saerl_fast.prompts.pool import Pool
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR

N = 24
IDS = [f"p{i}" for i in range(N)]


def make_pool() -> Pool:
    return Pool({"prompt_id": IDS, "prompt": [f"{i % 7} + {i}" for i in range(N)], "answer": ["7"] * N})


def make_plan(schedule: str, batch_size: int = 4, total_steps: int = 6, seed: int = 0) -> Plan:
    rng = np.random.default_rng(1)
    dense = torch.tensor(rng.random((N, 8)) * (rng.random((N, 8)) < 0.6), dtype=torch.float32)
    difficulty = np.linspace(0, 1, N, dtype=np.float32)
    columns = {"prompt_id": IDS, "saerl_difficulty": difficulty, "saerl_cluster": np.arange(N) % 3}
    scores = Scores(columns, {}, CSR.from_dense(dense))
    cfg = PlanConfig(schedule=schedule)  # type: ignore[arg-type]
    return build_plan(scores, cfg, batch_size=batch_size, total_steps=total_steps, seed=seed)


# --- columns ---------------------------------------------------------------------------------------


def test_scores_become_typed_columns_matched_by_id():
    pytest.importorskip("datasets")
    data = to_dataset(make_pool()).select([5, 2])
    quality = np.full(N, np.nan, dtype=np.float32)
    quality[5] = 0.25
    scores = Scores({"prompt_id": IDS, "saerl_cluster": np.arange(N), "saerl_quality": quality})
    for _ in range(2):  # a second time replaces the columns
        data = add_scores(data, scores)
    assert data["saerl_cluster"][:] == [5, 2] and data["saerl_quality"][:] == [0.25, None]
    assert data.features["saerl_cluster"].dtype == "int32"
    assert data.features["saerl_quality"].dtype == "float32"
    assert data["prompt"][:] == ["5 + 5", "2 + 2"]
    with pytest.raises(SaerlError, match="no column 'key'; it has prompt_id"):
        add_scores(data, scores, "key")
    with pytest.raises(SaerlError, match="1 dataset rows have no scores, first 'p5'"):
        add_scores(data, Scores({"prompt_id": IDS[:5]}))


# --- TRL: the sampler ------------------------------------------------------------------------------


def drive(sampler: PlanRepeatSampler, batches: int) -> list[str]:
    """Take ``batches`` plan batches and observe each, as a trainer would."""
    seen, rows = [], iter(sampler)
    for _ in range(batches):
        drawn = [next(rows) for _ in range(sampler.plan.batch_size * sampler.group_size * sampler.repeats)]
        ids = [IDS[i] for i in drawn[: sampler.plan.batch_size * sampler.group_size : sampler.group_size]]
        sampler.observe(ids, [int(name[1:]) / N for name in ids])
        seen += ids
    return seen


def test_rows_are_repeated_as_trl_expects():
    plan = make_plan("global", total_steps=3)
    expected = [IDS.index(name) for _ in range(3) for name in plan.next_batch()]
    sampler = PlanRepeatSampler(make_plan("global", total_steps=3), IDS, group_size=2, repeats=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 3 * 4 * 2 * 3
    for step in range(3):
        batch = [i for i in expected[4 * step : 4 * step + 4] for _ in range(2)]
        assert rows[24 * step : 24 * step + 24] == batch * 3
    assert list(sampler) == rows  # a trainer that resumes walks through the same rows again
    sampler.set_epoch(1)
    assert list(sampler) != rows


@pytest.mark.parametrize("schedule", ["vanilla", "adaptive"])
def test_a_replayed_plan_goes_on_as_if_never_stopped(schedule):
    whole = PlanRepeatSampler(make_plan(schedule), IDS, 2, 1)
    expected = drive(whole, 6)
    stopped = PlanRepeatSampler(make_plan(schedule), IDS, 2, 1)
    assert drive(stopped, 3) == expected[:12]
    saved = json.loads(json.dumps(stopped.events))
    resumed = PlanRepeatSampler(make_plan(schedule), IDS, 2, 1)
    resumed.replay(saved)
    rows = list(resumed)[: 3 * 8]
    assert [IDS[i] for i in rows[::2]] == expected[:12]
    again = PlanRepeatSampler(make_plan(schedule), IDS, 2, 1)
    again.replay(saved)
    tail = iter(again)
    for _ in range(3 * 8):
        next(tail)
    found = []
    for _ in range(3):
        batch = [IDS[next(tail)] for _ in range(8)][::2]
        again.observe(batch, [int(name[1:]) / N for name in batch])
        found += batch
    assert found == expected[12:]


def test_another_plan_and_a_started_plan_are_refused():
    first = PlanRepeatSampler(make_plan("vanilla"), IDS, 2, 1)
    drive(first, 1)
    with pytest.raises(SaerlError, match="another plan"):
        PlanRepeatSampler(make_plan("vanilla", seed=5), IDS, 2, 1).replay(first.events)
    with pytest.raises(SaerlError, match="under way"):
        first.replay([])
    with pytest.raises(SaerlError, match="23 of the plan's prompts are not in the dataset, first 'p1'"):
        PlanRepeatSampler(make_plan("vanilla"), IDS[:1], 2, 1)


# --- TRL: the real trainer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("trl")
    return make_tiny()


def make_tiny():
    """Makes a random two-layer Llama over characters; and its tokenizer."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *"0123456789+ "]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), **sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    return make, tokenizer


class Spy:
    """A reward that records the prompt ids it was called with and gives more to later rows."""

    __name__ = "spy"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, prompts, completions, prompt_id, **columns):
        self.batches.append(prompt_id)
        return [int(name[1:]) / N for name in prompt_id]


def trl_run(tiny, folder, plan, *, max_steps, resume=None, data=None, **settings):
    from trl import GRPOConfig

    make, tokenizer = tiny
    spy = Spy()
    args = GRPOConfig(
        output_dir=str(folder),
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2}
        | settings,
        max_completion_length=4,
        max_steps=max_steps,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = plan_trainer(
        plan,
        model=make(),
        args=args,
        train_dataset=data or to_dataset(make_pool()),
        reward_funcs=spy,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return [batch[::2] for batch in spy.batches], trainer


def test_trl_trains_in_plan_order(tiny, tmp_path):
    seen, _ = trl_run(tiny, tmp_path, make_plan("global"), max_steps=3)
    fresh = make_plan("global")
    assert seen == [fresh.next_batch() for _ in range(3)]


def test_trl_feeds_an_adaptive_plan_and_resumes_exactly(tiny, tmp_path):
    seen, _ = trl_run(tiny, tmp_path / "whole", make_plan("adaptive"), max_steps=6)
    assert len(seen) == 6 and all(len(set(batch)) == 4 for batch in seen)
    blind = make_plan("adaptive")
    assert seen != [blind.next_batch() for _ in range(6)]  # what it observed changed the order
    events = json.loads((tmp_path / "whole" / "checkpoint-6" / "saerl_plan.json").read_text())
    observed = [event for event in events if len(event) == 2]
    # drawn and observed in turn, one batch ahead: the data loader has fetched the next one
    assert [len(event) for event in events[:7]] == [1, 1, 2, 1, 2, 1, 2]
    assert [ids for ids, _ in observed] == seen
    assert np.allclose(observed[0][1], [int(name[1:]) / N for name in seen[0]])

    first, _ = trl_run(tiny, tmp_path / "cut", make_plan("adaptive"), max_steps=2)
    rest, _ = trl_run(tiny, tmp_path / "cut", make_plan("adaptive"), max_steps=6, resume=True)
    assert first + rest == seen


def test_trl_takes_conversations_and_tells_each_group_once(tiny, tmp_path):
    """Also where a batch is trained on twice, in two parts: the rewards are those of one generation."""
    make, tokenizer = tiny
    chats = [[{"role": "user", "content": text}] for text in make_pool().column("prompt")]
    data = to_dataset(make_pool()).remove_columns("prompt").add_column("prompt", chats)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        twice = {"num_iterations": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
        plan = make_plan("adaptive")
        seen, _ = trl_run((make, tokenizer), tmp_path, plan, max_steps=8, data=data, **twice)
    finally:
        tokenizer.chat_template = None
    events = json.loads((tmp_path / "checkpoint-8" / "saerl_plan.json").read_text())
    observed = [event for event in events if len(event) == 2]
    assert [ids for ids, _ in observed] == seen and len(seen) == 2  # a generation for four optimizer steps
    assert plan.step == 3 and len({*seen[0], *seen[1]}) == 8


TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
from tests.test_integrations import make_plan, make_tiny, trl_run

out, tiny, seen = Path(sys.argv[1]), make_tiny(), []
sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
for name, steps, resume in [("whole", 4, None), ("cut", 2, None), ("cut", 4, True)]:
    plan = make_plan("adaptive")
    seen.append(trl_run(tiny, out / name, plan, max_steps=steps, resume=resume, **sizes)[0])
(out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_trl_on_two_processes(tiny, tmp_path):
    """Both see the halves of the planned batches and tell both copies of the plan all pass rates."""
    root = Path(__file__).parents[1]
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    paths = os.pathsep.join([str(root), str(root / "kernels" / "torch-ext")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (whole, *parts), (other, *others) = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    events = json.loads((tmp_path / "whole" / "checkpoint-4" / "saerl_plan.json").read_text())
    batches = [event[0] for event in events if len(event) == 1][:4]
    assert [a + b for a, b in zip(whole, other, strict=True)] == batches
    observed = [event for event in events if len(event) == 2]
    assert [ids for ids, _ in observed] == batches
    assert np.allclose(observed[3][1], [int(name[1:]) / N for name in batches[3]])
    blind = make_plan("adaptive")
    assert batches != [blind.next_batch() for _ in range(4)]
    assert parts[0] + parts[1] == whole and others[0] + others[1] == other  # stopped after two steps


def test_trl_sizes_must_agree_with_the_plan(tiny, tmp_path):
    with pytest.raises(SaerlError, match="4 prompts at once .* batches of 3; set generation_batch_size=6"):
        trl_run(tiny, tmp_path, make_plan("vanilla", batch_size=3), max_steps=1)


def test_trl_is_told_what_is_no_plan_no_dataset_and_no_trainer():
    pytest.importorskip("trl")
    data = to_dataset(make_pool())
    for plan, more, match in [
        ("plan.json", {"train_dataset": data}, "takes a plan, not a str; load_plan reads plan.json"),
        (make_plan("vanilla"), {}, "train_dataset is a NoneType, and a plan needs rows in any order"),
        (make_plan("vanilla"), {"train_dataset": data.to_iterable_dataset()}, "is a IterableDataset, and"),
        (make_plan("vanilla"), {"train_dataset": data.remove_columns("prompt_id")}, "no column prompt_id"),
        (make_plan("vanilla"), {"train_dataset": data, "base": dict}, "base=.*dict.* is neither TRL's GRPO"),
        (make_plan("vanilla"), {"train_dataset": data, "base": "grpo"}, "base=grpo is neither TRL's GRPO"),
    ]:
        with pytest.raises(SaerlError, match=match):
            plan_trainer(plan, **more)


@pytest.mark.parametrize(
    "pass_rate, says",
    [
        (lambda rewards: rewards, r"must give 2 numbers from 0 to 1 for rewards of shape \[2, 3\]"),
        (lambda rewards: rewards.mean(), "one a prompt; it gave 1.0"),
        (lambda rewards: rewards.sum(1), r"it gave \[3.0, 3.0\]"),
        (lambda rewards: [float("nan"), 0.5], r"it gave \[nan, 0.5\]"),
        (lambda rewards: None, "pass_rate must give 2 numbers"),
        (lambda rewards: ["a", "b"], "pass_rate raised ValueError: could not convert"),
        (lambda rewards: 1 / 0, "pass_rate raised ZeroDivisionError"),
    ],
)
def test_a_pass_rate_of_ones_own_is_checked(pass_rate, says):
    with pytest.raises(SaerlError, match=says):
        rates_of(np.ones((2, 3)), pass_rate)
    assert rates_of(np.ones((2, 3)), lambda rewards: torch.tensor([0.5, 1.0])).tolist() == [0.5, 1.0]


def test_ids_may_be_numbers_in_the_dataset_and_must_not_repeat():
    columns = {"prompt_id": [str(i) for i in range(4)], "prompt": list("abcd")}
    plan = build_plan(Scores(columns), PlanConfig(schedule="vanilla"), batch_size=2, total_steps=2, seed=0)
    assert sorted(PlanRepeatSampler(plan, [3, 2, 1, 0], 1, 1)) == [0, 1, 2, 3]
    with pytest.raises(SaerlError, match="prompt id '1' is that of two dataset rows"):
        PlanRepeatSampler(plan, ["0", "1", "2", "3", "1"], 1, 1)


def test_without_trl_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SaerlError, match="pip install trl"):
        plan_trainer(make_plan("vanilla"))
