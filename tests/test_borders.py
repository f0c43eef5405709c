"""Damaged, crafted and hostile inputs at every border: one sentence each, no traceback, no control character.

Tables of inputs and of what reads them; a new input is a line. `said` is the one judge: code 0 or 2 and, with
2, one printable line that begins with "saerl: " and is no "unexpected" error, which would be a border missed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast import cli
from saerl_fast.config import DataConfig, PlanConfig, SAEConfig, load_config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import cannot_write, mismatch, write_text
from saerl_fast.plan import load_plan, save_plan
from saerl_fast.plan.adaptive import AdaptivePlan, Embedding
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts import render
from saerl_fast.prompts.pool import Pool
from saerl_fast.records.report import write_report
from saerl_fast.rl.checkpoint import load_latest
from saerl_fast.rl.generate import generate
from saerl_fast.sae.files import load_sae, save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.train import train_sae
from saerl_fast.signals.features import load_features, save_features
from saerl_fast.signals.quality import fit_quality
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR
from tests.tiny_lm import char_tokenizer, prompts_of, session_of, tiny_model
from tests.training import run, small

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
RAW = {  # what may stand where a JSON file should be
    "nothing": b"",
    "zeros": b"\0" * 64,
    "a list": b"[]",
    "a number": b"3",
    "text": b'"x"',
    "null": b"null",
    "cut off": b'{"format": "sa',
    "NaN": b'{"step": NaN, "kind": NaN}',
    "infinity": b'{"step": Infinity}',
    "1e999": b'{"step": 1e999}',
    "10**400": b'{"step": 1' + b"0" * 400 + b"}",
    "5000 digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"config":' * 400 + b"1" + b"}" * 400,
    "a key twice": b'{"step": 1, "step": 2}',
    "latin-1": b'{"kind": "\xe9"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"step": 1}'.encode("utf-16"),
    "escapes": b'{"\\u001b[31m": "\\u001b[31m"}',
}
ARMS = {  # what a name in a record may be
    "mathtext": "$\\frac{$",
    "a column end": "a|b",
    "a tag": "<script>alert(1)</script>",
    "a link": "[here](http://x.y)",
    "lines": "one\ntwo\r\n# three",
    "escapes": "\x1b[31mred\x9b0m\x07",
    "a turn": "\u202egnp.exe",
    "half a pair": "\ud800",
    "long": "x" * 5000,
    "nothing": "",
    "underscore": "_hidden",
}


def said(argv, capsys) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    code = cli.main([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert not UNSEEN.search(out + err), repr(out + err)[:300]
    assert code in (0, 2) and "Traceback" not in err and "unexpected" not in err, err[-600:]
    assert code == 0 or err.splitlines()[-1].startswith("saerl: "), err
    return code, err


def refused(call, *words: str) -> str:
    """The sentence that ``call`` raises; it is one printable line."""
    with pytest.raises(SaerlError) as caught:
        call()
    text = str(caught.value)
    assert not UNSEEN.search(text) and "\n" not in text and len(text) <= 2010
    assert all(word in text for word in words), text
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of the tiny model, as a command leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "vanilla"
    run(folder, small(steps=2, save_model=False))
    described = {"arm": "vanilla", "seed": 0, "resumable": "x", "plan": None, "made": {"saerl": "1"}}
    described["config"] = {"train": {"steps": 2}}
    write_text(folder / "run.json", json.dumps(described))
    rows = 12
    columns = {"prompt_id": [str(i) for i in range(rows)], "saerl_cluster": np.zeros(rows, np.int32)}
    floats = ("saerl_difficulty", "saerl_quality", "saerl_pass_rate")
    columns |= {name: np.full(rows, 0.5, np.float32) for name in floats}
    indptr, indices = torch.arange(rows + 1), torch.zeros(rows, dtype=torch.int32)
    features = CSR(indptr, indices, torch.ones(rows), 4)
    Scores(columns, {"quality": {"auc": 0.5}, "fingerprint": "x", "config": {}}, features).save(folder.parent)
    return folder.parent


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


# --- records -------------------------------------------------------------------------------------------

RECORDS = [f"vanilla/{name}.json" for name in ("run", "summary")] + ["scores.json", "compare.json"]
RECORDS += [f"vanilla/{name}.jsonl" for name in ("metrics", "rollouts", "eval_items", "eval_prompts")]


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without figures: those are tested once, and take a second."""
    monkeypatch.setattr("saerl_fast.records.report._draw", lambda *_: [])


@pytest.mark.parametrize("name", [*RECORDS, "sae/train.json"])
def test_a_report_of_damaged_records(name, runs, capsys, no_figures):
    for what, raw in RAW.items():
        (runs / name).parent.mkdir(exist_ok=True)
        (runs / name).write_bytes(raw)
        code, err = said(["report", runs], capsys)
        refusable = name.endswith(".json") and what not in ("escapes", "NaN", "10**400")
        assert (code == 2 and name in err) or not refusable, (what, err)


WRONG = [None, "x", -1, 1e30, 10**30, [], {}, [None], {"a": None}, True, "\x1b[31m", "\ud800", [[]]]


