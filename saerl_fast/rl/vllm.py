"""Rollouts by vLLM, in this process and on this GPU, with the policy's current weights.

Two engines that hold the same weights still give a token slightly different probabilities, so rollouts of
the one are off-policy for the other. They are therefore corrected by truncated importance sampling, see
``saerl_fast.rl.loss.importance_weights``. vLLM's prefill cannot be observed: features for the plan cost
a forward pass over the prompts. Sampling is seeded per prompt, but exact only as far as vLLM is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import check_fit, max_positions
from saerl_fast.rl import distributed
from saerl_fast.rl.rollouts import Rollouts, decoded, left_pad, stop_tokens
from saerl_fast.rl.seeds import PROMPT, derived_seed

log = logging.getLogger(__name__)


class VllmEngine:
    """A vLLM engine that stands in for ``saerl_fast.rl.generate.generate``.

    ``model`` must come from a folder or hub id that vLLM loads too. Raises SaerlError without vLLM.
    """

    def __init__(self, model: Any, cfg: RolloutConfig) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over in memory
        try:
            from vllm import LLM
        except ImportError:
            raise SaerlError(
                "train.rollout.engine=vllm needs vLLM; run `pip install vllm`, or set engine=transformers"
            ) from None
        together = {"distributed_executor_backend": "external_launcher"} if distributed.size() > 1 else {}
        self.llm = LLM(
            model=model.name_or_path,
            dtype=str(model.dtype).removeprefix("torch."),
            gpu_memory_utilization=cfg.gpu_memory,
            max_model_len=max_positions(model),
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled: temperature, top-p
            **together,
        )
        self._synced: list[int] = []

    def sync(self, model: Any) -> None:
        """Hand the weights over if they have changed since the last time."""
        versions = [parameter._version for parameter in model.parameters()]
        if versions == self._synced:
            return
        target = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        target.load_weights((name, parameter.data) for name, parameter in model.named_parameters())
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'
        self._synced = versions

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        cfg: RolloutConfig,
        *,
        seed: int = 0,
        first: int = 0,
        capture: Any | None = None,
    ) -> Rollouts:
        """As ``saerl_fast.rl.generate.generate``; log-probabilities are vLLM's, after top-p."""
        from vllm import SamplingParams

        check_fit(model, prompts, cfg.max_new_tokens)
        ids, lens = left_pad(prompts, tokenizer.pad_token_id or 0, model.device)
        stops = stop_tokens(model, tokenizer)
        started = time.perf_counter()
        self.sync(model)
        params = [
            SamplingParams(
                n=cfg.group_size,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                max_tokens=cfg.max_new_tokens,
                stop_token_ids=stops,
                seed=derived_seed(seed, PROMPT, first + i),
                logprobs=0,  # the sampled token's alone
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": row} for row in prompts]
        found = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        samples = [s for output in found for s in sorted(output.outputs, key=lambda s: s.index)]
        longest = max(len(s.token_ids) for s in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.long)
        logprobs = torch.zeros(len(samples), longest)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for i, sample in enumerate(samples):
            n = len(sample.token_ids)
            tokens[i, :n] = torch.tensor(list(sample.token_ids))
            each = zip(sample.logprobs, sample.token_ids, strict=True)
            logprobs[i, :n] = torch.tensor([top[token].logprob for top, token in each])
            mask[i, :n] = True
        finished, texts = decoded(tokenizer, tokens, mask, torch.tensor(stops))
        timings = {"generate": time.perf_counter() - started, "capture": 0.0, "encode": 0.0}
        features = None if capture is None else _prefill(model, ids, lens, capture, timings)
        made = Rollouts(ids, lens, tokens, mask, logprobs, texts, finished, cfg.group_size, features, timings)
        return made.to(model.device)


def _prefill(
    model: Any, ids: torch.Tensor, lens: torch.Tensor, capture: Any, timings: dict[str, float]
) -> Any:
    """Features from a forward pass of their own, all of whose time counts as capture."""
    started = time.perf_counter()
    before = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - lens)[:, None]
    with capture:
        model(
            input_ids=ids,
            attention_mask=(before >= 0).long(),
            position_ids=before.clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
    features = capture.features()
    timings["capture"] = time.perf_counter() - started
    return features
