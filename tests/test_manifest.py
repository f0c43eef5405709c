"""Hashes that files must have: no crash and no damage leaves anything that is taken for something else."""

import errno
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saerl_fast.config import load_config, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.plan import load_plan
from saerl_fast.records import manifest
from saerl_fast.records.runs import load_runs
from saerl_fast.sae.files import convert_sae, load_sae, save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.signals.scores import Scores
from saerl_fast.stages import made, pipeline
from saerl_fast.stages.console import Echo
from saerl_kernels import CSR
from tests.crash import crash, damages

A, B = "score.reduce=mean", "score.reduce=max"
QUIET = Echo(quiet=True)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(folder, value, names=("a", "b")):
    with manifest.publish(folder, "thing", {"fingerprint": value}) as new:
        for name in names:
            new(name).write_text(f"{name} {value}")


def test_a_crash_anywhere_leaves_the_one_or_the_other_or_what_is_known_as_none(tmp_path):
    found = []
    for operations in range(99):
        folder = tmp_path / str(operations)
        write(folder, "old", ("a", "b", "c"))
        crashed = crash(folder, operations, lambda at=folder: write(at, "new"))
        look = manifest.look(folder, "thing")
        assert bool(look.fault) == look.partial
        if not look.fault:
            value = look.entry["fingerprint"]
            assert all((folder / name).read_text() == f"{name} {value}" for name in look.entry["files"])
        found.append("partial" if look.partial else value)
        write(folder, "new")
        assert manifest.check(folder, "thing", "make")["fingerprint"] == "new"
        if not crashed:
            break
    assert list(dict.fromkeys(found)) == ["old", "partial", "new"]
    assert not (folder / "c").exists(), "of the old entry alone"


def test_one_file_is_never_lost(tmp_path):
    """As labels in progress."""
    for operations in range(99):
        folder = tmp_path / str(operations)
        write(folder, "old", ("a",))
        crashed = crash(folder, operations, lambda at=folder: write(at, "new", ("a",)))
        assert manifest.look(folder, "thing").entry["fingerprint"] == (folder / "a").read_text()[2:]
        assert not manifest.look(folder, "thing").fault
        if not crashed:
            break


def test_damage_is_refused_with_the_command_that_mends_it(tmp_path):
    write(tmp_path, "x" * 100)
    for data in damages((tmp_path / "a").read_bytes()).values():
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(SaerlError, match="a is damaged or was changed.*make it again with `saerl x`"):
            manifest.check(tmp_path, "thing", "saerl x")
        assert not manifest.look(tmp_path, "thing").partial, "not a crash"
    (tmp_path / "a").unlink()
    with pytest.raises(SaerlError, match="a is missing"):
        manifest.check(tmp_path, "thing", "saerl x")
    with pytest.raises(SaerlError, match="does not record the other here; make it with `saerl y`"):
        manifest.check(tmp_path, "other", "saerl y")


@pytest.mark.parametrize(
    "text",
    ["", "[", '{"format": "saerl-manifest-1"}', '{"format": "saerl-manifest-1", "artefacts": {"thing": [3]}}']
    + [
        json.dumps({"format": manifest.FORMAT, "artefacts": {"thing": [{"files": {name: kept}}]}})
        for name, kept in [("a", 3), ("../a", {"sha256": "", "size": 0}), ("/a", {"sha256": "", "size": 0})]
    ]
    + [json.dumps({"format": manifest.FORMAT, "artefacts": {"thing": [{"files": {}, "inputs": ["a"]}]}})],
)
def test_a_damaged_manifest_proves_nothing(tmp_path, text):
    write(tmp_path, "x")
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(SaerlError, match=r"manifest.json does not record the thing"):
        manifest.check(tmp_path, "thing", "saerl x")
    write(tmp_path, "y")
    assert manifest.check(tmp_path, "thing", "saerl x")["fingerprint"] == "y"


def test_a_manifest_of_something_else_stays(tmp_path):
    (tmp_path / manifest.FILE).write_text('{"name": "app"}')
    assert manifest.check(tmp_path, "thing", "saerl x") is None
    with pytest.raises(SaerlError, match="choose another folder"):
        write(tmp_path, "x")
    assert sorted(os.listdir(tmp_path)) == [manifest.FILE]


