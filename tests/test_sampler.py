"""The plan as torch samplers: dataset rows in plan order, lazily, resumable in the middle of a batch."""

import pytest
from torch.utils.data import DataLoader

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import build_plan
from saerl_fast.plan.sampler import PlanBatchSampler, PlanSampler
from saerl_fast.signals.scores import Scores

IDS = [f"p{i}" for i in range(20)]
DATASET = [f"p{i}" for i in reversed(range(25))]  # another order, and rows the plan does not know


def make_plan():
    scores = Scores({"prompt_id": IDS})
    return build_plan(scores, PlanConfig("vanilla"), batch_size=4, total_steps=8, seed=1)


def test_batches_are_the_plans_as_dataset_rows():
    reference = make_plan()
    loader = DataLoader(DATASET, batch_sampler=PlanBatchSampler(make_plan(), DATASET))
    batches = list(loader)
    assert len(batches) == len(loader) == 8
    assert batches == [reference.next_batch() for _ in range(8)]


def test_single_rows_in_plan_order():
    reference = make_plan()
    sampler = PlanSampler(make_plan(), DATASET)
    loader = DataLoader(DATASET, sampler=sampler, batch_size=4)
    assert list(loader) == [reference.next_batch() for _ in range(8)]
    assert len(sampler) == 32


def test_batches_are_drawn_only_when_needed():
    plan = make_plan()
    iterator = iter(PlanSampler(plan, DATASET))
    for rows, steps in ((1, 1), (3, 1), (1, 2)):
        for _ in range(rows):
            next(iterator)
        assert plan.step == steps


@pytest.mark.parametrize("cut", [1, 4, 6, 31])
def test_resumes_in_the_middle_of_a_batch(cut):
    whole = list(PlanSampler(make_plan(), DATASET))
    sampler = PlanSampler(make_plan(), DATASET)
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(cut)]
    state = sampler.state_dict()
    other = PlanSampler(make_plan(), DATASET)
    other.load_state_dict(state)
    assert first + list(other) == whole


def test_ids_the_dataset_lacks_are_named():
    with pytest.raises(SaerlError, match="'p0'"):
        PlanSampler(make_plan(), IDS[1:])
