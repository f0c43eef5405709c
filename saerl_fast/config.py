"""The one configuration tree: dataclasses, read from YAML, overridden by ``key.sub=value``.

The paper (arXiv 2605.27354) does not publish its hyper-parameters. Every default below is this
project's own choice, tested where ``benchmarks/`` says so, and none should be read as the paper's.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from saerl_fast.errors import SaerlError
from saerl_fast.ranges import RULES

Tracker = Literal["tensorboard", "wandb", "trackio"]
Loss = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]
Schedule = Literal["vanilla", "literal", "global", "medium", "adaptive"]
Section = TypeVar("Section")


@dataclass
class ModelConfig:
    path: str = ""  # hub id, local folder, or a .gguf file
    gguf_file: str | None = None  # name of the GGUF inside the folder or hub repository `path`
    # auto: float32 on a CPU, bfloat16 on a GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    trust_remote_code: bool = False  # run code that comes with the model
    attn: str | None = None  # transformers' attn_implementation; None leaves its default


@dataclass
class DataConfig:
    train: str = ""  # hub id, local .parquet/.jsonl/.json/.csv, or "reasoning-gym:NAME[@LEVEL],..."
    eval: str | None = None  # the same; None holds out `eval_size` rows of `train`
    eval_size: int = 64  # rows held out, or generated for a reasoning-gym evaluation
    eval_filter: str | None = None  # hold out only rows where this column is true or above 0 (null: no)
    limit: int | None = None  # keep the first N training rows
    eval_limit: int | None = None  # keep the first N evaluation rows
    size: int = 512  # rows to generate for a reasoning-gym spec
    hub_config: str | None = None  # configuration name of a hub dataset (gsm8k has "main")
    split: str = "train"  # of a hub dataset
    eval_split: str = "test"  # of `eval` when it is a hub dataset
    prompt_column: str = "prompt"  # text, or a list of chat messages
    answer_column: str | None = "answer"  # None for rewards that need no answer
    id_column: str | None = None  # None numbers the rows
    template: str = "{prompt}"  # wrapped around every prompt text
    chat: Literal["auto", "always", "never"] = "auto"  # auto: when the tokenizer has a chat template
    # arguments of the chat template, e.g. {enable_thinking: false}; those it does not read are refused
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    prefill: str = ""  # text that every answer begins with: the end of the prompt, no part of a completion
    max_prompt_tokens: int = 512  # longer prompts are dropped, and counted


@dataclass
class SAEConfig:
    path: str | None = None  # SAELens or sparsify folder; None uses <run_dir>/sae, training it if absent
    layer: int | None = None  # hidden state after this many blocks; None: the SAE's own, else the middle
    d_sae: int = 1024  # features
    activation: Literal["topk", "batchtopk"] = "topk"  # batchtopk: k features a token on average over a batch
    k: int = 16  # features active for a token
    steps: int = 1000  # training steps
    batch_size: int = 1024  # tokens a step
    lr: float = 3e-3  # best of 1e-3 and 3e-3 at 1,024 features; lower it for much wider dictionaries
    aux_k: int = 32  # dead features that also explain the residual; 0 turns this off
    dead_after: int = 200  # steps without firing after which a feature counts as dead
    max_tokens: int = 200_000  # activations kept in memory for training
    sink_ratio: float = 10.0  # tokens of more than this times the median norm are left out; 0 keeps all
    seed: int = 0


@dataclass
class ScoreConfig:
    reduce: Literal["max", "mean"] = "max"  # over a sequence's tokens
    batch_tokens: int = 8192  # tokens in one prefill
    shard: int = 4096  # prompts whose features are saved together; an interrupted pass loses one shard
    include_answer: bool = True  # quality also reads the features of the reference answer
    backend: Literal["auto", "triton", "torch", "numba"] = "auto"  # of saerl_kernels


@dataclass
class QualityConfig:
    head: Literal["logistic", "ridge", "none"] = "logistic"  # logistic (labels 0/1), ridge (a score), none
    label_column: str = "quality_label"  # null where a row is unlabelled; absent column: no filter
    filter_ratio: float | None = None  # drop this share with the lowest quality; None: below `threshold`
    threshold: float = 0.5  # a probability of being good (logistic), or a score (ridge)
    c: float = 10.0  # inverse regularisation, both heads
    folds: int = 5  # of the held-out figures


@dataclass
class DifficultyConfig:
    label_column: str | None = None  # pass rate in [0, 1], null where unknown; None rolls out a subset
    n_labels: int = 128  # prompts rolled out for labels, by the model as it is before any warm-up; 0: none
    rollouts: int = 4  # per labelled prompt
    alpha: float = 0.05  # ElasticNet penalty, as a share of the smallest that leaves no coefficient
    l1_ratio: float = 0.2  # share of the absolute values in the ElasticNet penalty
    folds: int = 5  # of the held-out figures


@dataclass
class DiversityConfig:
    n_clusters: int = 16
    svd: int = 64  # dense dimensions for k-means; 0 clusters the sparse rows themselves
    polish: int = 3  # exact sparse spherical iterations after it
    n_init: int = 4  # starts, of which the best is kept
    seed: int = 0
    null_rounds: int = 3  # feature permutations behind the reported null


@dataclass
class AdaptiveConfig:
    svd: int = 96  # components of the pooled features the online regressor sees
    forgetting: float = 0.995  # of the recursive least squares
    ridge: float = 0.3  # on features scaled to mean squared norm 1
    target_start: float = 0.75  # predicted pass rate aimed at first ...
    target_end: float = 0.40  # ... and at the end of the run
    noise: float = 0.05  # Gumbel scale on the distance to the target
    cooldown: int = 60  # steps before a prompt may return (shortened when the pool is small)
    refresh_features: bool = True  # replace a prompt's features by those captured during its rollouts
    use_labels: bool = True  # start from the pass rates known at scoring time; false starts cold


@dataclass
class PlanConfig:
    schedule: Schedule = "adaptive"
    mix: float = 0.25  # literal: share of a batch exchanged with its neighbours; global: share drawn anywhere
    window: int = 4  # global: batches among which clusters are balanced
    medium_keep: float = 0.6  # medium: share of prompts kept around the middle of predicted difficulty
    filter: bool | None = None  # apply the quality filter; None: yes, except for vanilla
    seed: int | None = None  # of the order; None: the training run's seed
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)


@dataclass
class RolloutConfig:
    prompts_per_step: int = 16  # a batch of the plan
    group_size: int = 8  # rollouts per prompt
    max_new_tokens: int = 64
    temperature: float = 1.0  # of sampling; the loss uses the same
    top_p: float = 1.0  # nucleus sampling; 1 samples from everything
    batch_size: int | None = None  # sequences generated at once; None: all of a step
    engine: Literal["transformers", "vllm"] = "transformers"  # of training rollouts, not of evaluations
    # static: steps of one shape, on a GPU one CUDA graph; auto: static on a GPU, where the model allows
    decode: Literal["auto", "dynamic", "static"] = "auto"
    gpu_memory: float = 0.3  # share of the GPU's memory that vLLM may take


@dataclass
class LossConfig:
    kind: Loss = "dapo"  # formulas in rl/loss.py
    clip_low: float | None = None  # None: the loss's own, 0.2; gspo 3e-4; cispo 1 (none)
    clip_high: float | None = None  # None: the loss's own, 0.28; gspo 4e-4; cispo 4
    beta: float = 0.0  # KL to the starting model; 0 keeps no reference model
    importance_cap: float = 2.0  # engine=vllm: bound of the importance weights; 0: no correction
    scale_rewards: bool = True  # divide advantages by the group's standard deviation (not in dr_grpo)
    mask_truncated: bool = False  # leave completions cut off at max_new_tokens out of the loss
    overlong_window: int = 0  # tokens before max_new_tokens over which the reward falls by up to 1; 0: off


@dataclass
class LoRAConfig:
    rank: int = 0  # of the adapters (needs peft); 0 trains all weights
    alpha: float = 32.0  # the adapters' product is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # module names, or all-linear


@dataclass
class WarmupConfig:
    steps: int = 0  # supervised steps on `prompt -> answer` before GRPO
    batch_size: int = 16
    lr: float = 1e-5
    rows: int | None = None  # how many training rows it may see


@dataclass
class EvalConfig:
    every: int = 10  # steps; 0: only at the end
    # sample (avg@k), greedy, prob (teacher-forced probability of the reference answer)
    mode: Literal["sample", "greedy", "prob"] = "sample"
    samples: int = 4  # k of avg@k
    temperature: float = 1.0


@dataclass
class TrainConfig:
    steps: int = 100  # optimizer steps, one for each batch of rollouts
    seed: int | None = None  # of sampling and order; None: the run's seed. The data split keeps the latter
    lr: float = 1e-6  # about ten times as much with train.lora
    warmup_steps: int = 10  # of the learning rate
    weight_decay: float = 0.0  # of AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not clipped
    micro_tokens: int = 16384  # tokens of a forward/backward
    gradient_checkpointing: bool = False  # less memory, more time
    dynamic_sampling: int = 0  # further plan batches a step may draw while too few groups have a signal
    reward: str = "exact"  # exact, numeric, maths, reasoning-gym, or module:function (TRL's signature)
    reward_timeout: float = 0.0  # seconds one call of the reward may take; 0: no limit
    capture: bool = True  # read features off the rollouts' own prefill, when the plan makes use of them
    save_every: int = 20  # steps between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    rollout_log: int = 2  # prompts whose rollouts are saved each step
    save_model: bool = True  # write the final model to <out_dir>/model, for from_pretrained
    trackers: list[Tracker] = field(default_factory=list)  # besides metrics.jsonl, e.g. [wandb]
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass
class CompareConfig:
    arms: list[str] = field(default_factory=lambda: ["vanilla", "adaptive"])  # NAME or NAME:key=value;...
    seeds: list[int] = field(default_factory=lambda: [0])  # of every arm; pairs are compared by seed
    targets: list[float] = field(default_factory=lambda: [0.6, 0.8])  # shares of the first arm's gain
    target_values: list[float] | None = None  # accuracies registered beforehand; replace `targets`
    smooth: int = 3  # evaluations in the running mean that is tested against a target


@dataclass
class Config:
    run_dir: str = "runs/default"  # where every stage writes
    seed: int = 0  # of the data split, the labels and, unless train.seed is set, training
    threads: int | None = None  # CPU threads; None leaves torch's choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file (or none) and apply ``key.sub=value`` overrides, in order.

    Raises SaerlError on a missing file, an unknown key or a value of the wrong type.
    """
    try:
        import yaml
    except ImportError:
        raise SaerlError(
            "the commands need more than the kernels do; run `pip install saerl-fast[rl]`"
        ) from None

    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise SaerlError(f"config file {file} does not exist; pass an existing YAML file to --config")
        try:
            loaded = yaml.safe_load(file.read_text())
        except yaml.YAMLError as err:
            raise SaerlError(f"config file {file} is not valid YAML: {' '.join(str(err).split())}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise SaerlError(f"config file {file} must hold sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    return check_ranges(_build(Config, _override(tree, overrides), ""))


def apply_overrides(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A copy of ``config`` with ``key.sub=value`` items applied in order; errors as in `load_config`."""
    return check_ranges(_build(Config, _override(to_dict(config), overrides), ""))


def to_dict(config: Any) -> dict[str, Any]:
    """A config (or a section) as plain values, as written beside a run's results."""
    return dataclasses.asdict(config)


def _override(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise SaerlError(f"override {item!r} is not of the form key.sub=value")
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            if node.get(name) is None:  # absent, or an empty section of the file
                node[name] = {}
            child = node[name]
            if not isinstance(child, dict):
                raise SaerlError(f"override {item!r}: {name!r} is a value, not a section")
            node = child
        node[leaf] = _Override(text)
    return tree


class _Override(str):
    """The text of a ``key=value`` argument, read as YAML only where the field is not plain text."""

    def parsed(self) -> Any:
        import yaml

        try:
            return yaml.safe_load(self) if self else ""
        except yaml.YAMLError:
            return str(self)


def _build(cls: type, tree: Any, where: str) -> Any:
    tree = tree.parsed() if isinstance(tree, _Override) else tree
    if tree is None:  # a section without keys
        return cls()
    if not isinstance(tree, dict):
        raise SaerlError(f"config section {where.rstrip('.')!r} must be a mapping, got {tree!r}")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        import difflib

        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f"did you mean {where}{close[0]}?" if close else f"known keys: {', '.join(hints)}"
        raise SaerlError(f"unknown config key {where}{unknown[0]}; {hint}")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, f"{where}{key}.")
        else:
            values[key] = _coerce(value, hint, f"{where}{key}")
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the field's type; PyYAML reads 3e-6 as a string, so numbers are parsed here too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Override):
        parsed = value.parsed()
        # A template such as {prompt}, or "Question: {prompt}", is valid YAML for a mapping: keep the text.
        optional = origin in (Union, types.UnionType) and str in args
        keep = hint is str or (optional and parsed is not None)
        value = str(value) if keep and not isinstance(parsed, str) else parsed
    if origin in (Union, types.UnionType):
        if value is None or (value == "" and type(None) in args):
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is dict:
        if value in (None, ""):
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise SaerlError(f"{where}={value!r} must be a mapping of names to values")
        return {key: _plain(part) for key, part in value.items()}
    if origin is Literal:
        if value in args:
            return value
        raise SaerlError(f"{where}={value!r} is unknown; choose one of {', '.join(map(str, args))}")
    try:
        if origin in (list, tuple):
            items = value.split(",") if isinstance(value, str) else value
            items = items if isinstance(items, (list, tuple)) else [items]
            parsed = [_coerce(item, args[min(i, len(args) - 1)], where) for i, item in enumerate(items)]
            if origin is tuple and len(parsed) != len(args):
                raise ValueError
            return origin(parsed)
        if hint is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if hint is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value)) if isinstance(value, str) else int(value)
        if hint is float:
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if hint is str:
            if value is None or isinstance(value, (dict, list)):
                raise ValueError
            return str(value)
    except SaerlError:  # of an item of a list
        raise
    except (ValueError, TypeError, OverflowError):
        wanted = getattr(hint, "__name__", None) if origin is None else str(hint)
        raise SaerlError(f"{where}={value!r} is not a valid {wanted}") from None
    return value


def _plain(value: Any) -> Any:
    """A free value of a mapping, with what came from the command line read as YAML."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.parsed() if isinstance(value, _Override) else value


def check_ranges(section: Section, where: str = "") -> Section:
    """``section`` itself, whose key is ``where``; SaerlError for values that no stage could work with."""
    for name, hint in typing.get_type_hints(type(section)).items():
        key, value = where + name, getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif typing.get_origin(hint) is Literal:
            _coerce(value, hint, key)
        elif value is not None:
            for keys, rule, holds in RULES:
                if key in keys.split() and not holds(value):
                    shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                    raise SaerlError(f"{key}={shown} must be {rule}")
    return section


def from_dict(cls: type, tree: Any, where: str = "") -> Any:
    """The inverse of :func:`to_dict` for the config class ``cls``; SaerlError on unknown or wrong values."""
    return _build(cls, tree, where)