def test_a_hash_is_not_remembered_of_a_file_that_has_just_changed(tmp_path):
    file = tmp_path / "f"
    file.write_text("one")
    first = manifest.digest(file)
    file.write_text("two")
    assert manifest.digest(file) != first
    os.utime(file, (0, 0))  # the time of change in the inode stays
    assert manifest.digest(file) != first


# --- stages, with next to no computing in them -------------------------------------------------------


def small_sae(seed):
    encoder = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    return SAE(encoder, torch.zeros(8), encoder.T.clone(), torch.zeros(6), cfg=SAESpec(k=2))


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """``config(folder, *settings)``; stages whose SAE and scores follow from the settings at once."""
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1), "quality_label": i % 2} for i in range(24)]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [str(i) for i in range(20)]
    session = SimpleNamespace(model=SimpleNamespace(device="cpu"))
    session.eval = SimpleNamespace(ids=[])
    session.train = SimpleNamespace(ids=[[1]] * 20, columns={}, column=lambda name: ids)
    fixed = ["data.id_column=", f"data.train={pool}", "data.eval_size=4", "difficulty.n_labels=0"]
    fixed += ["train.rollout.prompts_per_step=4", "train.steps=3", "plan.adaptive.svd=3", "quality.head=none"]
    fixed += ["score.include_answer=false"]

    def scored(session, sae, config, **_):
        rng = np.random.default_rng([config.sae.seed, config.score.reduce == "max"])
        dense = torch.from_numpy(rng.random((20, 8), np.float32)) * sae.W_enc[0].detach().abs()
        columns = {"prompt_id": ids, "saerl_cluster": rng.integers(0, 3, 20)}
        columns |= {"saerl_difficulty": rng.random(20), "saerl_quality": np.ones(20)}
        seconds = {"now": os.urandom(2).hex()}
        return Scores(columns, {"quality": {}, "seconds": seconds}, CSR.from_dense(dense))

    monkeypatch.setattr("saerl_fast.signals.scores.score", scored)
    monkeypatch.setattr("saerl_fast.signals.labelled.label_columns", lambda *_: (None, None))
    monkeypatch.setattr("saerl_fast.sae.capture.resolve_layer", lambda *_: 1)
    monkeypatch.setattr("saerl_fast.sae.capture.check_width", lambda *_: None)
    monkeypatch.setattr("saerl_fast.sae.train.collect_activations", lambda *_, **__: None)
    trained = lambda _, cfg, **__: (small_sae(cfg.seed), {"fvu": 0.5, "dead_fraction": 0.0})  # noqa: E731
    monkeypatch.setattr("saerl_fast.sae.train.train_sae", trained)
    monkeypatch.setattr(pipeline, "open_session", lambda *_: session)
    return lambda folder, *settings: load_config(None, [*fixed, f"run_dir={folder}", *settings])


def outcome(config, redo=False):
    """The plan that `saerl plan` writes, or its sentence."""
    try:
        pipeline.plan_stage(config, QUIET, redo=redo)
    except SaerlError as err:
        assert re.search("add --redo to make again what depends on them|`saerl ", str(err)), err
        return str(err)
    body = json.loads((made.Path(config.run_dir) / "plan.json").read_text())
    load_plan(made.Path(config.run_dir) / "plan.json")
    return body["sha256"]


def crashes(tmp_path, stages, work, one, two, step=1):
    """Crash ``work`` under ``two`` after every number of operations; both then give their own, or refuse."""
    right = {name: outcome(stages(tmp_path / name, name)) for name in (one, two)}
    assert right[one] != right[two]
    met = set()
    for operations in range(0, 199, step):
        folder = tmp_path / "run"
        shutil.copytree(tmp_path / one, folder)
        crashed = crash(folder, operations, lambda at=folder: work(stages(at, two)))
        shutil.copytree(folder, tmp_path / "as left")
        for name in (one, two):
            found = outcome(stages(folder, name))
            met.add("same" if found == right[name] else "refused")
            if found != right[name]:
                assert re.search("was made (with other settings|from another SAE)", found), found
                assert operations % 4 or outcome(stages(folder, name), redo=True) == right[name]
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "as left", folder)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "as left")
        if not crashed:
            return met
    raise AssertionError("no end")