def places(value, depth: int = 3, at: tuple = ()):
    """Every path into nested values."""
    if at:
        yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts if depth else ():
        yield from places(part, depth - 1, (*at, key))


def altered(value, at: tuple, new):
    """A copy with ``new`` at the place ``at``; gone where ``new`` is Ellipsis."""
    made = copy.deepcopy(value)
    node = made
    for key in at[:-1]:
        node = node[key]
    if new is ...:
        del node[at[-1]]
    else:
        node[at[-1]] = new
    return made


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "compare.json"])
def test_a_report_of_records_with_values_of_other_kinds(name, runs, capsys, no_figures):
    lines = (runs / name).read_text().splitlines()
    record = json.loads(lines[-1]) if name.endswith("l") else json.loads("\n".join(lines))
    for i, at in enumerate(places(record)):
        for new in (WRONG[i % len(WRONG)], WRONG[(i + 5) % len(WRONG)], ...):
            text = json.dumps(altered(record, at, new))
            (runs / name).write_text("\n".join([*lines[:-1], text]) if name.endswith("l") else text)
            said(["report", runs], capsys)


COMPARED = {
    "arms": [3, "vanilla", [3], [None], {"a": 1}],
    "seeds": [3, "0", ["0"], [0.5], [10**30]],
    "targets": [3, ["x"], [-1], [None]],
    "target_values": [3, ["x"], [10**400]],
    "smooth": ["x", -1, 0, 10**30],
    "notes": [3, {"a": 1}, "text"],
}


@pytest.mark.parametrize("key", COMPARED)
def test_a_comparison_with_values_of_other_kinds(key, runs, capsys, no_figures):
    for value in COMPARED[key]:
        record = {"arms": ["vanilla"], "seeds": [0], key: value}
        (runs / "compare.json").write_text(json.dumps(record))
        assert said(["report", runs], capsys)[0] == 2, value


def test_arms_of_any_name(runs, capsys):
    """Told apart by name in tables and figures, and obeyed by nobody."""
    plain = json.loads((runs / "vanilla" / "run.json").read_text())
    for i, arm in enumerate(ARMS.values()):
        folder = Path(shutil.copytree(runs / "vanilla", runs / f"arm{i}"))
        plain["made"] = plain["made"] | {arm: arm, "git": arm}
        (folder / "run.json").write_text(json.dumps(plain | {"arm": arm, "seed": i}))
    assert said(["report", runs], capsys)[0] == 0
    written = (runs / "report.md").read_text() + (runs / "report.html").read_text()
    assert not UNSEEN.search(written) and "\u202e" not in written
    assert "<script" not in written and "[here](" not in (runs / "report.md").read_text()
    (table,) = re.findall(r"## Result\n\n(.*?)\n\n", (runs / "report.md").read_text(), re.DOTALL)
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
    assert len(cells) == 1 and len(table.splitlines()) == 3 + len(ARMS)


