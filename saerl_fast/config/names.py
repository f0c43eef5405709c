"""Where a setting is that someone looks for in the wrong place, or by the name it has in another library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Our key: the names of TRL, verl, OpenRLHF and transformers for it.
FOREIGN = {
    "run_dir": "output_dir default_local_dir logging_dir",
    "model.path": "pretrain model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.dtype": "torch_dtype bf16 fp16",
    "model.attn": "attn_implementation",
    "data.train": "prompt_data dataset_name dataset train_files train_dataset",
    "data.eval": "eval_dataset val_files test_files",
    "data.hub_config": "dataset_config",
    "data.split": "dataset_train_split",
    "data.eval_split": "dataset_test_split",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "plan.schedule": "curriculum shuffle shuffle_dataset sampler",
    "train.steps": "max_steps total_training_steps",
    "train.lr": "learning_rate actor_learning_rate",
    "train.warmup_steps": "warmup_ratio lr_warmup_steps num_warmup_steps",
    "train.betas": "adam_beta1 adam_beta2 adam_betas",
    "train.grad_norm": "max_grad_norm grad_clip max_norm",
    "train.micro_tokens": (
        "gradient_accumulation_steps ppo_micro_batch_size_per_gpu max_token_len micro_train_batch_size"
    ),
    "train.reward": "reward_funcs reward_fn reward_function reward_manager",
    "train.save_every": "save_steps save_freq save_strategy",
    "train.keep": "save_total_limit max_actor_ckpt_to_keep",
    "train.trackers": "report_to logger",
    "train.rollout.prompts_per_step": (
        "per_device_train_batch_size train_batch_size generation_batch_size ppo_mini_batch_size batch_size "
        "rollout_batch_size"
    ),
    "train.rollout.group_size": "num_generations num_return_sequences rollout_n n n_samples_per_prompt",
    "train.rollout.max_new_tokens": (
        "max_completion_length max_response_length response_length max_tokens generate_max_len"
    ),
    "train.rollout.engine": "use_vllm vllm_mode",
    "train.rollout.gpu_memory": "vllm_gpu_memory_utilization gpu_memory_utilization",
    "train.loss.kind": "loss_type loss_mode importance_sampling_level policy_loss adv_estimator",
    "train.loss.beta": "kl_coef kl_loss_coef use_kl_loss init_kl_coef",
    "train.loss.clip_low": "epsilon eps_clip clip_ratio clip_ratio_low cliprange",
    "train.loss.clip_high": "epsilon epsilon_high eps_clip clip_ratio clip_ratio_high cliprange",
    "train.loss.importance_cap": "vllm_importance_sampling_cap tis_imp_ratio_cap",
    "train.loss.mask_truncated": "mask_truncated_completions",
    "train.lora.rank": "use_peft lora_r lora_rank r",
    "train.lora.alpha": "lora_alpha",
    "train.lora.targets": "target_modules lora_target_modules",
    "train.eval.every": "eval_steps test_freq eval_strategy",
}
NONE = {  # what there is not, and what to do
    "num_train_epochs": "there are no epochs here; set train.steps",
    "total_epochs": "there are no epochs here; set train.steps",
    "num_episodes": "there are no epochs here; set train.steps",
    "num_iterations": "there is one optimizer step for each batch of rollouts; set train.steps",
    "ppo_epochs": "there is one optimizer step for each batch of rollouts; set train.steps",
    "logging_steps": "every step is logged; train.rollout_log says how many rollouts",
    "lr_scheduler_type": "the learning rate rises over train.warmup_steps, then stays",
    "top_k": "sampling is limited by train.rollout.top_p alone",
    "min_p": "sampling is limited by train.rollout.top_p alone",
    "repetition_penalty": "sampling has a temperature and top_p alone; see train.rollout",
    "gamma": "a completion has one reward; there is no discount",
    "lam": "a completion has one reward; there is no critic",
    "optim": "the optimizer is AdamW; see train.lr, train.betas and train.weight_decay",
}


def place(key: str, keys: Sequence[str]) -> str | None:
    """Where the setting meant by the unknown ``key`` stands among ``keys``, as a sentence; None: no idea."""
    *parents, last = key.replace("-", "_").lower().split(".")
    if last in NONE:
        return NONE[last]
    sections = sorted({at.rpartition(".")[0] for at in keys} - {""})
    every = [*keys, *sections]
    whole = ".".join([*parents, last])
    found = [at for at in every if parents and f".{at}".endswith(f".{whole}")]
    if not found:
        found = [at for at, names in FOREIGN.items() if last in names.split()]
        found += [at for at in every if at.split(".")[-1] == last]
    if not found:  # spelt wrong?
        found = difflib.get_close_matches(whole, every, n=1, cutoff=0.75)
    if not found:
        close = difflib.get_close_matches(last, sorted({at.split(".")[-1] for at in every}), n=1, cutoff=0.75)
        found = [at for at in every if at.split(".")[-1] in close]
    alike = [at for at in found if at.count(".") == len(parents)]
    shared = [sum(part in at.split(".") for part in parents) for at in found]
    if any(shared):
        found = [at for at, count in zip(found, shared, strict=True) if count == max(shared)]
    elif parents and (close := difflib.get_close_matches(whole, alike, n=1, cutoff=0.75)):
        found = close
    found.sort(key=lambda at: (not at.startswith("train"), at.count(".")))
    names = list(dict.fromkeys(found))
    if not names:
        return None
    return f"did you mean {', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]}?"
