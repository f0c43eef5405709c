from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import pickle
import threading
import typing

import pytest

from saerl_fast import cli
from saerl_fast.config import (
    REWARDS,
    AdaptiveConfig,
    Config,
    DataConfig,
    LossConfig,
    PlanConfig,
    QualityConfig,
    SAEConfig,
    TrainConfig,
    apply_overrides,
    describe,
    from_dict,
    load_config,
    to_dict,
    walk,
)
from saerl_fast.config.names import FOREIGN, NONE
from saerl_fast.errors import SaerlError

SETTINGS = list(walk(Config))  # full key, section, name


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
        ("compare.arms=[a, 'b:train.lr=1']", lambda c: c.compare.arms, ["a", "b:train.lr=1"]),
        ("train.trackers=", lambda c: c.train.trackers, []),
        ("train.steps=9007199254740993", lambda c: c.train.steps, 9007199254740993),
        ("plan.schedule=my.orders:mine", lambda c: c.plan.schedule, "my.orders:mine"),
        ("train.loss.kind=loss.py:mine", lambda c: c.train.loss.kind, "loss.py:mine"),
        ("model.device=cuda:1", lambda c: c.model.device, "cuda:1"),
        ("train.trackers=wandb,tensorboard", lambda c: c.train.trackers, ["wandb", "tensorboard"]),
        ("train.lora.targets=q_proj,v_proj", lambda c: c.train.lora.targets, ["q_proj", "v_proj"]),
        ("diversity.n_clusters=auto", lambda c: c.diversity.n_clusters, "auto"),
        ("diversity.n_clusters=7", lambda c: c.diversity.n_clusters, 7),
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
        ("trian.lr=1", ["trian.lr", "did you mean train.lr?"]),
        ("Train.LR=1", ["Train.LR", "did you mean train.lr?"]),
        ("lr=1", ["config key lr;", "did you mean train.lr, train.warmup.lr or sae.lr?"]),
        ("temperature=1", ["did you mean train.rollout.temperature or train.eval.temperature?"]),
        ("train.group_size=4", ["train.group_size", "did you mean train.rollout.group_size?"]),
        ("rollout.batch_size=4", ["did you mean train.rollout.batch_size?"]),
        ("actor_rollout_ref.rollout.n=4", ["actor_rollout_ref.rollout.n", "mean train.rollout.group_size?"]),
        ("stepz=4", ["did you mean train.steps, train.warmup.steps or sae.steps?"]),
        ("num_train_epochs=1", ["num_train_epochs", "set train.steps"]),
        ("report-to=wandb", ["did you mean train.trackers?"]),
        ("zzz=1", ["zzz", "known keys", "run_dir"]),
        ("train.steps=ten", ["train.steps", "'ten'", "int"]),
        ("train.steps=1.5", ["train.steps", "1.5", "int"]),
        ("train.steps=.inf", ["train.steps", "int"]),
        ("train.steps=true", ["train.steps", "True", "int"]),
        ("train.lr=fast", ["train.lr", "'fast'", "float"]),
        ("train.steps=1e300", ["train.steps", "1e300", "int"]),
        ("plan.schedule=adaptve", ["plan.schedule='adaptve'", "did you mean adaptive?", "vanilla", "medium"]),
        ("plan.schedule=orders:", ["plan.schedule='orders:'", "or module:function"]),
        ("train.eval.mode=gredy", ["did you mean greedy?"]),
        ("diversity.n_clusters=0", ["diversity.n_clusters=0 must be at least 1"]),
        ("diversity.n_clusters=some", ["diversity.n_clusters='some' is not a valid int"]),
        ("diversity.n_clusters=null", ["diversity.n_clusters=None is not a valid int"]),
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
        ("plan.adaptive.features=columns", ["features names columns", "plan.adaptive.columns=["]),
        ("plan.adaptive.columns=task", ["plan.adaptive.columns=task", "features=[columns] alone"]),
        ("train.rollout.screen=1", ["train.rollout.screen=1 must be 0, or at least 2", "group_size=8"]),
        ("train.rollout.screen=8", ["train.rollout.screen=8 must be 0, or at least 2 and below"]),
        ("train.rollout.screen=4", ["screen=4 ends groups early", "plan.schedule=adaptive", "screen=0"]),
        ("train.rollout.temperature=0", ["train.rollout.temperature=0.0", "above 0"]),
        ("train.rollout.top_p=2", ["train.rollout.top_p=2.0 must be above 0 and at most 1"]),
        ("train.betas=0.9,1", ["train.betas=0.9,1.0", "numbers at least 0 and below 1"]),
        ("train.lora.targets=[]", ["train.lora.targets=", "must not be empty"]),
        ("train.lora.targets=", ["train.lora.targets=", "must not be empty"]),
        ("train.lora.targets=a,,b", ["train.lora.targets=a,,b", "must not be empty"]),
        ("train.trackers=wandb,wandb", ["wandb,wandb", "twice"]),
        ("compare.seeds=1,1", ["compare.seeds=1,1", "twice"]),
        ("compare.targets=-3", ["compare.targets=-3.0", "numbers above 0 and at most 1"]),
        ("data.template=no place", ["data.template=no place", "{prompt}"]),
        ("model.device=tpu9", ["model.device=tpu9", "cuda:N"]),
        ("run_dir=", ["run_dir=", "must not be empty"]),
        ("sae.k=2000", ["sae.k=2000 must be at most sae.d_sae=1024"]),
        ("quality.threshold=1.1", ["quality.threshold=1.1 is no probability", "quality.head=ridge"]),
        ("train.rollout.engine=vlm", ["train.rollout.engine='vlm' is unknown", "did you mean vllm?"]),
        ("train=5", ["train is a section", "got 5", "train.steps"]),
        ("model=gpt2", ["model is a section", "'gpt2'", "model.path"]),
        ("train.lr.x=5", ["train.lr is one value, not a section"]),
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
        ("data:\n  template: {prompt}\n", ["data.template is one value"]),
        ("data:\n  id_column: no\n", ["data.id_column=False", "str"]),
        ("data:\n  split: !!set {a, b}\n", ["data.split={", "str"]),
        ("data:\n  split: !!binary aGk=\n", ["data.split=b'hi'", "str"]),
        ("train: &here\n  lr: 1\n  again: *here\n", ["unknown config key train.again"]),
        ("train: &here\n  again: *here\n", ["unknown config key train.again"]),
    ],
)
def test_bad_files_are_one_sentence(write, text, words):
    with pytest.raises(SaerlError) as caught:
        load_config(write(text))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(SaerlError, match="run.yaml is not valid YAML"):
        load_config(path)


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