@pytest.mark.parametrize("name", ["scores.parquet", "features.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "text", "other columns", "NaN"])
def test_damaged_scores(name, damage, runs):
    file = runs / name
    raw = file.read_bytes()
    made = {"empty": b"", "half": raw[: len(raw) // 2], "zeros": b"\0" * len(raw), "text": b"x" * 100}
    if damage in made:
        file.write_bytes(made[damage])
    elif name == "scores.parquet":
        ids = [str(i) for i in range(12)]
        bad = {"prompt_id": ids, "saerl_cluster": ["x"] * 12}
        pq.write_table(pa.table({"a": ids} if damage == "other columns" else bad), file)
    elif damage == "NaN":
        return
    else:
        save_file({"a": torch.ones(2)}, file, {"format": "saerl-features-1"})
    refused(lambda: Scores.load(runs))
    if name == "scores.parquet":
        refused(lambda: write_report(runs), "scores.parquet is damaged", "saerl score")


FEATURES = {
    "indptr": [torch.tensor([0, 1]), torch.tensor([0, 2, 1, 3]), torch.tensor([1, 2, 3, 4]), torch.zeros(4)],
    "indices": [torch.tensor([0, 1, 99], dtype=torch.int32), torch.tensor([0, -1, 1], dtype=torch.int32)],
    "values": [torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.float64)],
    "n_cols": ["", "-1", "1e9", "9" * 400, "0"],
}


def test_features_that_are_no_csr(tmp_path):
    file = tmp_path / "features.safetensors"
    X = CSR(torch.arange(4), torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(3), 4)
    save_features(file, X, ["a", "b", "c"])
    good, about = load_file(file), {"format": "saerl-features-1", "n_cols": "4"}
    for name, wrong in FEATURES.items():
        for value in wrong:
            tensors = good if name == "n_cols" else good | {name: value}
            save_file(tensors, file, about | ({name: value} if name == "n_cols" else {}))
            refused(lambda: load_features(file), "features.safetensors is damaged")


def test_foreign_files_among_checkpoints(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-x-y.safetensors", "step--.safetensors", "step-1-2.safetensors", "step-9.safetensors"):
        (folder / name).write_bytes(b"x")
    assert load_latest(tmp_path) is None
    for step, raw in ((1, b""), (2, struct.pack("<Q", 2**63)), (3, b"\x02\0\0\0\0\0\0\0{}")):
        name = hashlib.sha256(raw).hexdigest()[:16]  # the name tells nothing of a crafted one
        (folder / f"step-{step:06d}-{name}.safetensors").write_bytes(raw)
    refused(lambda: load_latest(tmp_path), "every checkpoint", "damaged")


# --- plans ---------------------------------------------------------------------------------------------

IDS = [f"p{i}" for i in range(6)]
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
    from saerl_fast.models import load_model

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
    from scipy.sparse import csr_matrix

    from saerl_fast.config import QualityConfig

    for head in ("logistic", "ridge"):
        found = fit_quality(csr_matrix((40, 0)), np.arange(40) % 2, QualityConfig(head=head))
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
    "{{ '\ud800' }}": "surrogate",
    "{{ '' }}": "no tokens",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_do_not_render(template, monkeypatch):
    monkeypatch.setattr(render, "_SECONDS", 0.2)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    pool = Pool({"prompt_id": ["a"], "prompt": ["1+1="], "answer": ["2"]})
    before = signal.getsignal(signal.SIGALRM)
    refused(lambda: render.prepare(pool, tokenizer, DataConfig()), TEMPLATES[template])
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


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


# --- the disk ------------------------------------------------------------------------------------------


@pytest.fixture
def limited():
    """Calls what it is given where no file may be longer than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(size, what):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            return what()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield call
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_sae(folder: Path) -> Path:
    W = torch.ones(64, 64)
    return save_sae(SAE(W, W[0].clone(), W.clone(), W[0].clone(), cfg=SAESpec(k=2)), folder)


def plain_plan(folder: Path) -> Path:
    plan = StaticPlan("vanilla", IDS, PlanConfig(), batch_size=2, total_steps=300, seed=0)
    return save_plan(plan, folder / "plan.json")


@pytest.mark.parametrize(
    ("write", "sizes"),
    [
        (tiny_sae, (0, 100, 20_000)),
        (plain_plan, (0, 100, 3000)),
        (lambda folder: Scores({"prompt_id": IDS * 9}, {}).save(folder), (0, 300)),
        (lambda folder: run(folder, small(steps=1)), (0, 30_000)),
    ],
    ids=["sae", "plan", "scores", "train"],
)
def test_a_full_disk(write, sizes, tmp_path, limited):
    """One sentence that says what to do, nothing half written, and then the same as without."""
    for size in sizes:
        folder = tmp_path / str(size)
        refused(lambda folder=folder, size=size: limited(size, lambda: write(folder)), "free some space")
        assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp") and path.name[0] == "."]
        write(folder)
        assert not list(folder.rglob("*.tmp"))


def test_a_report_on_a_full_disk(runs, limited, capsys):
    for size in (0,):
        assert limited(size, lambda: said(["report", runs], capsys))[0] == 2
    assert said(["report", runs], capsys)[0] == 0 and not list(runs.rglob("*.tmp"))


ERRORS = [
    (OSError(28, os.strerror(28)), "free some space"),
    (OSError(122, os.strerror(122)), "free some space"),
    (OSError(24, os.strerror(24)), "ulimit -n"),
    (OSError(30, os.strerror(30)), "choose another run_dir"),
    (PermissionError(13, "denied"), "choose another run_dir"),
    (type("SafetensorError", (Exception,), {})("I/O error: No space (os error 28)"), "free some space"),
    (KeyError("x"), None),
]


@pytest.mark.parametrize(("error", "fix"), ERRORS, ids=range(len(ERRORS)))
def test_what_a_disk_says(error, fix):
    found = cannot_write("x", error)
    assert found is None if fix is None else fix in str(found)


# --- the last net --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("bug\x1b[31m\nmore"), 1, "unexpected ZeroDivisionError: bug"),
        (RecursionError(), 1, "unexpected RecursionError"),
        (MemoryError(), 2, "not enough memory"),
        (OSError(28, "No space left on device", "/x/y"), 2, "cannot use /x/y: No space left on device"),
    ],
)
def test_what_no_border_catches(error, code, words, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["report", "x"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and f"{Path(__file__).name}:" in err or "cli.py:" in err
    assert not UNSEEN.search(err) and "Traceback" not in err
    assert cli.main(["report", "x", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "form", "fault"),
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": True}, {"a": int}, "a is True, not a whole number"),
        ({}, {"a": int}, "it has no 'a'"),
        ({}, {"a?": int}, None),
        ({"a": None}, {"a?": int}, "a is None, not a whole number"),
        ({"a": None}, {"a": (None, str)}, None),
        ({"a": {"b": ["x", 3]}}, {"a": {"b": [str]}}, "a.b[1] is 3, not text"),
        ({"x": 1, "y": "z"}, {str: float}, "y is 'z', not a number"),
        ([1, float("inf")], [float], "it[1] is inf, not a number"),
        (10**400, float, "it is a huge number, not a number"),
        ([], {}, "it is [], not an object"),
    ],
)
def test_forms(value, form, fault):
    assert mismatch(value, form) == fault
