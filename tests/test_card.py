"""The model card says what the SAE is, and nothing of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saerl_fast.cli import main
from saerl_fast.sae.card import short_name
from saerl_fast.sae.files import load_sae

WORDS = [
    "sae",
    "train",
    "--config",
    "examples/demo.yaml",
    "data.limit=60",
    "data.eval_limit=8",
    "sae.steps=30",
]
WORDS += ["sae.d_sae=64", "sae.k=4", "sae.max_tokens=800", "sae.batch_size=128"]


def test_names_are_told_without_folders(tmp_path: Path) -> None:
    assert short_name("Qwen/Qwen2.5-Math-1.5B") == "Qwen/Qwen2.5-Math-1.5B"
    assert short_name(str(tmp_path)) == tmp_path.name and short_name(f"{tmp_path}/gone/x.jsonl") == "x.jsonl"
    assert short_name("/home/me/rows.py:rows@a") == "rows.py:rows@a"
    assert (
        short_name("reasoning-gym:gcd@2,lcm") == "reasoning-gym:gcd@2,lcm" and short_name("gsm8k") == "gsm8k"
    )


def test_card_of_a_training_and_of_one_that_goes_on_from_it(tmp_path: Path, capsys) -> None:
    root = Path.cwd()
    model, pool = root / "examples/demo/model", root / "examples/demo/pool.jsonl"
    words = [*WORDS, f"model.path={model}", f"data.train={pool}"]
    assert main([*words, f"run_dir={tmp_path / 'one'}"]) == 0
    said = capsys.readouterr().out
    card = (tmp_path / "one" / "sae" / "README.md").read_text()
    for part in ("hook | blocks.2.hook_resid_post", "pool.jsonl (prompts)", "128 -> 64 features, topk, k=4"):
        assert part in card
    assert "loss recovered" in card and "`sae.lr` | 0.003" in card and "never fire" in card
    assert "% of the loss recovered" in said and "which reports count" in said
    (tmp_path / "one" / "sae" / "README.md").write_text("mine")  # anyone may write on it
    words += ["--from", str(tmp_path / "one" / "sae"), "sae.seed=5"]
    assert main([*words, f"run_dir={tmp_path / 'two'}"]) == 0
    said = capsys.readouterr().out
    card = (tmp_path / "two" / "sae" / "README.md").read_text()
    assert "mean cosine" in said and "mean cosine with the decoder rows of that SAE" in card
    assert "`sae.init` | sae" in card
    for text in (card, (tmp_path / "two" / "sae" / "cfg.json").read_text().replace(str(model), "")):
        assert str(root) not in text and str(tmp_path) not in text
    one, two = (load_sae(tmp_path / name / "sae") for name in ("one", "two"))
    assert not torch.equal(one.W_dec, two.W_dec)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--from", "{sae}", "sae.d_sae=32"], "sae.init has 64 features; set sae.d_sae=64"),
        (["--from", "{sae}", "sae.path=x"], "sae.init="),
        (["--from", "{sae}", "sae.normalize=layer_norm"], "set sae.normalize=variance"),
        (["--from", "nowhere/at/all"], "nowhere"),
        (["--from", "{run}/sae"], "is the folder to be written; choose another run_dir"),
        (["--from", "{wide}"], "width 16"),
        (["--from", "{other}"], "explains nothing of these activations"),
        (["sae.k=65"], "sae.k=65 must be at most sae.d_sae=64"),
        (["sae.d_sae=0"], "sae.d_sae"),
        (["sae.layer=9"], "sae.layer=9 does not exist in a model of 4 blocks"),
        (["sae.lr=50"], "SAE training diverged"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys, settings: list[str], sentence: str, monkeypatch
) -> None:
    from saerl_fast.sae.files import save_sae
    from tests.test_measure import lossless

    run = tmp_path / "run"
    for name, width in (("wide", 16), ("other", 128)):
        sae = lossless(width)
        save_sae(sae, tmp_path / name)
    other = lossless(128)
    with torch.no_grad():
        other.W_dec.mul_(-1)
    keep = torch.cat([torch.arange(32), torch.arange(128, 160)])
    sae = type(other)(
        other.W_enc[:, keep],
        other.b_enc[keep],
        other.W_dec[keep],
        other.b_dec,
        cfg=other.cfg.__class__("topk", 4),
    )
    save_sae(sae, tmp_path / "other")
    ours = type(sae)(*(w.detach() for w in (sae.W_enc, sae.b_enc, -sae.W_dec, sae.b_dec)), cfg=sae.cfg)
    save_sae(ours, tmp_path / "sae")
    (run / "sae").mkdir(parents=True)
    (run / "sae").rmdir()
    places = {name: str(tmp_path / name) for name in ("sae", "wide", "other", "run")}
    if "{run}/sae" in settings:
        save_sae(ours, run / "sae")
    words = [*WORDS, *(text.format(**places) for text in settings), f"run_dir={run}"]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saerl: ")]
    assert sentence in line
    assert "{run}/sae" in settings or not [path for path in run.iterdir() if not path.name.startswith(".")]
