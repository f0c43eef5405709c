"""Log-probabilities and entropies of completion tokens, without the [B, T, V] logits.

The decoder runs on whole sequences; only hidden states that predict a completion token go through the
output head, a chunk at a time, and the chunk's logits are computed again in the backward pass. Peak
memory is one chunk of logits (`CHUNK_ELEMENTS`), whatever the batch and the vocabulary.

Sequences are padded on the right and prompt and completion are adjacent, so causal attention needs no
padding mask: padding comes after everything that is read. Completions of the same prompt can share its
forward and backward pass through a differentiable key-value cache, which for a group of G short answers
to a long prompt is up to G times less work. That a model's attention reads such a cache rightly is checked on
a few rows (see rl/ways.py); a model that does not (positions counted in columns) computes every row whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError, no_memory
from saerl_fast.models.layout import decoder
from saerl_fast.rl.ways import Proof, short, telling_rows, tolerance

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 25  # logits in memory at once: 128 MiB in float32
SHARE_BELOW = 0.7  # share prompts when that leaves at most this part of the tokens to compute
_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_sharing: WeakKeyDictionary[nn.Module, Proof | None] = WeakKeyDictionary()  # None: it must not be done


def micro_batches(lengths: Tensor, max_tokens: int, owner: Tensor | None = None) -> Iterator[Tensor]:
    """Row indices of consecutive micro-batches: rows of similar length, at most ``max_tokens`` with padding.

    ``lengths``: tokens of each sequence [N]. Longest first, so that running out of memory shows at once.
    A row longer than the budget gets a micro-batch of its own. With ``owner`` [N] (ascending, the prompt
    that a row belongs to) a prompt's rows stay together, so that they can share its forward pass.
    """
    if owner is not None and len(owner):  # every row counts as long as the longest of its prompt
        longest = lengths.new_zeros(int(owner.max()) + 1).scatter_reduce(0, owner, lengths, "amax")
        lengths = longest[owner]
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes):
        count = max(1, max_tokens // max(sizes[start], 1))
        yield order[start : start + count]
        start += count


def completion_logprobs(
    model: Any,
    ids: Tensor,
    prompt_lens: Tensor,
    completion_lens: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token at this temperature, both float32 [M].

    ``ids`` [N, L] padded on the right, ``prompt_lens`` and ``completion_lens`` [N]. M is the sum of
    ``completion_lens``: row 0's tokens come first, then row 1's. Log-probabilities carry gradients,
    entropies (zeros when not asked for) do not. ``owner`` [N]: adjacent rows of equal value have the same
    prompt, which is then computed once where that pays.
    """
    ends = prompt_lens + completion_lens
    ids = ids[:, : int(ends.max())]
    column = torch.arange(ids.shape[1], device=ids.device)
    rows, columns = ((column >= prompt_lens[:, None]) & (column < ends[:, None])).nonzero(as_tuple=True)
    targets = ids[rows, columns]
    temperature = temperature or 1.0
    if not plain_head(model):
        logits = model(input_ids=ids, use_cache=False).logits[rows, columns - 1].float() / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy
    core, head = _parts(model)
    rest = (head.weight, head.bias, targets, temperature, with_entropy)
    if owner is not None and _share_pays(model, ids, prompt_lens, completion_lens, owner):
        try:
            found = _HeadLogProbs.apply(
                _shared_hidden(model, core, ids, prompt_lens, completion_lens, owner), *rest
            )
            reason = _fault(model, found[0].detach(), ids, prompt_lens, completion_lens, temperature)
        except Exception as error:  # whatever a model's code raises at a cache with gaps
            if no_memory(error):
                raise
            reason = f"failed ({short(error)})"
        if reason is None:
            return found
        _sharing[_inner(model)] = None
        name = type(_inner(model)).__name__
        log.warning("%s: sharing a prompt's forward pass %s; now computing every row whole", name, reason)
    hidden = core(input_ids=ids, use_cache=False).last_hidden_state[rows, columns - 1]
    return _HeadLogProbs.apply(hidden, *rest)


def _fault(
    model: Any, found: Tensor, ids: Tensor, starts: Tensor, lengths: Tensor, temperature: float
) -> str | None:
    """What is wrong with log-probabilities [M] of rows that shared their prompts, compared with the plain
    forward pass on a few of them; None if nothing is, or sizes such as these have been compared before."""
    proof = _sharing.setdefault(_inner(model), Proof())
    sizes = int((starts + lengths).max()), int(starts.max() - starts.min())
    if proof is None or proof.covers(*sizes):
        return None
    rows = telling_rows(starts, lengths)
    with torch.no_grad():
        options: dict[str, Any] = {"temperature": temperature, "with_entropy": False}
        wanted, _ = completion_logprobs(model, ids[rows], starts[rows], lengths[rows], **options)
    parts = found.split(lengths.tolist())
    pairs = zip(rows.tolist(), wanted.split(lengths[rows].tolist()), strict=True)
    off = max(float((parts[row] - part).abs().mean()) for row, part in pairs)
    if not off <= tolerance(model, temperature) and bool(wanted.isfinite().all()):
        return f"is off by {off:.2g} per token from the plain forward pass"
    proof.extend(*sizes)
    return None


