from __future__ import annotations

import functools

import pytest

from saerl_fast.config import Config, apply_overrides, check_ranges, load_config, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.ranges import RULES


@pytest.fixture
def write(tmp_path):
    def make(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return make


def test_without_a_file_the_defaults_hold():
    assert load_config() == Config()


def test_file_then_overrides_in_order(write):
    path = write("seed: 3\ntrain:\n  lr: 3e-6\n  loss:\n    kind: grpo\n")
    config = load_config(path, ["train.loss.kind=dr_grpo", "seed=4", "seed=5"])
    assert config.train.lr == 3e-6 and isinstance(config.train.lr, float)
    assert (config.train.loss.kind, config.seed) == ("dr_grpo", 5)
    assert config.train.steps == Config().train.steps


@pytest.mark.parametrize("text", ["3e-6", "3E-6", "0.000003", "3.0e-6"])
def test_exponents_that_yaml_reads_as_text(text):
    assert load_config(None, [f"train.lr={text}"]).train.lr == 3e-6


@pytest.mark.parametrize(
    ("item", "get", "value"),
    [
        ("data.template={prompt}", lambda c: c.data.template, "{prompt}"),
        ("data.template=Question: {prompt}", lambda c: c.data.template, "Question: {prompt}"),
        ('data.template="Q: {prompt}"', lambda c: c.data.template, "Q: {prompt}"),
        ("data.train=reasoning-gym:chain_sum@0", lambda c: c.data.train, "reasoning-gym:chain_sum@0"),
        ("run_dir=007", lambda c: c.run_dir, "007"),
        ("data.id_column=no", lambda c: c.data.id_column, "no"),
        ("data.id_column=null", lambda c: c.data.id_column, None),
        ("data.id_column=", lambda c: c.data.id_column, None),
        ("data.limit=1e3", lambda c: c.data.limit, 1000),
        ("plan.filter=false", lambda c: c.plan.filter, False),
        ("compare.arms=vanilla,adaptive", lambda c: c.compare.arms, ["vanilla", "adaptive"]),
        ("compare.arms=[global]", lambda c: c.compare.arms, ["global"]),
        ("compare.seeds=[0, 1]", lambda c: c.compare.seeds, [0, 1]),
        ("compare.seeds=7", lambda c: c.compare.seeds, [7]),
        ("train.betas=0.9,0.95", lambda c: c.train.betas, (0.9, 0.95)),
        ("train.trackers=wandb,tensorboard", lambda c: c.train.trackers, ["wandb", "tensorboard"]),
        ("train.lora.targets=q_proj,v_proj", lambda c: c.train.lora.targets, ["q_proj", "v_proj"]),
        ("plan.adaptive={svd: 8}", lambda c: c.plan.adaptive.svd, 8),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_override_values(item, get, value):
    found = get(load_config(None, [item]))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("train.lrr=1", ["train.lrr", "did you mean train.lr?"]),
        ("trian.lr=1", ["trian", "did you mean train?"]),
        ("zzz=1", ["zzz", "known keys", "run_dir"]),
        ("train.steps=ten", ["train.steps", "'ten'", "int"]),
        ("train.steps=1.5", ["train.steps", "1.5", "int"]),
        ("train.steps=.inf", ["train.steps", "int"]),
        ("train.steps=true", ["train.steps", "True", "int"]),
        ("train.lr=fast", ["train.lr", "'fast'", "float"]),
        ("plan.schedule=adaptve", ["plan.schedule", "'adaptve'", "vanilla", "adaptive"]),
        ("train.betas=0.9", ["train.betas", "0.9"]),
        ("train.capture=1", ["train.capture", "bool"]),
        ("train.trackers=wandb,mlflow", ["train.trackers", "'mlflow'", "trackio"]),
        ("train.lora.rank=-1", ["train.lora.rank=-1"]),
        ("train.dynamic_sampling=-1", ["train.dynamic_sampling=-1"]),
        ("train.loss.kind=ppo", ["train.loss.kind='ppo'", "cispo"]),
        ("train.eval.mode=best", ["train.eval.mode='best'", "greedy"]),
        ("train.lr=nan", ["train.lr='nan'", "float"]),
        ("train.lr=-1", ["train.lr=-1.0", "at least 0"]),
        ("train.reward_timeout=-1", ["train.reward_timeout=-1.0", "at least 0"]),
        ("train.rollout.group_size=1", ["train.rollout.group_size=1", "at least 2"]),
        ("train.rollout.temperature=0", ["train.rollout.temperature=0.0", "above 0"]),
        ("train.rollout.top_p=2", ["train.rollout.top_p=2.0", "between 0 and 1"]),
        ("train.betas=0.9,1", ["train.betas=0.9,1.0", "below 1"]),
        ("train.lora.targets=[]", ["train.lora.targets=", "one or more"]),
        ("train.lora.targets=", ["train.lora.targets=", "one or more"]),
        ("train=5", ["'train'", "mapping", "5"]),
        ("train.lr.x=5", ["train.lr"]),
        ("train.lr", ["'train.lr'", "key.sub=value"]),
        ("=5", ["'=5'", "key.sub=value"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_overrides_are_one_sentence(item, words):
    with pytest.raises(SaerlError) as caught:
        load_config(None, [item])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n- 2\n", ["sections", "list"]),
        ("train: [unclosed\n", ["not valid YAML"]),
        ("data:\n  trian: x\n", ["data.trian", "data.train"]),
    ],
)
def test_bad_files_are_one_sentence(write, text, words):
    with pytest.raises(SaerlError) as caught:
        load_config(write(text))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SaerlError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_empty_file_and_empty_section_mean_defaults(write):
    assert load_config(write("")) == Config()
    config = load_config(write("seed: 1\ntrain:\n"), ["train.steps=7"])
    assert (config.seed, config.train.steps) == (1, 7)
    assert load_config(write("train:\n")) == Config()


def test_configs_survive_a_round_trip_and_copies_are_independent():
    config = load_config(None, ["train.betas=0.8,0.9", "compare.seeds=1,2"])
    again = apply_overrides(config, [])
    assert again == config and again.train is not config.train
    changed = apply_overrides(config, ["train.lr=1e-4"])
    assert changed.train.lr == 1e-4 and config.train.lr == Config().train.lr
    assert to_dict(changed)["train"]["betas"] == (0.8, 0.9)


def test_every_key_with_a_rule_exists():
    assert check_ranges(Config()) == Config()
    for keys, _, _ in RULES:
        for key in keys.split():
            functools.reduce(getattr, key.split("."), Config())


@pytest.mark.parametrize(
    "items",
    [
        ['data.chat_template_kwargs={"enable_thinking": false, "n": 3}'],
        ["data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs.n=3"],
        ["data.chat_template_kwargs={enable_thinking: true}", "data.chat_template_kwargs.n=3"]
        + ["data.chat_template_kwargs.enable_thinking=false"],
    ],
)
def test_a_mapping_is_given_whole_or_by_key(items):
    wanted = {"enable_thinking": False, "n": 3}
    if len(items) < 3:
        assert load_config(None, items).data.chat_template_kwargs == wanted
    config = load_config()
    for item in items:
        config = apply_overrides(config, [item])
    assert config.data.chat_template_kwargs == wanted
    assert apply_overrides(config, ["data.chat_template_kwargs="]).data.chat_template_kwargs == {}
    with pytest.raises(SaerlError, match="chat_template_kwargs='x' must be a mapping"):
        load_config(None, ["data.chat_template_kwargs=x"])


def test_a_mapping_is_part_of_what_a_stage_was_made_from():
    from saerl_fast.stages.fingerprint import SAE_SECTIONS, settings

    one = load_config(None, ["data.chat_template_kwargs.enable_thinking=false"])
    trees = [settings(to_dict(config), SAE_SECTIONS) for config in (one, load_config())]
    assert trees[0] != trees[1]