def leaves(hint) -> set[object]:
    """The plain types in a hint."""
    if typing.get_origin(hint) is typing.Literal:
        return {typing.Literal}
    return set().union(*map(leaves, typing.get_args(hint))) or {hint}


def outside(about, hint) -> list[object]:
    """Values just outside each bound of a setting, and for numbers what no setting may be."""
    kinds = leaves(hint)
    whole = int in kinds
    step = 1 if whole else 1e-6
    found: list[object] = []
    if about.at_least is not None:
        found.append(about.at_least - step)
    if about.above is not None:
        found.append(about.above)
    if about.at_most is not None:
        found.append(about.at_most + step)
    if about.below is not None:
        found.append(about.below)
    if whole or float in kinds:
        found += [math.nan, math.inf, -math.inf, "x"] + ([1e300, 10**300, 0.5] if whole else [])
    if about.choices or typing.Literal in kinds:
        found.append("nonsense")
    return found


@pytest.mark.parametrize(("key", "section", "name"), SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_every_setting_refuses_what_is_just_outside(key, section, name, tmp_path, monkeypatch, capsys):
    about, hint = section.rules[name], section.types[name]
    assert about.meaning and about.meaning in describe(key)
    if leaves(hint) & {int, float}:  # a number without a range: say so here
        free = {"quality.threshold", "compare.target_values", "train.reward_weights", "train.pass_threshold"}
        assert about.range() or key in free
    monkeypatch.chdir(tmp_path)
    origin = typing.get_origin(hint)
    for value in outside(about, hint):
        given = [value] * 2 if origin is tuple else [value] if origin is list else value
        with pytest.raises(SaerlError) as caught:
            section(**{name: given})
        message = str(caught.value)
        assert message.startswith(f"{key}=") and "\n" not in message
        whole = Config()
        owner = functools.reduce(getattr, key.split(".")[:-1], whole)
        for assign in (
            lambda v, o=owner: setattr(o, name, v),
            lambda v, o=owner: dataclasses.replace(o, **{name: v}),
        ):
            with pytest.raises(SaerlError) as caught:
                assign(given)
            assert str(caught.value) == message
        assert whole == Config()
        text = str(value).replace("inf", ".inf").replace("nan", ".nan")
        assert cli.main(["train", f"{key}={text},{text}" if origin is tuple else f"{key}={text}"]) == 2
        said = capsys.readouterr().err.strip()
        assert said == f"saerl: {message}" or "not a valid" in message or origin in (list, tuple), said
        assert said.startswith(f"saerl: {key}=")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "section", "name"), SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_every_setting_takes_its_bounds(key, section, name):
    about, hint = section.rules[name], section.types[name]
    origin = typing.get_origin(hint)
    for bound in (about.at_least, about.at_most):
        if bound is not None and key != "sae.d_sae":  # fewer features than sae.k go by another rule
            given = [bound] * 2 if origin is tuple else [bound] if origin is list else bound
            value = getattr(section(**{name: given}), name)
            assert value == (tuple(given) if origin is tuple else given)


