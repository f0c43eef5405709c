"""The one configuration tree. Every field says all about itself: type, default, meaning, range, and with
``result=False`` that it changes where, how fast or what is kept, but not what comes out.

A missing range means any value of the type. Items of a list have the range of the list's field. The paper
(arXiv 2605.27354) does not publish its hyper-parameters. Every default below is this project's own choice,
tested where ``benchmarks/`` says so, and none should be read as the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from saerl_fast.config.fields import SEED, Section, name_sections, section, setting

Stored = Literal["sae", "sae_mean", "sae_max", "sae_last", "hidden", "scalars", "answer_logprob"]
Kind = Literal[Stored, "text", "tfidf", "length", "answer_text", "random", "none"]
FEATURES = "what the ridge reads; each kind weighs what the labels say for it"
Tracker = Literal["tensorboard", "wandb", "trackio"]
LOSSES = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
LEARNING = ("mopps", "bots", "greso", "oracle", "adaptive")  # from the pass rates of whole groups
SCHEDULES = ("vanilla", "literal", "global", "medium", *LEARNING)
SCREENED = (
    "train.rollout.screen={} ends groups early, and plan.schedule={} learns from the pass rates of whole "
    "ones; choose another order, or train.rollout.screen=0"
)
REWARDS: tuple[str, ...] = ("exact", "numeric", "maths", "maths-boxed", "reasoning-gym")
REWARDS += tuple(f"{name}-think" for name in REWARDS)
DEVICE = ("auto|cpu|mps|(cuda|xpu)(:[0-9]+)?", "be auto, cpu, cuda or cuda:N")
TEMPLATE = (r".*\{prompt\}.*", "hold {prompt}, which says where the prompt goes")


@dataclass
class ModelConfig(Section):
    path: str = setting("", "hub id, local folder, or a .gguf file")
    gguf_file: str | None = setting(None, "name of the GGUF inside the folder or hub repository `path`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N", form=DEVICE, result=False)
    trust_remote_code: bool = setting(False, "run code that comes with the model", result=False)
    attn: str | None = setting(None, "transformers' attn_implementation; null: its default", result=False)


@dataclass
class DataConfig(Section):
    train: str = setting(
        "",
        "hub id, folder, .parquet, .jsonl/.json/.csv/.tsv (also .gz), reasoning-gym:NAME[@LEVEL],... or "
        "module:function[@argument]",
    )
    eval: str | None = setting(None, "the same; null holds out `eval_size` rows of `train`")
    eval_size: int = setting(64, "rows held out, or asked of a data source to evaluate on", at_least=1)
    eval_filter: str | None = setting(None, "hold out only rows where this column is true or above 0")
    limit: int | None = setting(None, "keep the first N training rows", at_least=1)
    eval_limit: int | None = setting(None, "keep the first N evaluation rows", at_least=1)
    size: int = setting(512, "training rows asked of a data source", at_least=1)
    hub_config: str | None = setting(None, 'configuration name of a hub dataset (gsm8k has "main")')
    split: str = setting("train", "of a hub dataset", filled=True)
    eval_split: str = setting("test", "of `eval` when it is a hub dataset", filled=True)
    prompt_column: str = setting("prompt", "text, or chat messages; a path such as a.b will do", filled=True)
    answer_column: str | None = setting("answer", "null for rewards that need no answer")
    id_column: str | None = setting(None, "null numbers the rows")
    drop_null: bool = setting(False, "drop rows without prompt, answer or id; false: refuse them")
    template: str = setting("{prompt}", "wrapped around every prompt text", form=TEMPLATE)
    chat: Literal["auto", "always", "never"] = setting("auto", "auto: if the tokenizer has a chat template")
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "arguments of the chat template, as in {enable_thinking: false}; it must read them"
    )
    prefill: str = setting("", "text that every answer begins with, as part of the prompt")
    max_prompt_tokens: int = setting(512, "longer prompts are dropped, and counted", at_least=1)


@dataclass
class SAEConfig(Section):
    path: str | None = setting(
        None, "folder, file, SAELens release/id or hub id; null: <run_dir>/sae, trained if absent"
    )
    layer: int | None = setting(
        None, "state after so many blocks; null: the SAE's, or the middle", at_least=0
    )
    d_sae: int = setting(1024, "features", at_least=1)
    activation: Literal["topk", "batchtopk"] = setting("topk", "batchtopk: k a token on average over a batch")
    k: int = setting(16, "features active for a token; at most d_sae", at_least=1)
    steps: int = setting(1000, "training steps", at_least=1)
    batch_size: int = setting(1024, "tokens a step", at_least=1)
    lr: float = setting(3e-3, "best of 1e-3 and 3e-3 at d_sae 1024; lower it for much wider ones", above=0)
    aux_k: int = setting(32, "dead features that also explain the residual; 0 turns this off", at_least=0)
    dead_after: int = setting(200, "steps without firing after which a feature counts as dead", at_least=0)
    max_tokens: int = setting(200_000, "activations kept in memory for training", at_least=1)
    stream: bool = setting(
        False, "capture the next max_tokens whenever those in memory are used up; false: the same again"
    )
    normalize: Literal["variance", "none", "layer_norm", "constant_norm_rescale"] = setting(
        "variance", "of inputs: one centre and scale, folded into the weights; or SAELens' for each token"
    )
    init: str | None = setting(None, "SAE to go on from, named as `path` is, with d_sae features")
    sink_ratio: float = setting(10.0, "leave out tokens over so many median norms; 0 keeps all", at_least=0)
    seed: int = setting(0, "of its weights and batches", **SEED)

    def conflict(self) -> str | None:
        if self.path is not None and self.init is not None:
            return f"sae.init={self.init} is for training, and sae.path={self.path} names an SAE; unset one"
        return f"sae.k={self.k} must be at most sae.d_sae={self.d_sae}" if self.k > self.d_sae else None


@dataclass
class ScoreConfig(Section):
    reduce: Literal["max", "mean", "sum", "count", "last"] = setting("max", "over a sequence's tokens")
    batch_tokens: int = setting(8192, "tokens in one prefill", at_least=1, result=False)
    shard: int = setting(
        4096, "prompts saved together; an interrupted pass loses one shard", at_least=1, result=False
    )
    features: list[Stored] = setting(
        ["sae", "sae_mean", "hidden"],
        "kept of the forward pass; scalars and answer_logprob run the blocks after the SAE's layer, too",
        filled=True,
        distinct=True,
    )
    dtype: Literal["auto", "model", "bfloat16"] = setting(
        "auto", "of matrix products; auto: bfloat16 on a CPU that is faster with it, for a wide model"
    )
    include_answer: bool = setting(False, "quality also reads the features of the reference answer")
    backend: str = setting("auto", "of saerl_kernels, or the name of a registered one", result=False)

    def conflict(self) -> str | None:
        return None if "sae" in self.features else "score.features must hold sae, which clusters are made of"


@dataclass
class QualityConfig(Section):
    head: Literal["logistic", "ridge", "none"] = setting("logistic", "of labels 0 and 1; ridge: of a score")
    label_column: str | None = setting(
        "quality_label", "of 0, 1, and null where unknown; no such column, or null: no filter", filled=True
    )
    filter_ratio: float | None = setting(
        None,
        "drop this share with the lowest quality; null: below `threshold`",
        at_least=0,
        below=1,
        result="plan",
    )
    threshold: float = setting(0.5, "a probability of being good (logistic), or a score", result="plan")
    features: list[Kind] | None = setting(
        None, f"{FEATURES}; null: all that are kept, text and length", filled=True, distinct=True
    )
    folds: int = setting(5, "of the held-out figures", at_least=2)
    kind_column: str | None = setting(None, "what is wrong with a bad row; the AUC of each kind is told")
    near: float = setting(
        0.8,
        "cosine of features from which prompts that share most words are copies; 1: not sought",
        above=0,
        at_most=1,
    )

    def conflict(self) -> str | None:
        if self.head == "logistic" and not 0 <= self.threshold <= 1:
            return f"quality.threshold={self.threshold} is no probability; use 0 to 1, or quality.head=ridge"
        return None


@dataclass
class DifficultyConfig(Section):
    label_column: str | None = setting(None, "pass rate in [0, 1], null: unknown; null rolls out a subset")
    n_labels: int = setting(128, "prompts rolled out for labels; 0: none", at_least=0)
    after_warmup: bool = setting(True, "by a copy of the model that went through train.warmup, if any")
    choose: Literal["random", "spread"] = setting("random", "which prompts; spread: those that tell most")
    rollouts: int = setting(4, "per labelled prompt", at_least=1, at_most=1 << 20)
    probe: Literal["ridge", "elasticnet"] = setting("ridge", "elasticnet: the paper's, on SAE features alone")
    features: list[Kind] | None = setting(
        None, f"{FEATURES}; null: all that are kept, text, length and answers'", filled=True, distinct=True
    )
    alpha: float = setting(0.05, "of elasticnet: penalty, as a share of what leaves no coefficient", above=0)
    l1_ratio: float = setting(
        0.2, "of elasticnet: share of the absolute values in the penalty", above=0, at_most=1
    )
    folds: int = setting(5, "of the held-out figures", at_least=2)


@dataclass
class DiversityConfig(Section):
    n_clusters: int | Literal["auto"] = setting(
        16,
        "clusters asked for; a small pool may give fewer; auto: as many as stand out from the null",
        at_least=1,
    )
    look: float = setting(
        0.0,
        "weight of what the look of the text explains (LaTeX, drawings, length); 1: as of all else",
        at_least=0,
        at_most=1,
    )
    features: Literal["auto", "sae"] = setting(
        "auto", "sae: pooled as score.reduce says; auto: their means where score.features keeps sae_mean"
    )
    svd: int = setting(64, "dense dimensions for k-means; 0 clusters the sparse rows themselves", at_least=0)
    polish: int = setting(3, "exact sparse spherical iterations after it", at_least=0)
    n_init: int = setting(4, "starts, of which the best is kept", at_least=1)
    backend: Literal["auto", "cuml", "numba", "sklearn", "torch"] = setting(
        "auto", "of k-means; auto: cuML on a GPU that has it, else by size numba (or sklearn)", result=False
    )
    seed: int = setting(0, "of the starts and the null", **SEED)
    null_rounds: int = setting(3, "feature permutations behind the reported null", at_least=0)


@dataclass
class AdaptiveConfig(Section):
    features: list[Literal[Kind, "columns"]] = setting(
        ["sae"], "what predicts pass rates in the run, of equal weight", filled=True, distinct=True
    )
    columns: list[str] = setting(
        [], "of the pool: features=[columns] tells apart prompts that differ in any of them", distinct=True
    )
    svd: int = setting(96, "components of the features the online regressor sees", at_least=1)
    forgetting: float = setting(0.995, "of the recursive least squares", above=0, at_most=1)
    ridge: float = setting(0.3, "on features scaled to mean squared norm 1", above=0)
    kappa: float | None = setting(
        None, "rollouts that a prediction counts for; null: as many as the run shows", above=0
    )
    fading: float = setting(0.97, "of a prompt's own rollouts, a step", above=0, at_most=1)
    quota: float | None = setting(
        1.5, "of a batch, times its share, one cluster may have at most; null: no limit", at_least=1
    )
    shuffle_clusters: bool = setting(False, "give each prompt another's cluster, a control of the quota")
    uniform: float = setting(
        0.0625, "of a batch drawn uniformly, which the choice has to beat; 0: none", at_least=0, at_most=1
    )
    noise: float = setting(0.05, "Gumbel scale on the chance of a gradient", at_least=0)
    cooldown: int = setting(60, "steps before a prompt may return (fewer in a small pool)", at_least=0)
    refresh_features: bool = setting(True, "replace a prompt's features by those of its rollouts")
    use_labels: bool = setting(True, "start from the pass rates known at scoring time; false starts cold")

    def conflict(self) -> str | None:
        if ("columns" in self.features) == bool(self.columns):
            return None
        if self.columns:
            named = ",".join(self.columns)
            return f"plan.adaptive.columns={named} is read by plan.adaptive.features=[columns] alone"
        return "plan.adaptive.features names columns; say which in plan.adaptive.columns=[task,level]"


@dataclass
class PlanConfig(Section):
    """Which order of prompts, and its settings: the section ``plan``."""

    schedule: str = setting("adaptive", "order of the prompts", choices=SCHEDULES, or_function=True)
    mix: float = setting(
        0.25,
        "share of a batch; literal: exchanged with its neighbours; global: drawn anywhere",
        at_least=0,
        at_most=1,
    )
    window: int = setting(4, "global: batches among which clusters are balanced", at_least=1)
    medium_keep: float = setting(0.6, "medium: share kept around the middle difficulty", above=0, at_most=1)
    filter: bool | None = setting(None, "apply the quality filter; null: yes, except for vanilla")
    drop_copies: Literal["no", "equal", "near"] = setting(
        "no", "equal: prompts whose text occurs before; near: also with other numbers, names or a few words"
    )
    seed: int | None = setting(None, "of the order; null: the training run's seed", **SEED)
    adaptive: AdaptiveConfig = section(AdaptiveConfig)


@dataclass
class RolloutConfig(Section):
    prompts_per_step: int = setting(16, "a batch of the plan", at_least=1)
    group_size: int = setting(8, "rollouts per prompt", at_least=2, at_most=1 << 20)
    screen: int = setting(
        0, "of these first; the rest only where their rewards differ (SPEED); 0: all at once", at_least=0
    )
    max_new_tokens: int = setting(64, "tokens of a completion at most", at_least=1)
    temperature: float = setting(1.0, "of sampling; the loss uses the same", above=0)
    top_p: float = setting(1.0, "nucleus sampling; 1 samples from everything", above=0, at_most=1)
    batch_size: int | None = setting(None, "sequences generated at once; null: all of a step", at_least=1)
    engine: str = setting(
        "transformers",
        "of rollouts, not of evaluations; a class as in rl/engine.py",
        choices=("transformers", "vllm"),
        or_function=True,
    )
    decode: Literal["auto", "dynamic", "static"] = setting(
        "auto", "static: steps of one shape, on a GPU one CUDA graph; auto: static on a GPU that can"
    )
    gpu_memory: float = setting(0.3, "share of the GPU's memory that vLLM may take", above=0, at_most=1)

    def conflict(self) -> str | None:
        if self.screen and not 2 <= self.screen < self.group_size:
            return (
                f"train.rollout.screen={self.screen} must be 0, or at least 2 and below "
                f"train.rollout.group_size={self.group_size}"
            )
        return None


@dataclass
class LossConfig(Section):
    kind: str = setting("dapo", "formulas in rl/loss.py", choices=LOSSES, or_function=True)
    clip_low: float | None = setting(None, "null: the loss's: 0.2; gspo 3e-4; cispo 1 (none)", at_least=0)
    clip_high: float | None = setting(None, "null: the loss's: 0.28; gspo 4e-4; cispo 4", at_least=0)
    beta: float = setting(0.0, "KL to the starting model; 0 keeps no reference model", at_least=0)
    importance_cap: float = setting(2.0, "other engines: bound of the weights; 0: none", at_least=0)
    scale_rewards: bool = setting(True, "divide advantages by the group's deviation (not in dr_grpo)")
    mask_truncated: bool = setting(False, "leave completions cut off at max_new_tokens out of the loss")
    overlong_window: int = setting(
        0, "tokens before max_new_tokens over which the reward falls by up to 1; 0: off", at_least=0
    )


@dataclass
class LoRAConfig(Section):
    rank: int = setting(0, "of the adapters (needs peft); 0 trains all weights", at_least=0)
    alpha: float = setting(32.0, "the adapters' product is scaled by alpha / rank", above=0)
    targets: list[str] = setting(["all-linear"], "module names, or all-linear", filled=True)
    merge_dtype: Literal["float32", "model"] = setting(
        "float32",
        "of the merged model/ of a half-precision model; model: its own, which rounds",
        result=False,
    )


@dataclass
class WarmupConfig(Section):
    steps: int = setting(0, "supervised steps on `prompt -> answer` before GRPO", at_least=0)
    batch_size: int = setting(16, "rows a step", at_least=1)
    lr: float = setting(1e-5, "after the first tenth of the steps", at_least=0, at_most=1e6)
    rows: int | None = setting(None, "how many training rows it may see", at_least=1)


@dataclass
class EvalConfig(Section):
    every: int = setting(10, "steps; 0: only at the end", at_least=0)
    mode: Literal["sample", "greedy", "prob"] = setting(
        "sample", "sample: avg@k; prob: teacher-forced probability of the reference answer"
    )
    samples: int = setting(4, "k of avg@k", at_least=1, at_most=1 << 20)
    temperature: float = setting(1.0, "of sample and prob", above=0)


@dataclass
class TrainConfig(Section):
    steps: int = setting(100, "optimizer steps, one for each batch of rollouts", at_least=0)
    seed: int | None = setting(None, "of sampling and order, not of the data split; null: the run's", **SEED)
    lr: float = setting(1e-6, "about ten times as much with train.lora", at_least=0, at_most=1e6)
    warmup_steps: int = setting(10, "of the learning rate", at_least=0)
    weight_decay: float = setting(0.0, "of AdamW", at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW", at_least=0, below=1)
    grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: not clipped", at_least=0)
    micro_tokens: int = setting(16384, "tokens of a forward/backward", at_least=1, result=False)
    gradient_checkpointing: bool = setting(False, "less memory, more time")
    dynamic_sampling: int = setting(0, "further batches while too few groups have a signal", at_least=0)
    reward: list[str] = setting(
        ["exact"],
        "several are added up; with -think only what follows </think> counts; a function has TRL's signature",
        choices=REWARDS,
        or_function=True,
        filled=True,
    )
    reward_weights: list[float] | None = setting(None, "of several rewards, in their order; null: 1 each")
    reward_truncated: bool = setting(False, "the built-in rewards also pay completions that were cut off")
    pass_threshold: float | None = setting(None, "the reward of a pass, at least; null: clip to [0, 1]")
    warn_after: int = setting(
        5,
        "steps in a row in which something is wrong before it is said; 0: no warnings",
        at_least=0,
        result=False,
    )
    reward_timeout: float = setting(
        0.0,
        "seconds for one call of the reward, in a child process; 0: no limit",
        at_least=0,
        at_most=10**9,
        result=False,
    )
    capture: bool = setting(True, "read features off the rollouts' own prefill, when the plan uses them")
    save_every: int = setting(20, "steps between checkpoints; 0: only at the end", at_least=0, result=False)
    keep: int = setting(2, "checkpoints kept", at_least=1, result=False)
    rollout_log: int = setting(2, "prompts whose rollouts are saved each step", at_least=0, result=False)
    save_model: bool = setting(True, "write the final model to <out_dir>/model", result=False)
    trackers: list[Tracker] = setting([], "besides metrics.jsonl, as [wandb]", distinct=True, result=False)
    loss: LossConfig = section(LossConfig)
    lora: LoRAConfig = section(LoRAConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    warmup: WarmupConfig = section(WarmupConfig)
    eval: EvalConfig = section(EvalConfig)


@dataclass
class CompareConfig(Section):
    arms: list[str] = setting(
        ["vanilla", "adaptive"], "NAME or NAME:key=value;...", filled=True, distinct=True
    )
    seeds: list[int] = setting(
        [0], "of every arm; pairs are compared by seed", **SEED, filled=True, distinct=True
    )
    pools: list[str] = setting(
        [], "NAME=SOURCE, as data.train, or NAME=SOURCE;key=value;...: arms x seeds for each", distinct=True
    )
    targets: list[float] = setting(
        [0.6, 0.8], "shares of the first arm's gain", above=0, at_most=1, filled=True, distinct=True
    )
    pilots: list[int] = setting(
        [],
        "seeds of the first arm that are run before, and whose gain `targets` are of",
        **SEED,
        distinct=True,
    )
    target_values: list[float] | None = setting(
        None, "accuracies registered beforehand; replace `targets` and `pilots`", filled=True, distinct=True
    )
    smooth: int = setting(
        3,
        "evaluations in the mean that is tested against a target; an even number counts as one fewer",
        at_least=1,
    )
    until: bool = setting(
        False, "end runs that are past all targets known before; false: each takes all steps"
    )
    vary_sae: bool = setting(
        False,
        "every seed but the first has an SAE of its own, and scores, in run_dir/draws; one for all is luck",
    )

    def conflict(self) -> str | None:
        if self.until and not self.target_values and not self.pilots and not self.pools:  # with their own
            return (
                "compare.until needs targets that are known beforehand; set compare.target_values, or "
                "compare.pilots"
            )
        return None


@dataclass
class Config(Section):
    """Every setting, as sections; ``load_config`` reads it."""

    run_dir: str = setting("runs/default", "where every stage writes", filled=True, result=False)
    seed: int = setting(0, "of the data split, the labels and, unless train.seed is set, training", **SEED)
    threads: int | None = setting(
        None, "CPU threads; null leaves torch's choice", at_least=1, at_most=4096, result=False
    )
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    sae: SAEConfig = section(SAEConfig)
    score: ScoreConfig = section(ScoreConfig)
    quality: QualityConfig = section(QualityConfig)
    difficulty: DifficultyConfig = section(DifficultyConfig)
    diversity: DiversityConfig = section(DiversityConfig)
    plan: PlanConfig = section(PlanConfig)
    train: TrainConfig = section(TrainConfig)
    compare: CompareConfig = section(CompareConfig)

    def conflict(self) -> str | None:
        asked = {
            "difficulty.features": self.difficulty.features,
            "quality.features": self.quality.features,
            "plan.adaptive.features": self.plan.adaptive.features,
        }
        for key, kinds in asked.items():
            for kind in kinds or ():
                if kind in get_args(Stored) and kind not in self.score.features:
                    return f"{key} names {kind}, which is not kept; add it to score.features"
        most, pays = max(self.compare.target_values or [0]), self.train.reward
        built_in = len(pays) == 1 and pays[0] in REWARDS and not self.train.reward_weights
        if most > 1 and (built_in or self.train.eval.mode == "prob"):
            return f"compare.target_values holds {most:g}, above any accuracy; give shares of 1, as 0.6"
        screen = self.train.rollout.screen
        if screen and self.plan.schedule in LEARNING:
            return SCREENED.format(screen, self.plan.schedule)
        if self.compare.vary_sae and self.sae.path is not None:
            return f"compare.vary_sae trains SAEs, and sae.path={self.sae.path} names one; unset one of them"
        return None


name_sections(Config)
