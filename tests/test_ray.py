"""Scoring on Ray: the same files and figures as `saerl score`, shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.integrations.ray import score_with_ray
from saerl_fast.signals.scores import Scores
from saerl_fast.stages.console import Echo
from saerl_fast.stages.pipeline import score_stage

ROOT = Path(__file__).resolve().parents[1]


def demo(folder: Path, *overrides: str):
    """The demo's configuration at a size for tests: 40 prompts in shards of 16."""
    common = [
        f"run_dir={folder}",
        f"model.path={ROOT / 'examples/demo/model'}",
        f"data.train={ROOT / 'examples/demo/pool.jsonl'}",
        f"data.eval={ROOT / 'examples/demo/eval.jsonl'}",
        "data.limit=40",
        "sae.steps=5",
        "sae.d_sae=256",
        "difficulty.n_labels=0",
        "diversity.n_clusters=3",
        "diversity.svd=8",
        "score.shard=16",
    ]
    return load_config(ROOT / "examples/demo.yaml", [*common, *overrides])


def test_without_ray_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(SaerlError, match="pip install 'ray"):
        score_with_ray(demo(tmp_path))


def test_ray_scores_like_the_command(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    expected = score_stage(demo(tmp_path / "alone"), Echo(quiet=True))
    config = demo(tmp_path / "ray", f"sae.path={tmp_path / 'alone' / 'sae'}")
    # the actors made all features: from here on this process may not
    monkeypatch.setattr("saerl_fast.sae.pooled.bank_pass", None)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        score_with_ray(config, actors=1, num_cpus=0.5)
    finally:
        ray.shutdown()
    found = Scores.load(tmp_path / "ray")
    assert found.prompt_ids == expected.prompt_ids and len(found) == 40
    for name in ("indptr", "indices", "values"):
        assert getattr(found.features, name).equal(getattr(expected.features, name)), name
    hidden = [(tmp_path / run / "bank.hidden.npy").read_bytes() for run in ("alone", "ray")]
    assert hidden[0] == hidden[1]
    for name in ("saerl_cluster", "saerl_quality", "saerl_difficulty"):
        np.testing.assert_array_equal(found.columns[name], expected.columns[name])
    assert not list((tmp_path / "ray").glob("features.partial-*"))