def test_a_value_is_read_as_its_type_wherever_it_is_assigned():
    cfg = TrainConfig(lr="3e-6", betas=[0, 0.5])
    assert (cfg.lr, cfg.betas) == (3e-6, (0.0, 0.5)) and isinstance(cfg.betas[0], float)
    cfg.steps, cfg.trackers = "12", "wandb"
    assert (cfg.steps, cfg.trackers) == (12, ["wandb"])
    assert PlanConfig(adaptive={"svd": 3}).adaptive == AdaptiveConfig(svd=3)
    assert Config(run_dir=pathlib.Path("runs/x")).run_dir == "runs/x"
    assert from_dict(DataConfig, {"split": datetime.date(2026, 1, 2)}).split == "2026-01-02"
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg


def test_mistakes_in_python_are_the_same_sentences():
    cfg = Config()
    for make, words in [
        (lambda: setattr(cfg.train, "lrr", 1), "unknown config key train.lrr; did you mean train.lr?"),
        (lambda: setattr(cfg.train, "lr", "x"), "train.lr='x' is not a valid float"),
        (
            lambda: TrainConfig(learning_rate=1),
            "config key train.learning_rate; did you mean train.lr?",
        ),
        (
            lambda: dataclasses.replace(cfg, output_dir="x"),
            "key output_dir; did you mean run_dir?",
        ),
        (lambda: Config(train={"rollout": {"n": 8}}), "did you mean train.rollout.group_size?"),
        (lambda: setattr(cfg.model, "path", object()), "is not a valid str"),
        (lambda: setattr(cfg.compare, "arms", {"vanilla", "adaptive"}), "is not a valid str"),
        (lambda: setattr(cfg, "train", LossConfig()), "train is a section, not a value (got LossConfig)"),
        (lambda: from_dict(Config, {"train": {"loss": {"kynd": 1}}}), "did you mean train.loss.kind?"),
        (
            lambda: PlanConfig(adaptive={"forgetting": 1.5}),
            "plan.adaptive.forgetting=1.5 must be above 0 and",
        ),
    ]:
        with pytest.raises(SaerlError) as caught:
            make()
        assert words in str(caught.value)
    assert cfg == Config()


def test_settings_that_do_not_go_together_are_refused_and_leave_no_trace():
    cfg = SAEConfig(k=2000, d_sae=4096)  # in either order
    with pytest.raises(SaerlError, match="sae.k=2000 must be at most sae.d_sae=64"):
        cfg.d_sae = 64
    assert (cfg.k, cfg.d_sae) == (2000, 4096)
    assert QualityConfig(head="ridge", threshold=4.0).threshold == 4.0


def test_names_of_other_libraries_lead_to_settings_that_exist():
    keys = {key for key, *_ in SETTINGS}
    names = [name for names in FOREIGN.values() for name in names.split()]
    assert set(FOREIGN) <= keys and not set(names) & set(NONE)
    assert {"num_generations", "n_samples_per_prompt", "max_response_length", "generate_max_len"} <= set(
        names
    )
    for key, names in FOREIGN.items():
        for name in names.split():
            with pytest.raises(SaerlError, match=f"did you mean .*{key}"):
                load_config(None, [f"{name}=1"])
    for name in NONE:
        with pytest.raises(SaerlError, match=f"unknown config key {name}; "):
            load_config(None, [f"{name}=1"])


def test_the_list_of_settings():
    lines = describe().splitlines()
    assert len(lines) == len(SETTINGS)
    (line,) = describe("plan.adaptive.forgetting").splitlines()
    assert line.startswith("plan.adaptive.forgetting=0.995  # ") and line.endswith("above 0 and at most 1")
    assert len(describe("train.loss").splitlines()) == len(LossConfig.rules)
    assert ", ".join(REWARDS) in describe("train.reward")
    with pytest.raises(SaerlError, match="did you mean train.loss"):
        describe("loss")


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


