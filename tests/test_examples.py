import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import load_config
from saerl_fast.data.score import Scores
from saerl_fast.rl.rewards import get_reward, score_rewards
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
