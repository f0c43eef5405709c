"""The plan behind prime-rl's TaskSampler and AdmissionGate, against their published interface."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.prime_rl import PlanTaskSampler, SignalGate
from tests.test_integrations import IDS, N, make_plan

TASKS = [SimpleNamespace(key=f"hash-{i}", data=SimpleNamespace(prompt_id=name)) for i, name in enumerate(IDS)]


def group(task: Any, rewards: list[float], **change: Any) -> list[Any]:
    """Finished episodes of verifiers with one trace each."""
    found = []
    for reward in rewards:
        trace = {
            "reward": reward,
            "has_error": False,
            "num_turns": 1,
            "agent": SimpleNamespace(trainable=True),
        }
        traces = [SimpleNamespace(**trace | change)]
        found.append(SimpleNamespace(task=SimpleNamespace(key=task.key), ok=True, traces=traces))
    return found


def told(sampler: PlanTaskSampler) -> list[Any]:
    return [event for event in sampler.state_dict()["events"] if len(event) == 2]


@pytest.mark.parametrize("schedule", ["global", "adaptive"])
def test_tasks_come_in_plan_order_and_a_resume_goes_on(schedule: str) -> None:
    sampler = PlanTaskSampler(make_plan(schedule), TASKS)
    tasks = [next(sampler) for _ in range(6)]
    first = make_plan(schedule).next_batch()
    assert [task.data.prompt_id for task in tasks[:4]] == first
    for i in (2, 0):
        sampler.observe(group(tasks[i], [1.0, 0.0, 0.0, 0.0]))
    state = json.loads(json.dumps(sampler.state_dict()))
    assert [event[0] for event in told(sampler)] == [[first[2]], [first[0]]]
    assert told(sampler)[0][1] == [0.25] and sampler.metrics()["away"] == 4
    resumed = PlanTaskSampler(make_plan(schedule), TASKS)
    resumed.load_state_dict(state)
    again = [next(resumed) for _ in range(4)]
    assert again == [tasks[i] for i in (1, 3, 4, 5)]
    for one in (sampler, resumed):
        for i in (1, 3):
            one.observe(group(tasks[i], [1.0, 1.0]))
    assert [next(sampler) for _ in range(8)] == [next(resumed) for _ in range(8)]
    assert sampler.metrics() == resumed.metrics() and resumed.metrics()["step"] == 4


def test_what_failed_or_is_not_trained_on_does_not_count() -> None:
    sampler = PlanTaskSampler(make_plan("adaptive"), TASKS)
    one, two = next(sampler), next(sampler)
    sampler.observe(group(one, [1.0], has_error=True) + group(one, [0.0]))
    sampler.observe(group(two, [1.0], agent=SimpleNamespace(trainable=False)))
    sampler.observe(group(two, [1.0]))  # nobody waits for it any more
    assert told(sampler) == [[[one.data.prompt_id], [0.0]]]


def test_groups_of_nothing_of_others_and_without_rewards_are_passed_over() -> None:
    sampler, gate = PlanTaskSampler(make_plan("adaptive"), TASKS), SignalGate()
    one, two = next(sampler), next(sampler)
    other = SimpleNamespace(key="another taskset's", data=None)
    for found in ([], group(other, [1.0, 0.0])):
        sampler.observe(found)
    assert sampler.metrics()["away"] == 2 and not told(sampler)
    sampler.observe(group(one, [None, float("nan")]))  # type: ignore[list-item]
    sampler.observe(group(two, [None, 1.0]))  # type: ignore[list-item]
    assert told(sampler) == [[[two.data.prompt_id], [1.0]]] and sampler.metrics()["away"] == 0
    assert not gate.admit(group(one, [float("nan"), None, 1.0]))  # type: ignore[list-item]


def test_only_informative_groups_are_admitted() -> None:
    gate, task = SignalGate(), TASKS[0]
    assert [gate.admit(group(task, r)) for r in ([1.0, 1.0], [0.0, 1.0], [0.0], [])] == [
        False,
        True,
        False,
        False,
    ]
    other = SignalGate()
    other.load_state_dict(gate.state_dict())
    assert other.metrics() == {"informative": 0.25}


def test_other_tasks_and_other_checkpoints_are_refused() -> None:
    with pytest.raises(SaerlError, match=f"{N - 1} of the plan's prompts are not in the dataset"):
        PlanTaskSampler(make_plan("vanilla"), TASKS[:1])
    with pytest.raises(SaerlError, match="holds no plan"):
        PlanTaskSampler(make_plan("vanilla"), TASKS).load_state_dict({"rng": 3})