def test_score_that_crashes_anywhere_mixes_nothing(tmp_path, stages):
    work = lambda config: pipeline.score_stage(config, QUIET)  # noqa: E731
    assert crashes(tmp_path, stages, work, A, B) == {"same", "refused"}


def test_an_sae_whose_training_crashes_anywhere_mixes_nothing(tmp_path, stages):
    work = lambda config: pipeline.sae_stage(config, QUIET)  # noqa: E731
    assert crashes(tmp_path, stages, work, "sae.seed=1", "sae.seed=2") == {"same", "refused"}


def test_redo_that_crashes_anywhere_mixes_nothing(tmp_path, stages):
    work = lambda config: pipeline.plan_stage(config, QUIET, redo=True)  # noqa: E731
    assert crashes(tmp_path, stages, work, "sae.seed=1", "sae.seed=2", step=3) == {"same", "refused"}


def test_damage_of_any_output_is_refused_and_redo_mends_it(tmp_path, stages):
    config, whole = stages(tmp_path / "run", A), stages(tmp_path / "whole", A)
    right = outcome(whole)
    names = ["scores.parquet", "scores.json", "features.safetensors", "manifest.json"]
    names += ["sae/sae_weights.safetensors", "sae/cfg.json", "sae/train.json", "sae/manifest.json"]
    for name in names:
        data = (tmp_path / "whole" / name).read_bytes()
        for kind, damaged in [*damages(data).items(), ("missing", None)]:
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            file = tmp_path / "run" / name
            file.unlink() if damaged is None else file.write_bytes(damaged)
            found = outcome(config)
            assert "\n" not in found
            if name.endswith("manifest.json"):  # a flip may hit a setting, for messages only
                assert found != right or kind == "flipped", (name, kind)
            else:
                assert (found == right) == (kind == "missing"), (name, kind, found)
            assert outcome(config, redo=True) == right, (name, kind)
            shutil.rmtree(tmp_path / "run")
    outcome(config)
    for name in ("plan.json", "plan.safetensors"):
        file = tmp_path / "run" / name
        kept = file.read_bytes()
        for data in damages(kept).values():
            file.write_bytes(data)
            with pytest.raises(SaerlError, match="`saerl plan`"):
                load_plan(tmp_path / "run" / "plan.json")
        file.write_bytes(kept)


def test_scores_of_another_sae_of_the_same_settings(tmp_path, stages, monkeypatch):
    """As after training it again on another device."""
    config = stages(tmp_path / "run", A)
    right = outcome(config)
    other = lambda *_, **__: (small_sae(9), {"fvu": 0.5, "dead_fraction": 0.0})  # noqa: E731
    monkeypatch.setattr("saerl_fast.sae.train.train_sae", other)
    pipeline.sae_stage(config, QUIET)
    assert "scores.parquet was made from another SAE than the one beside it" in outcome(config)
    assert outcome(config, redo=True) != right


def test_scores_made_again_are_the_same_input(tmp_path, stages):
    config = stages(tmp_path / "run", A)
    pipeline.score_stage(config, QUIET)
    before = made.score_hashes(config)
    pipeline.score_stage(config, QUIET)
    assert made.score_hashes(config) == before and None not in before.values()


def test_other_content_of_the_same_names_is_other_settings(tmp_path, stages):
    """Labels in the pool, and a model folder with subfolders."""
    model = tmp_path / "model" / "deep"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(bytes(1 << 18))
    config = stages(tmp_path / "model" / "run", A, f"model.path={tmp_path / 'model'}")
    right = outcome(config)
    assert outcome(config) == right, "the outputs inside the model's folder are none of its files"
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "x").write_text("hidden")
    assert outcome(config) == right
    changed = bytearray(1 << 18)
    changed[1 << 17] = 128
    (model / "weights").write_bytes(changed)
    assert "by name the same, but other prompts, functions or model files" in outcome(config)
    (model / "weights").write_bytes(bytes(1 << 18))
    assert outcome(config) == right
    pool = made.Path(config.data.train)
    pool.write_text(pool.read_text().replace('"quality_label": 1', '"quality_label": 0', 1))
    assert "by name the same, but other prompts, functions or model files" in outcome(config)


