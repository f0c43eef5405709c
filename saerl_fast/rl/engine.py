"""Rollouts by another engine, with the policy's current weights. Another engine is one file: see ``rl.vllm``,
and for an engine behind a server examples/own_engine.py.

What an engine has to do is `load` and `sample`; it may also do better than `features`, where its own prefill
can be observed. The rest is the same for all and here. Weights are handed over when they have changed, with
adapters merged in. Then the first rollouts are compared with the policy's own log-probabilities: what an
engine keeps in a form of its own may be left behind without a word. More than ``LIMIT`` ends the run.

Two engines that hold the same weights still give a token slightly different probabilities, so rollouts of the
one are off-policy for the other. They are therefore corrected by truncated importance sampling, see
``saerl_fast.rl.loss.importance_weights``.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saerl_fast import plugins
from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import check_fit
from saerl_fast.rl import lora
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.rollouts import Rollouts, decoded, left_pad, stop_tokens
from saerl_fast.rl.seeds import PROMPT, derived_seed
from saerl_fast.rl.ways import telling_rows, tolerance

# Mean |difference| of log-probabilities after a sync at temperature 1, in float32 (half precision: `ways`).
# Real vLLM 0.32 in float32: 1e-6 when all weights came over, .11 with the old output layer.
LIMIT = 1e-2


KNOWN = {"vllm": "saerl_fast.rl.vllm:VllmEngine"}


class Sample(NamedTuple):
    """One completion: token ids, the end token included, and their log-probabilities."""

    tokens: Sequence[int]
    logprobs: Sequence[float]


class Engine(ABC):
    """Made from (model, RolloutConfig), and given to `train`, which calls `generate`."""

    name: str
    observes = False  # whether `features` come from its own prefill
    capture: Any = None  # of the generation under way, for an engine that observes
    _synced: Sequence[tuple[int, int]] = ()  # id and version of the parameters that it has

    @abstractmethod
    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take over all weights (names as in transformers) and forget keys and values of the old ones."""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[list[int]],
        cfg: RolloutConfig | Sampling,
        seeds: Sequence[int],
        stops: Sequence[int],
    ) -> list[list[Sample]]:
        """``cfg.group_size`` completions of each prompt, by that prompt's seed, ended by one of ``stops``.

        Log-probabilities are of the distribution that was sampled from: temperature, and top-p if any.
        """

    def sync(self, model: Any) -> bool:
        """Hand the weights over if they have changed since the last time; whether they had."""
        versions = [(id(parameter), parameter._version) for parameter in model.parameters()]
        if versions == self._synced:
            return False
        self._synced = []
        self._own("load", lora.weights(model))
        self._synced = versions
        return True

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        cfg: RolloutConfig | Sampling,
        *,
        seed: int = 0,
        first: int = 0,
        capture: Any | None = None,
    ) -> Rollouts:
        """As ``saerl_fast.rl.generate.generate``; log-probabilities are the engine's, after top-p.

        Raises SaerlError when the engine and the policy disagree after a sync. ``timings`` also has "sync".
        """
        check_fit(model, prompts, cfg.max_new_tokens)
        ids, lens = left_pad(prompts, tokenizer.pad_token_id or 0, model.device)
        stops = stop_tokens(model, tokenizer)
        seeds = [derived_seed(seed, PROMPT, first + i) for i in range(len(prompts))]
        times = [time.perf_counter()]
        new = self.sync(model)
        times.append(time.perf_counter())
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.capture = capture
        groups = self._own("sample", prompts, cfg, seeds, stops)
        samples = [self._checked(one, cfg, stops, vocabulary) for one in self._all(groups, len(prompts), cfg)]
        longest = max(len(one.tokens) for one in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.long)
        logprobs = torch.zeros(len(samples), longest)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for i, one in enumerate(samples):
            n = len(one.tokens)
            tokens[i, :n], logprobs[i, :n] = torch.tensor(one.tokens), torch.tensor(one.logprobs)
            mask[i, :n] = True
        finished, texts = decoded(tokenizer, tokens, mask, torch.tensor(stops))
        made = Rollouts(ids, lens, tokens, mask, logprobs, texts, finished, cfg.group_size).to(model.device)
        times.append(time.perf_counter())
        if new:
            self._check(model, made, cfg)
        times.append(time.perf_counter())
        if capture is not None:
            made.features = self._own("features", model, made, capture)
            rows = getattr(made.features, "n_rows", None)
            if rows != len(prompts):
                raise SaerlError(
                    f"{type(self).__qualname__}.features must give a CSR of {len(prompts)} rows, one a "
                    f"prompt; it gave {type(made.features).__name__} of {rows}"
                )
        times.append(time.perf_counter())
        sync, generate, check, features = (b - a for a, b in zip(times, times[1:], strict=False))
        made.timings = {"generate": generate, "sync": sync + check, "capture": features, "encode": 0.0}
        return made

    def _own(self, method: str, *args: Any) -> Any:
        """What the engine's own ``method`` gives; SaerlError, naming both, where it raises."""
        return plugins.call(f"{type(self).__qualname__}.{method}", lambda: getattr(self, method)(*args))

    def _all(self, groups: Any, n: int, cfg: RolloutConfig | Sampling) -> list[Any]:
        """All completions of ``groups``; SaerlError where there are too few or too many."""
        parts = list(groups) if isinstance(groups, Sequence) else type(groups).__name__
        sizes = [len(one) if isinstance(one, Sequence) else type(one).__name__ for one in parts]
        if sizes != [cfg.group_size] * n:
            raise SaerlError(
                f"{type(self).__qualname__}.sample must give {n} lists, one a prompt, of {cfg.group_size} "
                f"completions each; it gave {str(sizes if isinstance(parts, list) else parts):.80}"
            )
        return [one for group in groups for one in group]

    def _checked(
        self, one: Any, cfg: RolloutConfig | Sampling, stops: Sequence[int], vocabulary: int
    ) -> Sample:
        """A completion as plain numbers; SaerlError where `sample` did not keep to its contract."""
        most = cfg.max_new_tokens
        try:
            tokens, logprobs = one
            found = Sample([index(token) for token in tokens], [float(number) for number in logprobs])
        except (TypeError, ValueError):
            raise self._told(f"Sample(token ids, log-probabilities); it gave {one!r:.80}") from None
        tokens, logprobs = found
        got = f"it gave {len(logprobs)} with {str(tokens):.80}"
        if not 1 <= len(tokens) == len(logprobs) <= most or min(tokens) < 0 or max(tokens) >= vocabulary:
            raise self._told(f"1 to {most} tokens below {vocabulary}, with a log-probability for each; {got}")
        ends = [at for at, token in enumerate(tokens) if token in stops]
        if ends[:1] != [len(tokens) - 1] and (ends or len(tokens) < most):
            raise self._told(f"{most} tokens long, or end with its first stop token (one of {stops}); {got}")
        if not all(map(math.isfinite, logprobs)):
            raise self._told(f"finite log-probabilities; it gave {str(logprobs):.80}")
        return found

    def _told(self, what: str) -> SaerlError:
        return SaerlError(f"a completion of {type(self).__qualname__}.sample must be {what}")

    def _check(self, model: Any, made: Rollouts, cfg: RolloutConfig | Sampling) -> None:
        """SaerlError unless a few rollouts have the log-probabilities that the policy gives them.

        They are rollouts of the step itself: in other batches an engine may use another copy of a weight.
        """
        ids, starts, lengths = made.sequences()
        gaps = []
        for row in telling_rows(starts, lengths).tolist():
            part, n = slice(row, row + 1), int(lengths[row])
            sequence = ids[part, : int(starts[row]) + n]
            options: dict[str, Any] = {"temperature": cfg.temperature, "with_entropy": False}
            wanted, _ = completion_logprobs(model, sequence, starts[part], lengths[part], **options)
            gaps.append(made.logprobs[row, :n] - wanted)
        gap = torch.cat(gaps)  # with top-p the engine's are higher, by as much as log(1 / top_p)
        off = float(((-gap).clamp(min=0) + (gap + math.log(cfg.top_p)).clamp(min=0)).mean())
        limit = max(LIMIT / cfg.temperature, tolerance(model, cfg.temperature))
        if not off <= limit:
            self._synced = []
            raise SaerlError(
                f"after a sync the log-probabilities of {self.name} are off by {off:.2g} a token (rounding "
                f"explains {limit:.2g}), so it lacks some of the policy's weights; set "
                f"train.rollout.engine=transformers, or use another version of {self.name}"
            )

    def features(self, model: Any, made: Rollouts, capture: Any) -> Any:
        """What ``capture`` makes of the prompts just sampled: here by a forward pass of its own over them."""
        ids, width = made.prompt_ids, made.prompt_ids.shape[1]
        before = torch.arange(width, device=ids.device) - (width - made.prompt_lens)[:, None]
        with capture:
            model(
                input_ids=ids,
                attention_mask=(before >= 0).long(),
                position_ids=before.clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            )
        return capture.features()


def get_engine(name: str) -> Callable[[Any, RolloutConfig], Engine]:
    """What makes the engine of that name, or of ``module:class``; SaerlError when there is none."""
    return plugins.load_function(KNOWN.get(name, name), "train.rollout.engine", takes=("model", "cfg"))
