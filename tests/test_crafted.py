"""Crafted plans, SAEs, models, pools, templates, settings and paths: one sentence each.

Tables of inputs and of what reads them; a new input is a line. The judges are in ``tests/borders.py``.
"""

from __future__ import annotations

import hashlib
import json
import signal
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast.config import DataConfig, PlanConfig, SAEConfig, load_config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import write_text
from saerl_fast.plan import load_plan, save_plan
from saerl_fast.plan.adaptive import AdaptivePlan, Embedding
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts import render
from saerl_fast.prompts.pool import Pool
from saerl_fast.rl.generate import generate
from saerl_fast.sae.files import load_sae, save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.train import train_sae
from saerl_fast.signals.quality import fit_quality
from saerl_fast.signals.scores import Scores
from tests.borders import IDS, RAW, altered, refused, said
from tests.tiny_lm import char_tokenizer, prompts_of, session_of, tiny_model

# --- plans ---------------------------------------------------------------------------------------------

PLANS = {  # place in plan.json -> values that cannot be followed
    ("batches", 0): [None, "p0p1", ["p0"], ["p0", "nobody"], ["p0", None], ["p0", "p0"], [["p0"], "p1"], 3],
    ("batches",): [None, [], 3, "x", [["p0", "p1"]] * 3, {"0": ["p0"]}],
    ("seed",): ["3", None, -1, 1.5, True, 10**30, [0]],
    ("total_steps",): [None, 0, -1, 3, "2", 2.5, 10**400],
    ("batch_size",): [None, 0, 1, 3, "2"],
    ("schedule",): [None, 3, "", "../../x", "nobody", "/etc", "a\x1b[31m", ["vanilla"]],
    ("prompts",): ["p0", None, [], {}, ["p0"], [{}], [{"id": 3}], [{"id": None}], [{"id": "p0"}] * 6],
    ("prompts", 0, "id"): [None, 3, "p1", ["p0"], True],
    ("prompts", 0, "cluster"): ["x", None, -1, 2**31, 1.5, True, [1]],
    ("prompts", 0, "difficulty"): ["x", 1e39, 10**300, [], {}, True, "0.5"],
    ("prompts", 0, "pass_rate"): ["x", 1.5, -0.1, 1e30],
    ("dropped",): [3, None, [{"id": "q"}], [{"id": "q", "reason": 3}], [{"id": "p0", "reason": "x"}], ["q"]],
    ("config",): [None, 3, [], {"nobody": 1}, {"mix": "x"}, {"adaptive": 3}, {"schedule": 3}],
    ("notes",): [None, 3, "x", [3], {}],
    ("version",): [2, "1", None, [1]],
    ("format",): ["x", None, 3],
}


def signed(body: dict, path: Path) -> Path:
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return write_text(path, json.dumps(body))


@pytest.fixture
def plan_file(tmp_path) -> Path:
    table = {"cluster": np.zeros(6, np.int32)}
    table |= {name: np.linspace(0, 1, 6, dtype=np.float32) for name in ("difficulty", "pass_rate")}
    plan = StaticPlan("vanilla", IDS, PlanConfig(), batch_size=2, total_steps=2, seed=0, table=table)
    return save_plan(plan, tmp_path / "plan.json")


def test_crafted_plans_that_fit_their_hash(plan_file):
    body = json.loads(plan_file.read_text())
    assert load_plan(signed(body, plan_file)).next_batch()
    for at, values in PLANS.items():
        for value in values:
            signed(altered(body, at, value), plan_file)
            refused(lambda: load_plan(plan_file), "plan.json")
        if at not in (("prompts", 0, "difficulty"), ("prompts", 0, "pass_rate"), ("prompts", 0, "cluster")):
            place = at if isinstance(at[-1], str) else (*at, 0)
            signed(altered(body, place, ...), plan_file)
            refused(lambda: load_plan(plan_file), "plan.json")


