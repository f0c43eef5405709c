"""SAEs by name: releases of SAELens' list through its own loaders, repositories, and no network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae import hub
from saerl_fast.sae.files import load_sae, save_sae
from tests.sae_parts import D_IN, D_SAE, assert_equal, by_saelens, dense, make, serve, tensors
from tests.test_formats import RES, gemma_scope, gemma_scope_2, linear, llama_scope

CANONICAL = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers, whatever the environment says."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens' loaders take sizes from the names of releases: here those of these tests."""
    pytest.importorskip("sae_lens")
    from sae_lens.loading import pretrained_saes_directory as directory

    known = directory.get_config_overrides
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    monkeypatch.setattr(directory, "get_config_overrides", lambda *which: known(*which) | sizes)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize(
    "name",
    [
        CANONICAL,
        CANONICAL.replace("/", ":", 1),
        f"gemma-scope-2b-pt-res/{RES}",
        f"google/gemma-scope-2b-pt-res/{RES}",
        f"google/gemma-scope-2b-pt-res:{RES}",
    ],
)
def test_a_release_is_what_saelens_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None, small: None, name: str
) -> None:
    gemma_scope(tmp_path / RES)
    loaders = serve(monkeypatch, tmp_path)
    ours = load_sae(name)
    assert_equal(ours, by_saelens(loaders, "gemma_2", "google/gemma-scope-2b-pt-res", RES))
    assert ours.layer == 21 and ours.cfg.model_name == "gemma-2-2b"


def test_other_loaders_of_saelens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None, small: None
) -> None:
    loaders = serve(monkeypatch, tmp_path)
    name = "layer_13_width_16k_l0_big"
    gemma_scope_2(tmp_path / "resid_post" / name)
    assert load_sae(f"gemma-scope-2-1b-pt-res/{name}").layer == 14
    llama_scope(tmp_path / "Llama3_1-8B-Base-L15R-8x")
    ours = load_sae("llama_scope_lxr_8x/l15r_8x")  # the list has the factor on the input
    scale = hub._releases()["llama_scope_lxr_8x"]["saes"][15]["norm_scaling_factor"]
    theirs = by_saelens(loaders, "llama_scope", "fnlp/x", "Llama3_1-8B-Base-L15R-8x", scale)
    assert_equal(ours, theirs, 5 * torch.randn(80, D_IN))
    parts = tensors()
    turned = {key: parts[key].t().contiguous() for key in ("W_enc", "W_dec")}
    torch.save(parts | turned, tmp_path / "layer3.sae.pt")
    with pytest.raises(SaerlError, match=f"k=50 must be an integer from 1 to d_sae={D_SAE}"):
        load_sae("qwen-scope-3-8b-base-w64k-l50:layer3")  # its k stands in the name of its repository


def test_the_centred_family_of_gpt2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None, small: None
) -> None:
    """Its flag stands in SAELens' list, not in its files."""
    folder = tmp_path / "blocks.8.hook_resid_pre"
    save_sae(make("standard", k=None), folder)
    old = dict(d_in=D_IN, d_sae=D_SAE, dtype="torch.float32", hook_point="blocks.8.hook_resid_pre", lr=4e-4)
    old |= dict(model_name="gpt2-small", l1_coefficient=8e-5, expansion_factor=32, use_ghost_grads=True)
    (folder / "cfg.json").write_text(json.dumps(old | {"hook_point_layer": 8, "seed": 123}))
    serve(monkeypatch, tmp_path)
    x = torch.randn(30, D_IN) + 4
    want = dense(make("standard", k=None), x - x.mean(-1, keepdim=True))
    ours = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    torch.testing.assert_close(dense(ours, x), want, atol=1e-4, rtol=1e-4)
    assert ours.layer == 8


def test_what_a_release_may_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None, small: None
) -> None:
    serve(monkeypatch, tmp_path)
    name = "layer_12_width_16k_l0_big_affine"
    gemma_scope_2(
        tmp_path / "transcoder" / name,
        {"affine_connection": True},
        affine_skip_connection=torch.ones(D_IN, D_IN),
    )
    with pytest.raises(SaerlError, match=r"is a transcoder.*\(jumprelu_skip_transcoder\)"):
        load_sae(f"gemma-scope-2-270m-it-transcoders/transcoder/{name}")
    with pytest.raises(SaerlError, match="could not be read .*check the name and your access"):
        load_sae(CANONICAL)  # not among the files served


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma-scope-2b-pt-res-canonical", ["holds several SAEs", "/layer_0/width_16k/canonical"]),
        (CANONICAL[:-1], ["has no id", "name one of its 58", CANONICAL]),
        ("google/gemma-scope-2b-pt-res", ["a repository of many", "gemma-scope-2b-pt-res/"]),
        ("google/gemma-scope-2b-pt-res/layer_20", ["has no id 'layer_20'"]),
        (CANONICAL.replace("scope", "scoop"), ["did you mean the release gemma-scope-2b-pt-res-canonical?"]),
        (CANONICAL, ["is no folder or file here", "cannot be reached", "go online"]),
        ("some/folder", ["is no folder or file here", "check the path"]),
        ("./some/folder", ["does not exist"]),
        ("/some/folder", ["does not exist"]),
        ("gemma-scope-2b-pt-res-canonica", ["did you mean the release gemma-scope-2b-pt-res-canonical?"]),
    ],
)
def test_without_a_network_it_is_one_sentence_at_once(offline: None, name: str, words: list[str]) -> None:
    pytest.importorskip("sae_lens")
    with pytest.raises(SaerlError) as caught:
        load_sae(name)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_without_sae_lens_it_says_how_to_get_releases(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub._releases.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SaerlError, match="pip install sae-lens"):
        load_sae("gemma-scope-2b-pt-res-canonical")
    hub._releases.cache_clear()


class Client:
    """A hub with one repository, kept in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []  # type: ignore[var-annotated]

    def snapshot_download(self, repository: str, allow_patterns: Any) -> str:
        self.asked.append((repository, allow_patterns))
        return str(self.root)

    def list_repo_files(self, repository: str) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()]


def test_a_repository_that_is_not_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    client = Client(tmp_path)
    module = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(module, "snapshot_download", client.snapshot_download)
    monkeypatch.setattr(module, "list_repo_files", client.list_repo_files)
    save_file(linear(), tmp_path / "readme.safetensors")
    (tmp_path / "readme.safetensors").unlink()
    with pytest.raises(SaerlError, match="holds no file of an SAE"):
        load_sae("me/mine")
    save_sae(make(hook_layer=2), tmp_path / "layer_2")
    assert load_sae("me/mine/layer_2").layer == 2 and load_sae("me/mine:layer_2").layer == 2
    with pytest.raises(SaerlError, match="a repository of many; name one: me/mine/layer_2, for example"):
        load_sae("me/mine")
    with pytest.raises(SaerlError, match="the hub repository me/mine has no layer_9"):
        load_sae("me/mine/layer_9")
    save_sae(make(hook_layer=1), tmp_path)
    assert load_sae("me/mine").layer == 1
    repository, patterns = client.asked[-1]
    assert repository == "me/mine" and sorted(patterns) == ["cfg.json", "sae_weights.safetensors"]