def test_saes_prove_themselves_where_they_have_a_manifest(tmp_path):
    save_sae(small_sae(0), tmp_path / "plain")
    assert not (tmp_path / "plain" / manifest.FILE).exists()
    convert_sae(tmp_path / "plain", tmp_path / "kept")
    for name in ("sae_weights.safetensors", "cfg.json"):
        file = tmp_path / "kept" / name
        kept = file.read_bytes()
        for data in damages(kept).values():
            file.write_bytes(data)
            with pytest.raises(SaerlError, match="`saerl sae train` or `saerl sae convert`"):
                load_sae(tmp_path / "kept")
        file.write_bytes(kept)
    load_sae(tmp_path / "kept")
    (tmp_path / "kept" / manifest.FILE).unlink()
    load_sae(tmp_path / "kept")


def test_a_report_reads_what_the_run_wrote(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arm": "a", "seed": 0, "config": to_dict(load_config())}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "eval", "accuracy": 0.5}\n')
    manifest.record(tmp_path, "run", ["run.json"])
    manifest.record(tmp_path, "result", ["metrics.jsonl"])
    assert load_runs(tmp_path)[0].accuracy == [0.5]
    for name, again in (("run.json", "--resume"), ("metrics.jsonl", "--overwrite")):
        kept = (tmp_path / name).read_bytes()
        for data in damages(kept).values():
            (tmp_path / name).write_bytes(data)
            with pytest.raises(SaerlError, match=f"`saerl train {again}`"):
                load_runs(tmp_path)
        (tmp_path / name).write_bytes(kept)
    manifest.forget(tmp_path, "result")  # as while it goes on
    assert load_runs(tmp_path)[0].accuracy == [0.5]


def test_a_folder_removed_while_it_is_written_is_no_success(tmp_path, monkeypatch):
    real, calls = os.replace, []

    def replace(old, new):
        calls.append(real(old, new))
        if len(calls) == 3:  # the manifest, and both files
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SaerlError, match="was removed while it was written; run the command again"):
        write(tmp_path / "out", "new")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "null", "3", '""', "{}"])
def test_a_manifest_that_is_nobodys_is_damaged_and_made_again(tmp_path, text):
    write(tmp_path, "old")
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(SaerlError, match="does not record the thing here; make it with `make`"):
        manifest.check(tmp_path, "thing", "make")
    write(tmp_path, "new")
    assert manifest.check(tmp_path, "thing", "make")["fingerprint"] == "new"


def test_another_programs_manifest_stays(tmp_path):
    (tmp_path / manifest.FILE).write_text('[{"Config": "x.json"}]')  # as in an image of a container
    assert manifest.check(tmp_path, "thing", "make") is None
    with pytest.raises(SaerlError, match="is a file of something else; remove it"):
        manifest.record(tmp_path, "thing", [])


def test_a_pipe_or_a_folder_in_the_manifests_place_is_damage(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / manifest.FILE)
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for what nobody writes"))
        signal.alarm(20)
        try:
            assert manifest.read(tmp_path) == {}
            with pytest.raises(SaerlError, match="does not record the thing"):
                manifest.check(tmp_path, "thing", "saerl score")
        finally:
            signal.alarm(0)
        if make is os.mkfifo:
            manifest.record(tmp_path, "thing", ["a.txt"])
            assert manifest.check(tmp_path, "thing", "saerl score")
            (tmp_path / manifest.FILE).unlink()


@pytest.mark.parametrize("name", ["manifest.json", "a"])
def test_what_cannot_be_read_is_neither_damaged_nor_forgotten(tmp_path, monkeypatch, name):
    write(tmp_path, "old")
    before = (tmp_path / "manifest.json").read_text()
    with monkeypatch.context() as patch, pytest.raises(SaerlError, match=f"cannot read .*/{name}: Too many"):
        real, error = open, OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def read(file, *args, **options):
            if os.fspath(file) == str(tmp_path / name):
                raise error
            return real(file, *args, **options)

        for place in ("builtins", "io", "pathlib.Path"):  # Python 3.10's paths hold io.open
            patch.setattr(f"{place}.open", read)
        write(tmp_path, "new") if name == "manifest.json" else manifest.look(tmp_path, "thing")
    assert (tmp_path / "manifest.json").read_text() == before
    assert not manifest.look(tmp_path, "thing").fault
