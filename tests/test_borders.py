"""Damaged records, full disks and what no border catches: one sentence each and no traceback.

Tables of inputs and of what reads them; a new input is a line. The judges are in ``tests/borders.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast import cli
from saerl_fast.config import ModelConfig, PlanConfig
from saerl_fast.fileio import cannot_write, mismatch, write_text
from saerl_fast.models.load import load_model
from saerl_fast.plan import save_plan
from saerl_fast.plan.static import StaticPlan
from saerl_fast.records.report import write_report
from saerl_fast.rl.checkpoint import load_latest
from saerl_fast.sae.files import save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.signals.features import FORMAT, load_features, save_features
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR
from tests.borders import IDS, RAW, UNSEEN, altered, refused, said
from tests.training import run, small

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
    carried = [{"feature": 1, "effect": 0.5, "prompts": [{"id": "0", "text": "a prompt"}]}]
    told = {"quality": {"auc": 0.5, "by_kind": {"torn": 0.5}}, "fingerprint": "x", "config": {}}
    told |= {"difficulty": {"interval": 0.5, "features": carried}}
    told["map"] = {
        "of": 9,
        "method": "pca",
        "explained": [0.5],
        "row": [0],
        "x": [1.0],
        "y": [1.0],
        "text": [""],
    }
    Scores(columns, told, features).save(folder.parent)
    return folder.parent


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


# --- records -------------------------------------------------------------------------------------------

RECORDS = [f"vanilla/{name}.json" for name in ("run", "summary")] + ["scores.json", "compare.json"]
RECORDS += [f"vanilla/{name}.jsonl" for name in ("metrics", "rollouts", "eval_items", "eval_prompts")]


@pytest.fixture
def no_figures(monkeypatch):
    """Reports with empty figures: those are drawn in other tests, and take a second."""
    empty = lambda path, *_, **__: path.write_bytes(b"") or path  # noqa: E731
    monkeypatch.setattr("saerl_fast.records.plots._figure", empty)
    monkeypatch.setattr("saerl_fast.records.page.packed_plotly", lambda: ("", ""))


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
    assert "<script>alert" not in written and "[here](" not in (runs / "report.md").read_text()
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
        save_file({"a": torch.ones(2)}, file, {"format": FORMAT})
    refused(lambda: Scores.load(runs))
    if name == "scores.parquet":
        refused(lambda: write_report(runs), "scores.parquet is damaged", "saerl score")


FEATURES = {
    "indptr": [torch.tensor([0, 1]), torch.tensor([0, 2, 1, 3]), torch.tensor([1, 2, 3, 4]), torch.zeros(4)],
    "indices": [torch.tensor([0, 1, 99], dtype=torch.int32), torch.tensor([0, -1, 1], dtype=torch.int32)],
    "values": [torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.float64)],
    "n_cols": ["", -1, 1e9, 10**400, 0, None, [4]],
}


def test_features_that_are_no_csr(tmp_path):
    file = tmp_path / "features.safetensors"
    X = CSR(torch.arange(4), torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(3), 4)
    save_features(file, X, ["a", "b", "c"])
    good, about = load_file(file), {"format": FORMAT, "n_cols": 4}
    for name, wrong in FEATURES.items():
        for value in wrong:
            tensors = good if name == "n_cols" else good | {name: value}
            told = about | ({name: value} if name == "n_cols" else {})
            save_file(tensors, file, {"saerl": json.dumps(told)})
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
        refused(lambda folder=folder, size=size: limited(size, lambda: write(folder)), "raise the limit")
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
    (OSError(27, os.strerror(27)), "ulimit -f"),
    (OSError(36, os.strerror(36)), "choose another run_dir"),
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
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kind", ["parquet", "safetensors", "model", "write"])
def test_a_border_takes_no_full_memory_for_a_fault_of_a_file(kind, error, tmp_path, monkeypatch, capsys):
    def fail(*args, **more):
        raise error

    Scores({"prompt_id": IDS}).save(tmp_path)
    if kind == "write":
        monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
        monkeypatch.setattr(cli, "run", lambda args: Scores({"prompt_id": IDS}).save(tmp_path))
    elif kind == "parquet":
        monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
        monkeypatch.setattr(cli, "run", lambda args: Scores.load(tmp_path))
    elif kind == "model":
        import transformers

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        model = ModelConfig(path="examples/demo/model")
        monkeypatch.setattr(cli, "run", lambda args: load_model(model))
    else:
        save_features(tmp_path / "x.safetensors", CSR.empty(6, 4), IDS)
        monkeypatch.setattr("saerl_fast.records.tensors.json.loads", fail)
        monkeypatch.setattr(cli, "run", lambda args: load_features(tmp_path / "x.safetensors"))
    assert cli.main(["report", "x"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "there is not enough memory" in err and "damaged" not in err and "cannot be written" not in err


def test_a_librarys_warning_is_one_line_said_once(monkeypatch, capsys, caplog):
    def warn(args):
        for _ in range(3):
            warnings.warn("lbfgs failed to converge\nSTOP: TOTAL NO.", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "run", warn)
    before = warnings.showwarning
    for _ in range(2):
        caplog.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert cli.main(["report", "x"]) == 0
        assert [record.getMessage() for record in caplog.records] == ["UserWarning: lbfgs failed to converge"]
    assert warnings.showwarning is before


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
