"""The embedded demo: its files load, are small, hold what they promise and leave RL something to do."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saerl_fast.config import apply_overrides, load_config
from saerl_fast.sae.files import load_sae
from saerl_fast.stages.arms import parse_pool

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo_pool() -> ModuleType:
    return _script("demo_pool")


@pytest.fixture(scope="module")
def make_demo(demo_pool: ModuleType) -> ModuleType:
    return _script("make_demo")


@pytest.fixture(scope="module")
def pool() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "pool.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "eval.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(DEMO / "model")


def test_files_are_what_the_script_writes(
    demo_pool: ModuleType, pool: list[dict], held_out: list[dict]
) -> None:
    assert demo_pool.make_pool(0) == pool
    assert demo_pool.make_eval(0) == held_out
    assert demo_pool.make_pool(1) != pool


def test_pool_rows(pool: list[dict], held_out: list[dict]) -> None:
    assert len({row["prompt_id"] for row in pool + held_out}) == len(pool) + len(held_out)
    assert len({row["prompt"] for row in pool}) == len(pool) >= 1500
    bad = sum(row["kind"] != "clean" for row in pool) / len(pool)
    assert 0.25 <= bad <= 0.30
    assert {row["kind"] for row in pool} == {"clean", "wrong_answer", "garbled", "off_task"}
    labels = [row for row in pool if row["quality_label"] is not None]
    assert len(labels) == 250
    assert all(row["quality_label"] == int(row["kind"] == "clean") for row in labels)
    assert all(0 < len(row["answer"]) <= 8 for row in pool + held_out)


def test_held_out_items_are_clean_balanced_and_disjoint(
    demo_pool: ModuleType, pool: list[dict], held_out: list[dict]
) -> None:
    assert not {row["prompt"] for row in pool} & {row["prompt"] for row in held_out}
    cells = Counter((row["task"], row["level"]) for row in held_out)
    assert len(cells) == len(demo_pool.TASKS) * len(demo_pool.LEVELS) and len(set(cells.values())) == 1
    assert {row["kind"] for row in held_out} == {"clean"}
    rng = random.Random(0)
    for task in demo_pool.TASKS:  # the same problem in other words is not in the pool either
        for level in demo_pool.LEVELS:
            assert demo_pool.draw(rng, task, level, held_out=True).held_out
            assert not demo_pool.draw(rng, task, level, held_out=False).held_out


def test_answers_are_right_or_wrong_as_said(demo_pool: ModuleType, pool: list[dict]) -> None:
    signs = {"addition": "+", "subtraction": "-", "multiplication": "*"}
    checked = Counter()
    for row in pool:
        text = row["prompt"].removesuffix(" = ?")
        if (
            row["task"] in signs
            and row["prompt"].endswith(" = ?")
            and row["kind"] in ("clean", "wrong_answer")
        ):
            a, b = (int(part) for part in text.split(signs[row["task"]]))
            value = {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[row["task"]]
            assert (str(value) == row["answer"]) == (row["kind"] == "clean")
            checked[row["kind"]] += 1
    assert checked["clean"] > 20 and checked["wrong_answer"] > 2
    rng = random.Random(0)
    for answer in ("0", "7", "10", "338", "ABBA", "12:05"):
        assert all(demo_pool.wrong_answer(rng, answer) != answer for _ in range(50))


def test_model_is_small(model_and_tokenizer) -> None:
    model, tokenizer = model_and_tokenizer
    assert sum(file.stat().st_size for file in (DEMO / "model").iterdir()) < 2_500_000
    assert 400_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_tokenizer(model_and_tokenizer, make_demo: ModuleType, pool: list[dict]) -> None:
    _, tokenizer = model_and_tokenizer
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for row in pool:
        text = make_demo.TEMPLATE.format(prompt=row["prompt"])
        ids, head = make_demo.encode(tokenizer, row["prompt"], row["answer"])
        assert tokenizer.decode(ids[1:-1]) == text + row["answer"]
        assert ids[:-1] == tokenizer(text + row["answer"])["input_ids"]  # answers tokenize on their own
        assert len(ids) - head <= 8 and len(ids) <= 100


def test_base_model_leaves_headroom(model_and_tokenizer, make_demo: ModuleType, held_out: list[dict]) -> None:
    rates = make_demo.pass_rates(*model_and_tokenizer, held_out)
    assert 0.22 <= rates.mean() <= 0.42
    cells: dict[tuple[str, int], list[float]] = {}
    for row, rate in zip(held_out, rates.tolist(), strict=True):
        cells.setdefault((row["task"], row["level"]), []).append(rate)
    means = [sum(values) / len(values) for values in cells.values()]
    assert min(means) < 0.05 and max(means) > 0.7


def test_config(monkeypatch: pytest.MonkeyPatch, make_demo: ModuleType) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config("examples/demo.yaml")
    assert Path(cfg.model.path, "config.json").is_file()
    assert Path(cfg.data.train).is_file() and Path(str(cfg.data.eval)).is_file()
    assert cfg.data.template == make_demo.TEMPLATE
    assert cfg.train.eval.mode == "prob" and cfg.compare.arms == ["vanilla", "adaptive"]
    for text in cfg.compare.pools:
        pool = apply_overrides(cfg, [*parse_pool(text)[1], "compare.pools="])
        assert Path(pool.data.train).is_file()
        sae = load_sae(str(pool.sae.path))
        assert (sae.d_sae, sae.k, sae.layer) == (cfg.sae.d_sae, cfg.sae.k, cfg.sae.layer)


def test_make_demo_runs_from_scratch(
    make_demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--out", str(tmp_path), "--steps", "3", "--batch", "4"])
    sys.argv += ["--sae-steps", "3"]
    make_demo.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    shipped = AutoTokenizer.from_pretrained(DEMO / "model")
    assert tokenizer.get_vocab() == shipped.get_vocab()
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size
    for name in ("pool.jsonl", "hard.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
    assert load_sae(tmp_path / "sae").d_in == model.config.hidden_size
