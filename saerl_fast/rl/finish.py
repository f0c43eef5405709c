"""The end of a run: the final weights, adapters merged where there are any, and the summary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from saerl_fast.fileio import use_umask, write_json, writing
from saerl_fast.records import manifest
from saerl_fast.records.log import LOGS, write_logs
from saerl_fast.rl import distributed, lora, seeds
from saerl_fast.rl.evaluate import evaluate
from saerl_fast.rl.seeds import derived_seed


def finish(run: Any, step: int) -> dict[str, Any]:
    """Write the final model and the summary of ``run``, a `saerl_fast.rl.trainer.Run` of so many steps."""
    summary = {"schedule": run.plan.schedule, "seed": run.seed, "steps": step}
    warnings = run.health.warnings
    summary |= {"mode": run.cfg.eval.mode, **run.counters, "figures_of": "model/", "warnings": warnings}
    summary["mismatch_steps"] = warnings.get("mismatch", {}).get("steps", 0)
    if warnings:
        told = (f"{name} ({found['steps']} from step {found['first']})" for name, found in warnings.items())
        run.say(f"warnings of training: {', '.join(told)}")
    state = None
    if run.cfg.lora.rank:
        save = partial(run.model.save_pretrained, save_embedding_layers=False)
        distributed.on_first(lambda: _export(run, "adapter", save))
        summary["figures_of"] = "the model with adapter/"
        state, merged = _merge(run)
        summary |= {"merged": merged} if merged else {}

    def write() -> None:
        run.check()
        if state is None:
            _export(run, "model", run.model.save_pretrained)
        else:
            _export(run, "model", partial(lora.save_float32, run.model, state))
        _export(run, "model", run.tokenizer.save_pretrained)
        for name in ("model", "adapter"):
            if (run.out_dir / name).is_dir():
                manifest.record(run.out_dir / name, "model")
        write_json(run.out_dir / "summary.json", summary)
        write_logs(run.out_dir, run.logs.written(), run.counters)
        manifest.record(run.out_dir, "result", (LOGS, "eval_prompts.jsonl", "summary.json"))

    distributed.on_first(write)
    return summary


def _merge(run: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Merge the adapters; float32 weights to be saved instead of the model's own, and the record."""
    half = lora.half_dtype(run.model)
    if half is None:  # float32: the merged model gives the same figures
        run.model = lora.merge(run.model)
        return None, {}
    weights, kept = lora.merged_weights(run.model)
    run.model = lora.merge(run.model, weights)
    seed = derived_seed(run.seed, seeds.EVAL, 0)
    pool = run.session.eval
    found = evaluate(run.model, run.tokenizer, pool, run.reward, run.cfg, seed, run.state)
    dtype = str(half).removeprefix("torch.")
    saved = "float32" if run.cfg.lora.merge_dtype == "float32" else dtype
    record = {"saved_as": saved, "rounded_to": dtype, "change_kept": kept, "accuracy": found.mean}
    run.say(lora.sentence(record, run.counters["accuracy"]))
    return (weights if saved == "float32" else None), record


def _export(run: Any, name: str, write: Callable[[Path], Any]) -> None:
    if run.cfg.save_model:
        with writing(target := run.out_dir / name):
            target.mkdir(exist_ok=True)  # transformers would write nothing to a file, without an error
            write(target)
            for file in target.glob("*.safetensors"):
                use_umask(file)
