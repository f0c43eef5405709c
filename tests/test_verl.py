"""Plans in verl: files in its schema; its own loader, batches, hook and reward code (`make test-verl`)."""

from __future__ import annotations

import json

import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.verl import compute_score, write_parquet
from saerl_fast.plan import save_plan
from saerl_fast.prompts.pool import Pool
from tests.test_integrations import N, make_plan, make_pool


def test_verl_rows_follow_the_plan_and_score_themselves(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "system", "content": "brief"}, {"role": "user", "content": "x"}]
    columns = make_pool().columns | {"task": ["sum"] * N, "level": list(range(N))}
    columns["prompt"] = [chat, *columns["prompt"][1:]]
    path = write_parquet(make_plan("global"), Pool(columns), tmp_path / "train.parquet", reward="numeric")
    rows = parquet.read_table(path).to_pylist()
    fresh = make_plan("global")
    order = [name for _ in range(6) for name in fresh.next_batch()]
    assert [row["extra_info"]["prompt_id"] for row in rows] == order
    assert [row["extra_info"]["step"] for row in rows] == [i // 4 for i in range(24)]
    one = rows[order.index("p3")]
    assert one["prompt"] == [{"role": "user", "content": "3 + 3"}] and one["ability"] == "sum"
    assert one["reward_model"] == {"style": "rule", "ground_truth": "7"}
    assert json.loads(one["extra_info"]["columns"]) == {"task": "sum", "level": 3}
    assert rows[order.index("p0")]["prompt"] == chat

    def score(text: str) -> float:
        return compute_score(one["data_source"], text, "7", one["extra_info"], num_turns=None)

    assert [score("it is 7"), score("8")] == [1.0, 0.0]


def test_verl_refuses_what_it_cannot_do(tmp_path):
    target = tmp_path / "train.parquet"
    with pytest.raises(SaerlError, match="'adaptive' chooses by pass rates"):
        write_parquet(make_plan("adaptive"), make_pool(), target)
    with pytest.raises(SaerlError, match="23 of the plan's prompts are not in the dataset, first 'p1'"):
        write_parquet(make_plan("vanilla"), make_pool().select([0]), target)
    with pytest.raises(SaerlError, match="train.reward='exactly' is unknown"):
        write_parquet(make_plan("vanilla"), make_pool(), target, reward="exactly")
    for source, extra in [("gsm8k", {}), ("saerl/exact", {}), ("saerl/exact", None), (None, None)]:
        with pytest.raises(SaerlError, match=f"{source!r} was not written by write_parquet"):
            compute_score(source, "1", "1", extra)
    assert not target.exists()


@pytest.fixture
def verl_data(tmp_path):
    """(settings of verl's data section, a loader as verl's trainer makes it, its reward function)."""
    pytest.importorskip("verl")
    from omegaconf import OmegaConf
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    data = {"train_files": [], "train_batch_size": 4, "shuffle": False, "filter_overlong_prompts": False}
    data |= {"cache_dir": str(tmp_path / "cache"), "prompt_key": "prompt"}

    def load(files=None, **settings):
        config = OmegaConf.create(data | settings)
        dataset = create_rl_dataset(files or config.train_files, config, None, None)
        return StatefulDataLoader(
            dataset,
            batch_size=config.train_batch_size,
            sampler=create_rl_sampler(config, dataset),
            collate_fn=collate_fn,
            drop_last=True,
        )

    path = {"path": "pkg://saerl_fast.integrations.verl", "name": "compute_score"}
    reward = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": path}}))
    return load, reward


def ids_of(batches):
    return [[info["prompt_id"] for info in batch["extra_info"]] for batch in batches]


def test_verl_loads_the_parquet_in_plan_order(verl_data, tmp_path):
    load, reward = verl_data
    path = str(write_parquet(make_plan("global"), make_pool(), tmp_path / "train.parquet", reward="numeric"))
    batches = list(load(train_files=[path]))
    fresh = make_plan("global")
    assert ids_of(batches) == [fresh.next_batch() for _ in range(6)]
    row = {name: batches[0][name][0] for name in ("data_source", "reward_model", "extra_info")}
    told = {"data_source": row["data_source"], "ground_truth": row["reward_model"]["ground_truth"]}
    assert [reward(solution_str=text, extra_info=row["extra_info"], **told) for text in ("7", "8")] == [1, 0]


def test_verl_dataset_puts_a_parquet_of_its_own_in_plan_order(verl_data, tmp_path):
    import pickle

    load, _ = verl_data
    plan = make_plan("literal")
    save_plan(plan, tmp_path / "plan.json")
    path = str(write_parquet(make_plan("vanilla"), make_pool(), tmp_path / "train.parquet"))
    ours = {"path": "pkg://saerl_fast.integrations.verl_dataset", "name": "PlanDataset"}
    settings = {"train_files": [path], "custom_cls": ours, "saerl_plan": str(tmp_path / "plan.json")}
    expected = [plan.next_batch() for _ in range(6)]
    loader = load(**settings)
    rows = iter(loader)
    first = ids_of([next(rows), next(rows)])
    state = loader.state_dict()
    again = load(**settings)
    again.load_state_dict(state)
    assert first + ids_of(again) == expected
    copied = pickle.loads(pickle.dumps(loader.dataset))
    copied.resume_dataset_state()  # what verl does with a dataset out of a checkpoint
    assert [copied[i]["extra_info"]["prompt_id"] for i in range(4)] == expected[0]

    other = str(write_parquet(make_plan("vanilla", seed=3), make_pool(), tmp_path / "validation.parquet"))
    assert ids_of(load([other], **settings)) == ids_of(load([other], train_files=[path]))
    for change, match in [
        ({"shuffle": True}, "set data.shuffle=False"),
        ({"train_batch_size": 3}, "set data.train_batch_size=4"),
        ({"saerl_plan": None}, "needs a plan"),
    ]:
        with pytest.raises(SaerlError, match=match):
            load(**settings | change)


def test_verl_dataset_follows_an_adaptive_plan_by_its_hook(verl_data, tmp_path):
    """As verl's trainer does it: a batch, rollouts (rows repeated), scores, then the hook."""
    load, _ = verl_data
    from verl import DataProto

    save_plan(make_plan("adaptive"), tmp_path / "plan.json")
    path = str(write_parquet(make_plan("vanilla"), make_pool(), tmp_path / "train.parquet"))
    ours = {"path": "pkg://saerl_fast.integrations.verl_dataset", "name": "PlanDataset"}
    settings = {"train_files": [path], "custom_cls": ours, "saerl_plan": str(tmp_path / "plan.json")}
    with pytest.raises(SaerlError, match="set data.dataloader_num_workers=0"):
        load(**settings)

    def train(loader, steps, save_at=None):
        seen, state = [], None
        for step, rows in enumerate(loader):
            batch = DataProto.from_single_dict(rows).repeat(2, interleave=True)
            ids = [info["prompt_id"] for info in batch.non_tensor_batch["extra_info"]]
            scores = torch.zeros(len(ids), 3)
            scores[:, -1] = torch.tensor([int(name[1:]) / N for name in ids])
            batch.batch["token_level_scores"] = scores
            seen.append(ids[::2])
            if step + 1 == save_at:
                loader.dataset.on_batch_end(batch=batch)
                return seen, loader.state_dict()
            if step + 1 == steps:
                return seen, state
            loader.dataset.on_batch_end(batch=batch)
        return seen, state

    settings["dataloader_num_workers"] = 0
    seen, _ = train(load(**settings), 6)
    plan, expected = make_plan("adaptive"), []
    for _ in range(6):
        expected.append(plan.next_batch())
        plan.observe(expected[-1], [int(name[1:]) / N for name in expected[-1]])
    assert seen == expected and len(load(**settings)) == 6
    first, state = train(load(**settings), 6, save_at=2)
    again = load(**settings)
    again.load_state_dict(state)
    assert first + train(again, 4)[0] == expected