def check_gradient(model: Any) -> None:
    """SaerlError for a model whose code has no backward pass outside of its training mode (dropout), as
    Reformer's reversible layers."""
    embeddings = model.get_input_embeddings()
    ids = (torch.arange(1, 6, device=embeddings.weight.device) % embeddings.weight.shape[0])[None]
    kept: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())  # the gradient of no weight is kept
        return kept[-1].clone()  # which the model may change in place

    handle = embeddings.register_forward_hook(begin)
    try:
        with torch.enable_grad():
            found, _ = completion_logprobs(model, ids, *torch.tensor([[3], [2]], device=ids.device))
            torch.autograd.grad(found.sum(), kept[-1])
    except Exception as error:
        if no_memory(error):
            raise
        raise SaerlError(
            f"{type(_inner(model)).__name__} cannot be trained: its backward pass failed ({short(error)}); "
            "use another model, or another model.attn"
        ) from error
    finally:
        handle.remove()


def plain_head(model: Any) -> bool:
    """Whether the model's logits are just its output layer applied to the last hidden state.

    Models that cap or scale logits (Gemma 2, Cohere, Granite) are told by their configuration, and any
    other by comparing once on a few tokens; they take the full forward pass instead.
    """
    if model not in _plain_heads:
        config = model.config.get_text_config()
        odd = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        core, head = _parts(model)
        plain = type(head) is nn.Linear and all(getattr(config, name, None) in (None, 1) for name in odd)
        if plain:
            ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
            was_training = model.training
            with torch.no_grad():
                model.eval()
                full = model(input_ids=ids, use_cache=False).logits
                try:
                    ours = head(core(input_ids=ids, use_cache=False).last_hidden_state)
                except Exception as error:  # the part that should be the decoder returns something else
                    if no_memory(error):
                        raise
                    ours = full[:0]
                model.train(was_training)
            plain = full.shape == ours.shape and torch.allclose(full, ours, rtol=1e-3, atol=1e-3)
        _plain_heads[model] = plain
    return _plain_heads[model]


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder without its head, and the head; adapters of peft live inside both."""
    inner = _inner(model)
    core = inner.base_model
    if core is inner:  # its class names another attribute than the decoder's (Llama 4)
        core = decoder(inner)[0]
    return core, inner.get_output_embeddings()


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _share_pays(model: Any, ids: Tensor, starts: Tensor, lengths: Tensor, owner: Tensor) -> bool:
    """Whether sharing saves enough, and may work: no sliding windows, no recomputation of activations."""
    from saerl_fast.rl.cache import has_plain_layers

    recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())  # no caches
    if recomputed or not has_plain_layers(model) or _sharing.get(_inner(model), True) is None:
        return False
    prompts = len(owner.unique_consecutive())
    tokens = prompts * int(starts.max()) + len(ids) * (int(lengths.max()) - 1)
    return tokens <= SHARE_BELOW * ids.numel()


def _shared_hidden(
    model: Any, core: Any, ids: Tensor, starts: Tensor, lengths: Tensor, owner: Tensor
) -> Tensor:
    """Hidden states [M, D] that predict the completion tokens: prompts, then completions on their cache.

    Prompts are padded on the right (by the first row's completion), so the padding sits between prompt and
    completion in the cache, where the mask hides it; positions are passed explicitly.
    """
    from transformers import DynamicCache

    from saerl_fast.rl.cache import cache_argument

    _, which, counts = owner.unique_consecutive(return_inverse=True, return_counts=True)
    first, width, longest = counts.cumsum(0) - counts, int(starts.max()), int(lengths.max())
    cache = DynamicCache(config=model.config)
    named = cache_argument(core, cache)
    prefix = core(input_ids=ids[first, :width], **named).last_hidden_state
    hidden = prefix[which, starts - 1][:, None]  # [N, 1, D] predicts each completion's first token
    if longest > 1:
        cache.batch_select_indices(which)
        columns = torch.arange(max(width, longest - 1), device=ids.device)
        positions = (starts[:, None] + columns[: longest - 1]).clamp(max=ids.shape[1] - 1)
        seen = columns[:width] < starts[:, None]
        rest = core(
            input_ids=ids.gather(1, positions),
            attention_mask=torch.cat([seen, torch.ones_like(positions, dtype=torch.bool)], 1).long(),
            position_ids=positions,
            **named,
        ).last_hidden_state
        hidden = torch.cat([hidden, rest], 1)
    return hidden[torch.arange(longest, device=ids.device) < lengths[:, None]]


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b over T) at the target, chunk by chunk; d logits = (onehot - softmax) g / T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [M]
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        normalisers = torch.empty_like(logprobs)
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, bias, temperature)
            normalisers[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - normalisers[part]
            if with_entropy:
                probs = (logits - normalisers[part, None]).exp_()
                entropy[part] = normalisers[part] - torch.einsum("mv,mv->m", probs, logits)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for part in _chunks(hidden, weight):
            scale = grads[0][part, None] / ctx.temperature
            d_logits = _logits(hidden[part], weight, bias, ctx.temperature)
            d_logits = d_logits.sub_(normalisers[part, None]).exp_().mul_(-scale)
            d_logits.scatter_add_(1, targets[part, None], scale)
            low = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = low @ weight
            if d_weight is not None:
                d_weight += low.t() @ hidden[part]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits / temperature


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))
