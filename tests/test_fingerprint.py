"""What a fingerprint covers: the fields of the config say so themselves."""

from saerl_fast.config import Config, apply_overrides, to_dict, walk
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
        ("train.keep=9", "the same settings, but other prompts, functions or model files"),
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
    assert changes(to_dict(with_answers), Config(), ("model", "data")).startswith("the same settings")