TENSORS = {
    "rows": [torch.zeros(5, 3), torch.zeros(6), torch.full((6, 3), torch.nan), torch.zeros(6, 3).double()],
    "mean": [torch.zeros(2), torch.zeros(3, 1), torch.full((3,), torch.inf)],
    "scale": [
        torch.zeros(1).double(),
        -torch.ones(1).double(),
        torch.ones(2).double(),
        torch.ones(0).double(),
    ],
    "components": [torch.zeros(3, 9), torch.full((3, 0), 1.0).bfloat16()],
}


def test_crafted_tensors_of_a_plan(tmp_path):
    rows, none = np.ones((6, 3), np.float32), np.zeros(0, np.float32)
    embedding = Embedding(rows, none, np.zeros((3, 0), np.float32), np.zeros(3, np.float32), 1.0)
    cfg = PlanConfig(schedule="adaptive")
    plan = AdaptivePlan(IDS, cfg, embedding=embedding, batch_size=2, total_steps=2, seed=0)
    path = save_plan(plan, tmp_path / "plan.json")
    file, body = tmp_path / "plan.safetensors", json.loads(path.read_text())
    good = load_file(file)

    def put(tensors, **change):
        save_file(tensors, file)
        body["tensors"] = {
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        } | change
        signed(body, path)

    put(good)
    load_plan(path)
    for name, wrong in TENSORS.items():
        for tensor in wrong:
            put(good | {name: tensor})
            refused(lambda: load_plan(path), "plan.json cannot be followed")
    for name in ("rows", "mean", "scale"):
        put({key: value for key, value in good.items() if key != name})
        refused(lambda: load_plan(path), "cannot be followed", name)
    for change in ({"sha256": "0"}, {"file": "../x"}, {"file": 3}, {"file": ""}, {"sha256": None}):
        put(good, **change)
        refused(lambda: load_plan(path), "plan")


# --- SAEs ----------------------------------------------------------------------------------------------

SAES = {
    "k": ["many", None, -1, 0, 1.5, 99, [], 1e30, 10**30, True],
    "architecture": [3, None, [], "sorted", {"a": 1}, "\x1b[31m"],
    "metadata": [[1], "x", 3, {"hook_name": 3}, {"saerl_hook_layer": "x"}, {"saerl_max_norm": "big"}],
    "d_in": ["x", -1, 10**30, [12]],
    "normalize_activations": [3, ["x"], "sideways", {"a": 1}],
    "apply_b_dec_to_input": ["yes", 3, []],
    "\x1b[31mname": [3],
}


def test_crafted_sae_configurations(tmp_path):
    W = torch.randn(6, 12)
    sae = SAE(W, torch.zeros(12), W.t().contiguous(), torch.zeros(6), cfg=SAESpec(k=2, hook_layer=1))
    folder = save_sae(sae, tmp_path / "sae")
    good = json.loads((folder / "cfg.json").read_text())
    for key, values in SAES.items():
        for value in values:
            write_text(folder / "cfg.json", json.dumps(good | {key: value}))
            refused(lambda: load_sae(folder), str(folder))
    for what, raw in RAW.items():
        if what != "NaN":  # an object of nulls, which says nothing
            (folder / "cfg.json").write_bytes(raw)
            refused(lambda: load_sae(folder))
    write_text(folder / "cfg.json", json.dumps(good))
    weights = (folder / "sae_weights.safetensors").read_bytes()
    for raw in (
        b"",
        weights[:50],
        weights[:-4],
        struct.pack("<Q", 2**63) + b"{}",
        b"\x80\x04K\x03.",
        b"\xff" * 99,
    ):
        (folder / "sae_weights.safetensors").write_bytes(raw)
        refused(lambda: load_sae(folder), str(folder), "again")
        for name in ("x.pt", "x.npz"):
            (tmp_path / name).write_bytes(raw)
            refused(lambda name=name: load_sae(tmp_path / name), name)


