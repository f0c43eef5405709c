"""The whole job on a real language model, in miniature: SmolLM2-135M-Instruct from its GGUF."""

import json
from pathlib import Path

import pytest

from saerl_fast import cli

ROOT = Path(__file__).parents[1]
SMALL = """
    threads=2 data.size=16 data.eval_size=2 sae.layer=10 sae.d_sae=640 sae.k=8 sae.steps=10 sae.batch_size=128
    sae.max_tokens=500 difficulty.n_labels=4 difficulty.rollouts=2 diversity.n_clusters=2
    plan.adaptive.svd=4
    train.warmup.steps=1 train.warmup.batch_size=2 train.rollout.prompts_per_step=2
    train.rollout.group_size=2 train.rollout.max_new_tokens=4 train.eval.samples=1 train.save_every=0
    train.steps=1
""".split()  # noqa: SIM905 - read as it would be typed


@pytest.mark.slow
def test_the_whole_job_from_a_gguf(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    command = [
        "train",
        "--config",
        "examples/smollm2.yaml",
        "--model",
        str(smollm2),
        *SMALL,
        f"run_dir={run}",
    ]
    assert cli.main(command) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "adaptive" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["warmup", "eval", "train", "eval"]
    assert (run / "scores.parquet").is_file() and (run / "adaptive" / "report.md").is_file()
    sae = json.loads((run / "sae" / "cfg.json").read_text())
    assert (sae["d_in"], sae["d_sae"]) == (576, 640)
    saved = json.loads((run / "adaptive" / "model" / "config.json").read_text())
    assert saved["hidden_size"] == 576 and "quantization_config" not in saved
