"""Scoring on Ray: the same files and figures as `saerl score`, shard by shard."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.integrations.ray import _Actor, score_with_ray
from saerl_fast.signals.scores import Scores
from saerl_fast.stages.console import Echo
from saerl_fast.stages.pipeline import score_stage

ROOT = Path(__file__).resolve().parents[1]


def demo(folder: Path, *overrides: str):
    """The demo's configuration at a size for tests: 40 prompts in shards of 8."""
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
        "score.shard=8",
    ]
    return load_config(ROOT / "examples/demo.yaml", [*common, *overrides])


def test_without_ray_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(SaerlError, match="pip install 'ray"):
        score_with_ray(demo(tmp_path))


class Dying(_Actor):
    """Leaves its process number beside the config, and dies without a word in the first call of all."""

    def __init__(self, config, folder):
        self.place = Path(config.run_dir).parent
        super().__init__(config, folder)

    def __call__(self, batch):
        with suppress(FileExistsError):
            (self.place / "died").open("x").close()
            os._exit(1)
        (self.place / f"made-{os.getpid()}-{batch['start'][0]}").touch()
        return super().__call__(batch)


def test_ray_scores_like_the_command(monkeypatch, tmp_path):
    """Two actors, of which one is lost on the way and restarted: the bytes of one process."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr("saerl_fast.integrations.ray._Actor", Dying)
    expected = score_stage(demo(tmp_path / "alone"), Echo(quiet=True))
    config = demo(tmp_path / "ray", f"sae.path={tmp_path / 'alone' / 'sae'}")
    # the actors made all features: from here on this process may not
    monkeypatch.setattr("saerl_fast.sae.pooled.bank_pass", None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        score_with_ray(config, actors=2, num_cpus=0.5)
        table = ray.data.read_parquet(str(tmp_path / "ray" / "scores.parquet"))
        assert [row["prompt_id"] for row in table.iter_rows()] == list(expected.prompt_ids)
    finally:
        ray.shutdown()
    made = [path.name.split("-")[1:] for path in tmp_path.glob("made-*")]
    assert {start for _, start in made} == {"0", "8", "16", "24", "32"} and len({pid for pid, _ in made}) >= 2
    assert (tmp_path / "died").exists()
    found = Scores.load(tmp_path / "ray")
    assert found.prompt_ids == expected.prompt_ids and len(found) == 40
    for name in ("indptr", "indices", "values"):
        assert getattr(found.features, name).equal(getattr(expected.features, name)), name
    hidden = [(tmp_path / run / "bank.hidden.npy").read_bytes() for run in ("alone", "ray")]
    assert hidden[0] == hidden[1]
    files = ("scores.parquet", "features.safetensors")
    assert all(len({(tmp_path / run / name).read_bytes() for run in ("alone", "ray")}) == 1 for name in files)
    for name in ("saerl_cluster", "saerl_quality", "saerl_difficulty"):
        np.testing.assert_array_equal(found.columns[name], expected.columns[name])
    assert not list((tmp_path / "ray").glob("features.partial-*"))
