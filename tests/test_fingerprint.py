"""What a fingerprint covers: the fields of the config say so themselves."""

import json
import os
import pwd

import pytest

from saerl_fast.config import Config, apply_overrides, to_dict, walk
from saerl_fast.records.manifest import digest
from saerl_fast.stages import fingerprint
from saerl_fast.stages.fingerprint import (
    LABELS,
    RUN_SECTIONS,
    SAE_SECTIONS,
    SCORE_SECTIONS,
    changes,
    flat,
    settings,
)

UNCOVERED = {  # where, how fast and what is kept: an old record would no longer fit if one were added
    *("model.device", "model.attn", "model.trust_remote_code"),
    *("score.batch_tokens", "score.shard", "score.backend", "diversity.backend"),
    *("train.micro_tokens", "train.save_every", "train.keep", "train.rollout_log", "train.trackers"),
    *("train.save_model", "train.reward_timeout", "train.lora.merge_dtype"),
    "train.warn_after",
}
FILTER = {"quality.threshold", "quality.filter_ratio"}


def covered(sections, without=()):
    return {key for key, _ in flat(settings(to_dict(Config()), sections, without))}


def test_what_a_run_depends_on():
    every = {key for key, *_ in walk(Config) if key.partition(".")[0] in RUN_SECTIONS}
    assert covered(RUN_SECTIONS) == every - UNCOVERED
    assert covered(RUN_SECTIONS, ("steps",)) == every - UNCOVERED - {"train.steps"}


def test_the_quality_filter_belongs_to_the_plan():
    every = {key for key, *_ in walk(Config) if key.partition(".")[0] in SCORE_SECTIONS}
    assert covered(SCORE_SECTIONS) == every - UNCOVERED - FILTER


def test_changes_are_named_by_their_full_key():
    before = to_dict(Config())
    before["train"]["betas"] = list(before["train"]["betas"])  # as JSON has it
    assert set(LABELS) <= {key for key, *_ in walk(Config)}
    for override, said in [
        ("train.lr=1", "train.lr was 1e-06"),
        ("seed=3", "train.seed was 0, seed was 0"),
        ("plan.adaptive.svd=3", "plan.adaptive.svd was 96"),
        ("train.keep=9", "by name the same, but other prompts, functions or model files"),
    ]:
        assert changes(before, apply_overrides(Config(), [override]), RUN_SECTIONS) == said
    other = apply_overrides(Config(), ["train.reward=numeric", "train.lr=1"])
    assert changes(before, other, SCORE_SECTIONS) == "train.reward was ['exact']"
    assert changes({"train": 3}, Config(), RUN_SECTIONS) == "a record of another version"


def test_an_sae_of_answers_is_another_one():
    with_answers = apply_overrides(Config(), ["score.include_answer=true"])
    one, two = (settings(to_dict(config), SAE_SECTIONS) for config in (Config(), with_answers))
    assert "score" not in one and two == one | {"score": {"include_answer": True}}
    assert changes(to_dict(Config()), with_answers, SAE_SECTIONS) == "score.include_answer was False"
    assert changes(to_dict(with_answers), Config(), SAE_SECTIONS) == "score.include_answer was True"
    assert changes(to_dict(with_answers), Config(), ("model", "data")).startswith("by name the same")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file whose hash is kept."""
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"12")
    os.utime(file, (1, 1))
    monkeypatch.setattr(fingerprint.manifest, "SETTLED", -1e9)
    return file


def test_a_user_without_a_home_folder(weights, monkeypatch):
    """In containers that run under any user id."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert fingerprint._remembered([weights]) == {weights: digest(weights)}


@pytest.mark.parametrize("held", ["", "[" * 100_000, "[]", "null", '{"digests": [], "sha256": "%s"}', "{}"])
def test_a_damaged_cache_is_made_anew(weights, tmp_path, monkeypatch, held):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "saerl-fast" / "digests.json"
    cache.parent.mkdir()
    cache.write_text(held.replace("%s", fingerprint.manifest.json_digest([])))
    assert fingerprint._remembered([weights]) == {weights: digest(weights)}
    assert list(json.loads(cache.read_text())["digests"].values()) == [digest(weights)]
