"""`saerl export --push-to-hub`, by the hub's own client against a stand-in of its HTTP API."""

from __future__ import annotations

import os

import pytest

from saerl_fast.cli import main
from tests.fake_hub import serve
from tests.test_export import scored  # noqa: F401

pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, where the hub's client looks for the hub, with a token that may write."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    with serve() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        yield made


@pytest.mark.parametrize("to", ["parquet", "trl", "verl"])
def test_the_folder_is_uploaded_as_it_is_with_its_card(hub, scored, tmp_path, capsys, to):  # noqa: F811
    run, plan = scored
    plan("global")
    out = tmp_path / "out"
    told = ["--push-to-hub", "me/mine", "--private"] if to == "trl" else ["--push-to-hub", "mine"]
    assert main(["export", str(run), str(out), "--to", to, *told]) == 0
    assert f"uploaded to {hub.url}/datasets/me/mine" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in out.glob("[!.]*") if path.name != "manifest.json"}
    assert hub.repos == {"me/mine": files} and hub.private == ({"me/mine"} if to == "trl" else set())
    assert {name for name in files if name.endswith(".parquet")} == (
        {"prompts.parquet", "plan.parquet"} if to == "parquet" else {"train.parquet"}
    )
    assert files["README.md"].startswith(b"---\nconfigs:\n- config_name: ")


def test_a_repository_that_is_there_gets_the_new_files(hub, scored, tmp_path):  # noqa: F811
    run, plan = scored
    hub.repos["me/mine"] = {"README.md": b"old", "mine.txt": b"kept"}
    assert main(["export", str(run), str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 0
    assert set(hub.repos["me/mine"]) == {"README.md", "mine.txt", "prompts.parquet"}
    assert hub.repos["me/mine"]["README.md"] != b"old"


def test_what_the_hub_refuses_is_one_sentence(hub, scored, tmp_path, capsys, monkeypatch):  # noqa: F811
    run, _ = scored
    out = tmp_path / "out"

    def said(name="me/mine", *more: str) -> str:
        assert main(["export", str(run), str(out), "--push-to-hub", name, *more]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text.splitlines()[-1]  # after a bar of datasets

    def early(*words: str) -> None:
        text = said(*words[1:])
        assert words[0] in text and not out.exists(), text

    for name in ("a b", "me/mine/too", "http://hub/me/mine"):
        early("give USER/NAME", name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    early("run `hf auth login` with a token that is valid")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    early("needs a token that may write; run `hf auth login`, or set HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_reads")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    early("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    early("cannot be reached from here")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    text = said()
    assert f"{out} is written, but --push-to-hub me/mine failed (This token may not write)" in text
    assert "take a token that may write there" in text and (out / "README.md").exists() and not hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own attempts
    hub.broken, out = "/commit/", tmp_path / "other"
    assert "the disk is full" in said() and hub.repos == {"me/mine": {}}


def test_private_is_for_uploads(scored, tmp_path, capsys):  # noqa: F811
    assert main(["export", str(scored[0]), str(tmp_path / "out"), "--private"]) == 2
    assert "--private is said of an upload; add --push-to-hub NAME" in capsys.readouterr().err
