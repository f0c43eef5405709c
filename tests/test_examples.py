import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import load_config
from saerl_fast.prompts.pool import load_split
from saerl_fast.rl.rewards import get_reward, score_rewards
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(path).data.train


def test_own_loop(tmp_path):
    rng = np.random.default_rng(0)
    dense = torch.tensor(rng.random((40, 16)) * (rng.random((40, 16)) < 0.4), dtype=torch.float32)
    columns = {"prompt_id": [f"p{i}" for i in range(40)], "prompt": [f"question {i}" for i in range(40)]}
    Scores(columns, {}, CSR.from_dense(dense)).save(tmp_path)
    seen = load_example("own_loop").main(str(tmp_path), steps=3, batch_size=8)
    assert [len(batch) for batch in seen] == [8, 8, 8]
    assert all(len(set(batch)) == 8 for batch in seen)


def test_own_reward(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    reward = get_reward("examples.own_reward:close_enough")
    scores = score_rewards(reward, ["a", "b", "c"], [" 12", "34", "x"], {"answer": ["12", "12", "12"]})
    np.testing.assert_allclose(scores, [1.0, 0.2, 0.0])


@pytest.fixture
def demo_run(tmp_path, monkeypatch):
    """A run folder with made-up scores of the demo's pool, and the root as working directory."""
    monkeypatch.chdir(EXAMPLES.parent)
    config = load_config("examples/demo.yaml")
    pool, _ = load_split(config.data, config.seed)
    rng, count = np.random.default_rng(0), len(pool)
    dense = torch.tensor(rng.random((count, 24)) * (rng.random((count, 24)) < 0.4), dtype=torch.float32)
    added = {
        "saerl_difficulty": rng.random(count).astype(np.float32),
        "saerl_quality": rng.random(count).astype(np.float32),
        "saerl_cluster": rng.integers(0, 3, count).astype(np.int32),
    }
    Scores(pool.columns | added, {}, CSR.from_dense(dense)).save(tmp_path)
    return tmp_path


def test_trl_grpo(demo_run):
    pytest.importorskip("trl")
    example = load_example("trl_grpo")
    rewards = example.main(str(demo_run), steps=2, prompts=4, group=4, out=str(demo_run / "trl"))
    assert len(rewards) == 2 and all(0 <= reward <= 1 for reward in rewards)


def test_verl_grpo(demo_run):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = demo_run / "verl.parquet"
    command = load_example("verl_grpo").main(str(demo_run), str(out), "some/model", steps=3, batch_size=8)
    rows = parquet.read_table(out).to_pylist()
    assert [row["extra_info"]["step"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert f"data.train_files={out}" in command and "data.train_batch_size=8" in command


def test_datasets_columns(demo_run):
    pytest.importorskip("datasets")
    rows = load_example("datasets_columns").main(str(demo_run))
    assert 0 < len(rows) < len(Scores.load(demo_run)) and min(rows["saerl_quality"]) >= 0.5
    assert list(rows["saerl_difficulty"]) == sorted(rows["saerl_difficulty"])
    assert (demo_run / "easy_to_hard.parquet").is_file()


def test_ray_scoring(tmp_path, monkeypatch):
    """What Ray does with it is tested in test_ray.py; here, that the example passes everything on."""
    monkeypatch.chdir(EXAMPLES.parent)
    told = {}
    example = load_example("ray_scoring")
    monkeypatch.setattr(example, "score_with_ray", lambda config, **more: told.update(config=config, **more))
    example.main("examples/demo.yaml", [f"run_dir={tmp_path}", "score.shard=256"], actors=3, gpus=0.5)
    assert (told["config"].score.shard, told["config"].run_dir) == (256, str(tmp_path))
    assert (told["actors"], told["num_gpus"]) == (3, 0.5)