def test_terminal_escapes_in_an_sae(tmp_path, capsys):
    W = torch.randn(6, 12)
    spec = SAESpec(k=2, hook_layer=1, model_name="\x1b]0;owned\x07", metadata={"note": "\x9b31m\u202e"})
    save_sae(SAE(W, torch.zeros(12), W.t().contiguous(), torch.zeros(6), cfg=spec), tmp_path / "sae")
    assert said(["sae", "info", tmp_path / "sae"], capsys)[0] == 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_sae_training_that_diverges(activation):
    cfg = SAEConfig(layer=1, d_sae=16, k=2, steps=5, batch_size=16, lr=1e20, activation=activation)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    refused(lambda: train_sae(x, cfg), "diverged", "lower sae.lr")
    refused(lambda: train_sae(x, cfg, on_step=lambda *_: None), "diverged", "lower sae.lr")


# --- models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_one_weight_that_is_no_number(value, tmp_path):
    from saerl_fast.config import ModelConfig
    from saerl_fast.models.load import load_model

    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    refused(lambda: load_model(ModelConfig(path=str(tmp_path))), "layers.1.mlp.up_proj.weight", "NaN")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("decode", ["dynamic", "static"])
def test_logits_that_are_no_numbers(temperature, top_p, decode):
    """As after a step of a wild learning rate: no index beyond the vocabulary, and a sentence."""
    from saerl_fast.rl.decode import Sampling

    model = tiny_model()
    model.model.norm.weight.data[3] = torch.nan
    cfg = Sampling(2, 3, temperature, top_p, None, decode)
    ids = prompts_of(["1+1=", "2+2=="]).ids
    refused(lambda: generate(model, char_tokenizer(), ids, cfg), "logits", "train.lr")


def test_no_feature_at_all_is_a_note():
    from saerl_fast.config import QualityConfig
    from saerl_fast.signals.bank import Bank
    from saerl_kernels import CSR

    for head in ("logistic", "ridge"):
        bank = Bank(CSR.empty(40, 5), ["the same"] * 40)
        found = fit_quality(bank, np.arange(40) % 2, QualityConfig(head=head))
        assert np.isnan(found.scores).all() and "no feature is active" in found.metrics["note"]


# --- prompts -------------------------------------------------------------------------------------------