def test_an_override_is_text():
    with pytest.raises(SaerlError, match="override 3 is not of the form key.sub=value"):
        load_config(None, [3])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  lr: 1\n  lr: 2\n", "has the key 'lr' twice in one section"),
        ("seed: 1\nseed: 1\n", "has the key 'seed' twice"),
        ("train.lr: 1\n", "has the key 'train.lr'; write it in its section, as train: {lr: VALUE}"),
        ("seed: 010\n", "holds 010, which YAML reads as another number; write it in decimals"),
        ("compare:\n  seeds: [1, 1:30]\n", "holds 1:30, which YAML reads as another number"),
        ("run_dir: ' '\n", "run_dir=  must not be empty"),
    ],
)
def test_keys_that_yaml_would_pass_over(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SaerlError) as caught:
        load_config(path)
    assert words in str(caught.value) and "not valid YAML" not in str(caught.value)


def test_changes_in_place_are_found_by_a_recheck():
    config = Config()
    config.recheck()
    config.compare.seeds.append(-3)
    with pytest.raises(SaerlError, match="compare.seeds=0,-3 must hold numbers at least 0"):
        config.recheck()


def test_features_that_are_not_kept_cannot_be_read():
    with pytest.raises(SaerlError, match="plan.adaptive.features names scalars.*add it to score.features"):
        load_config(None, ["plan.adaptive.features=scalars"])
    found = load_config(None, ["plan.adaptive.features=scalars,tfidf", "score.features=sae,scalars"])
    assert found.plan.adaptive.features == ["scalars", "tfidf"] and found.difficulty.features is None
    with pytest.raises(SaerlError, match="score.features must hold sae"):
        load_config(None, ["score.features=hidden"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("a\nb", "a ", " a", "a #b", "a\t", "|", "&a b", "!!str a", "{prompt}\n")),
        ('"a\\nb "', "a\nb "),
        ("'a #b'", "a #b"),
    ],
)
def test_text_of_the_command_line_stays_as_it_is(text, value):
    assert load_config(None, [f"data.prompt_column={text}"]).data.prompt_column == value
    assert load_config(None, [f"sae.path={text}"]).sae.path == value


def test_a_config_file_may_be_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    threading.Thread(target=pipe.write_text, args=("seed: 1_0\n",)).start()
    assert load_config(pipe).seed == 10
    with pytest.raises(SaerlError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("compare.seeds=0-3", "compare.seeds=0-3 is no list of numbers; write compare.seeds=0,1,2,3$"),
        ("compare.seeds=[1,4..6]", "compare.seeds=4..6 is no list of numbers; write compare.seeds=4,5,6$"),
        ("compare.seeds=200:299", "write compare.seeds=200,201,.*,211,...$"),
        ("compare.seeds=3-0", "write compare.seeds=0,1$"),
        ("compare.seeds=0 1 2", "compare.seeds=0 1 2 lacks commas; write compare.seeds=0,1,2$"),
        ("compare.targets=.6 .8", "compare.targets=.6 .8 lacks commas; write compare.targets=.6,.8$"),
        ("compare.arms=[vanilla, x: plan.filter=true]", "in quotes or without the blank where it holds ': '"),
        ("compare.seeds=1:3", "write compare.seeds=1,2,3$"),  # 63 to YAML
        ("train.steps=1:30", "train.steps='1:30' is not a valid int"),
        ("train.lr=1:30.5", "train.lr='1:30.5' is not a valid float"),
        ("compare.target_values=.4,0.40", "compare.target_values=0.4,0.4 must not name anything twice"),
        ("compare.targets=.6,.6", "compare.targets=0.6,0.6 must not name anything twice"),
        ("compare.target_values=.4,1.5", "compare.target_values holds 1.5, above any accuracy"),
    ],
)
def test_seeds_and_targets_that_mean_something_else(item, said):
    with pytest.raises(SaerlError, match=said):
        load_config(None, [item])


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("1_000", 1000), ("+7", 7), ("1e2", 100)])
def test_numbers_are_decimal(text, number):
    assert load_config(None, [f"train.steps={text}"]).train.steps == number
    assert load_config(None, [f"compare.seeds=[{text}]"]).compare.seeds == [number]


def test_numbers_in_mappings_stay_numbers():
    given = "data.chat_template_kwargs={a: 3, b: -1.5, c: .5e-3, d: 1:30, e: true, f: 0}"
    found = load_config(None, [given]).data.chat_template_kwargs
    assert found == {"a": 3, "b": -1.5, "c": 0.0005, "d": "1:30", "e": True, "f": 0}


def test_a_reward_of_ones_own_may_pay_more_than_one():
    more = ["compare.target_values=1.5", "train.reward=mine:points"]
    assert load_config(None, more).compare.target_values == [1.5]
    with pytest.raises(SaerlError, match="above any accuracy"):
        load_config(None, [*more, "train.eval.mode=prob"])