TEMPLATES = {
    "{{ messages + 1 }}": "rejects",
    "{{ range(10000000) }}": "rejects",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "rejects",
    "{{ 1 / 0 }}": "rejects",
    "{% include 'x' %}": "rejects",
    "{{ messages | nobody }}": "rejects",
    "{{ messages.pop() }}": "rejects",
    "{{ raise_exception('\x1b[31mred') }}": "rejects",
    "{{ 'a' * 9999999999999999 }}": "rejects",
    "{% for": "rejects",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 0.2 s",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}": "more than",
    "{{ 9 ** 9 ** 9 }}": "powers",
    "{{ messages[0].content ~ '\ud800' }}": "surrogate",
    "{{ '' }}": "leaves out the last message",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_do_not_render(template, monkeypatch):
    monkeypatch.setattr(render, "_SECONDS", 0.2)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    pool = Pool({"prompt_id": ["a"], "prompt": ["1+1="], "answer": ["2"]})
    before = signal.getsignal(signal.SIGALRM)
    refused(lambda: render.prepare(pool, tokenizer, DataConfig()), TEMPLATES[template])
    assert signal.getsignal(signal.SIGALRM) is before
    assert not 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 1  # pytest-timeout's, if any, is a longer one


HALF = "a\ud800b"
ROWS = [
    {"prompt": HALF, "answer": "2"},
    {"prompt": "1+1=", "answer": HALF},
    {"prompt": "1+1=", "answer": "2", "prompt_id": HALF},
    {"prompt": "1+1=", "answer": "2", "task": HALF},
    {"prompt": "1+1=", "answer": "2", HALF: "x"},
    {"prompt": [{"role": "user", "content": HALF}], "answer": "2"},
    {"prompt": [{"role": HALF, "content": "1+1="}], "answer": "2"},
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_halves_of_surrogate_pairs_in_a_pool(row, tmp_path, monkeypatch):
    from saerl_fast.prompts.pool import load_split

    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves.py").write_text(f"def rows(role, size, seed):\n    return [{row!r}, {row!r}][:1]\n")

    def read() -> None:
        train, held_out = load_split(DataConfig(train="halves.py:rows", eval="halves.py:rows"))
        session_of(tiny_model(), train, held_out)

    with pytest.raises(SaerlError):
        read()
    write_text(tmp_path / "pool.jsonl", json.dumps(row) + "\n")
    refused(lambda: load_split(DataConfig(train="pool.jsonl", eval="pool.jsonl")), "surrogate")


COLUMNS = [[10**30], [1, "x"], [{}], [{"a": 1}, [1]], [HALF], [object()], [10**400], [1j]]


@pytest.mark.parametrize("column", COLUMNS, ids=range(len(COLUMNS)))
def test_columns_that_parquet_does_not_hold(column, tmp_path):
    scores = Scores({"prompt_id": [str(i) for i in range(len(column))], "\x1b[31m": column}, {})
    refused(lambda: scores.save(tmp_path), "cannot be written to Parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [10**400, "x", [1], {"a": 1}, "\x1b[31m"], ids=range(5))
def test_labels_that_are_no_numbers(value):
    from saerl_fast.config import Config
    from saerl_fast.signals.labelled import label_columns

    pool = Pool({"prompt_id": ["a"], "prompt": ["b"], "answer": ["c"], "quality_label": [value]})
    refused(lambda: label_columns(pool, Config()), "quality.label_column")


def test_parquet_pools_with_values_that_are_none(tmp_path):
    from saerl_fast.prompts.pool import load_prompts

    text = pa.StringArray.from_buffers(
        1, pa.array([b"ab"], pa.binary()).buffers()[1], pa.py_buffer(b"\xff\xfe")
    )
    date = pa.array([2**60], pa.timestamp("us"))
    for name, column in (("text", text), ("date", date)):
        pq.write_table(pa.table({"prompt": ["1+1="], "answer": ["2"], name: column}), tmp_path / "x.parquet")
        refused(lambda: load_prompts(str(tmp_path / "x.parquet"), DataConfig()), "x.parquet")


# --- settings and paths --------------------------------------------------------------------------------

YAML = {
    "deep": b"[" * 2000,
    "latin-1": b"seed: 1 # \xe9",
    "a date that is none": b"run_dir: 2001-99-99",
    "zeros": b"\0\0",
    "an escape": b"\x1b[31m: 3",
    "an object": b"!!python/object/apply:os.system [id]",
    "digits": b"seed: 1" + b"0" * 5000,
    "half a pair": b'run_dir: "\\ud800"',
    "a null": b'run_dir: "a\\0b"',
    "a list": b"- 1",
    "unknown tag": b"seed: !x 1",
}
SETTINGS = [
    "model.path=a\0b",
    "run_dir=a\udcffb",
    "data.train=\ud800.jsonl",
    "seed=1" + "0" * 5000,
    "\x1b[31m=3",
]
SETTINGS += ["seed=0b", "seed=2001-99-99", "da\udcffta=1", "train.lr=1" + "0" * 5000, "seed=" + "[" * 2000]
PATHS = ["x" * 5000, "~nosuchuser/x", "a\udcffb", "\x1b[31m", "a\nb", "/dev/null", "/proc/self/mem"]


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_no_config(name, tmp_path):
    (tmp_path / "c.yaml").write_bytes(YAML[name])
    refused(lambda: load_config(tmp_path / "c.yaml"))


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_settings_that_are_none(setting):
    refused(lambda: load_config(None, [setting]))


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths_that_are_none(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in (["report", path], ["watch", path], ["sae", "info", path], ["plan", "--config", path]):
        assert said(argv, capsys)[0] == 2, argv
    for setting in ("model.path", "data.train", "sae.path", "run_dir"):
        known = {"model.path": "m", "data.train": "x.jsonl", "run_dir": "r"} | {setting: path}
        argv = ["train", *(f"{key}={value}" for key, value in known.items()), "plan.schedule=vanilla"]
        assert said(argv, capsys)[0] == 2, argv
