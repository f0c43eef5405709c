"""What one forward pass says of a corpus: pooled SAE features and hidden states, and, of a pass through all
blocks, how sure the model is of its answer, of the prompt and of the reference answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import check_fit
from saerl_fast.sae.capture import Progress, check_width, iter_hidden_ids, owned, resolve_layer
from saerl_kernels import CSR

if TYPE_CHECKING:
    from saerl_fast.prompts.own import Spans
    from saerl_fast.sae.model import SAE

WHOLE = ("scalars", "answer_logprob")  # kinds that need every block and the head
LOGITS = 1 << 27  # elements of the logits of one batch
POSITIONS = 256  # whose logits are held in float32

Parts = dict[str, Any]  # name -> CSR [n, d_sae] or float32 [n, columns]


def pooled_features(
    model: nn.Module,
    sae: SAE,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> tuple[CSR, CSR | None]:
    """(prompt features, answer features or None) of `bank_pass`, each CSR float32 [n prompts, d_sae]."""
    kinds = ("sae",) if answers is None else ("sae", "answer")
    found = bank_pass(model, sae, prompts, answers, kinds=kinds, **options)
    return found["sae"], found.get("answer")


def bank_pass(
    model: nn.Module,
    sae: SAE,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    kinds: Iterable[str] = ("sae",),
    own: Sequence[Spans] | None = None,
    layer: int | None = None,
    reduce: str = "max",
    batch_tokens: int = 8192,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    on_progress: Progress | None = None,
) -> Parts:
    """Kind -> features of every prompt, on the CPU: CSR, or float32 [n, columns].

    ======================  ==========================================================================
    sae                     SAE features reduced by ``reduce`` over the prompt's own tokens
    sae_mean, _max, _last   the same by that name; "last" is the token that the answer follows
    hidden                  2 hidden sizes: the mean over own tokens, and the last token's hidden state
    answer                  SAE features over the answer's tokens, read after the prompt
    scalars                 of the next token: entropy, log(1 - largest probability); mean negative
                            log-likelihood of own tokens; log of their number
    answer_logprob          of the answer: sum and mean over tokens, log(1 + number); 0 without answer
    ======================  ==========================================================================

    ``prompts``, ``answers``: token ids, joined, so all comes from one pass: in a causal model the prompt's
    states do not depend on the answer. ``own``: which tokens of each prompt are pooled; None takes all, and
    for ``hidden`` all but the first, on which models put states of another size. The layer defaults to the
    SAE's own; blocks after it run only for ``scalars`` and ``answer_logprob``. ``dtype``: of the matrix
    products (autocast); None: the model's. Raises SaerlError for another width, unequal lengths, an empty
    prompt or states that are not finite.
    """
    kinds = list(dict.fromkeys(kinds))
    check_width(model, sae)
    layer = resolve_layer(model, sae, layer)
    if answers is not None and len(answers) != len(prompts):
        raise SaerlError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    check_fit(model, prompts)
    if answers is None and (needy := {"answer", "answer_logprob"} & set(kinds)):
        raise SaerlError(f"{', '.join(sorted(needy))} need answers; the pool has none")
    if not prompts:
        return {kind: CSR.empty(0, sae.d_sae) for kind in kinds}

    joined = [[*p, *a] for p, a in zip(prompts, answers, strict=True)] if answers is not None else prompts
    parts: dict[str, list[Any]] = defaultdict(list)

    def read(rows: list[int], logits: Tensor) -> None:
        for i, scores in zip(rows, logits, strict=True):
            found = _sure(scores, joined[i], len(prompts[i]), None if own is None else own[i])
            for kind, values in zip(WHOLE, found, strict=True):
                if kind in kinds:
                    parts[kind].append(values)

    whole = bool(set(kinds) & set(WHOLE))
    if whole:
        rows_of = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        batch_tokens = min(batch_tokens, LOGITS // rows_of)
    seen: list[int] = []
    batches = iter_hidden_ids(
        model, joined, layer, batch_tokens, on_progress, dtype=dtype, read=read if whole else None
    )
    for rows, x, offsets in batches:
        starts = offsets[:-1].tolist()
        splits = [start + len(prompts[i]) for start, i in zip(starts, rows, strict=True)]
        for kind in kinds:
            if kind in WHOLE:
                continue
            if kind == "answer":
                ends = offsets[1:].tolist()
                bounds = torch.tensor([0, *(at for pair in zip(splits, ends, strict=True) for at in pair)])
                both = sae.pool(x, bounds, reduce=reduce, backend=backend)
                parts[kind].append(both.to("cpu").select_rows(torch.arange(1, 2 * len(rows), 2)))
                continue
            how = reduce if kind == "sae" else kind.removeprefix("sae_")
            spans: list[Spans]
            if how == "last":
                spans = [(len(prompts[i]) - 1, len(prompts[i])) for i in rows]
            elif own is not None:
                spans = [own[i] for i in rows]
            else:
                skipped = kind == "hidden"
                spans = [(int(skipped and len(prompts[i]) > 1), len(prompts[i])) for i in rows]
            tokens, bounds = owned(x, offsets, spans)
            if kind == "hidden":
                mean = torch.stack([row.float().mean(0) for row in tokens.split(bounds.diff().tolist())])
                last = x[torch.tensor(splits, device=x.device) - 1].float()
                parts[kind].append(torch.cat([mean, last], dim=1).cpu().numpy())
            else:
                parts[kind].append(sae.pool(tokens, bounds, reduce=how, backend=backend).to("cpu"))
        seen += rows
    position = torch.tensor(seen).argsort()
    return {kind: _ordered(parts[kind], position) for kind in kinds}


def _ordered(parts: list[Any], position: Tensor) -> Any:
    if isinstance(parts[0], CSR):
        return CSR.concat(parts).select_rows(position)
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])[position.numpy()]


def _sure(logits: Tensor, ids: Sequence[int], split: int, own: Spans | None) -> tuple[np.ndarray, np.ndarray]:
    """``scalars`` and ``answer_logprob`` of one row, from logits [at least len(ids), V]."""
    following = torch.tensor(ids[1:], device=logits.device)
    found = []
    for at in range(0, len(ids) - 1, POSITIONS):
        part = logits[at : min(at + POSITIONS, len(ids) - 1)].float()
        chosen = part.gather(1, following[at : at + POSITIONS, None])[:, 0]
        found.append(chosen - part.logsumexp(-1))
    logprobs = torch.cat(found).cpu() if found else torch.zeros(0)  # of ids[1:]
    last = logits[split - 1].float().log_softmax(-1)
    spans = (0, split) if own is None else own
    mine = torch.cat([logprobs[max(a - 1, 0) : b - 1] for a, b in zip(spans[::2], spans[1::2], strict=True)])
    entropy = float(-(last.exp() * last).sum())
    others = float(-torch.expm1(last.max()).clamp(max=-1e-6))
    count = sum(spans[1::2]) - sum(spans[::2])
    answer = logprobs[split - 1 :] if len(ids) > split else torch.zeros(0)
    total, size = float(answer.sum()), len(answer)
    scalars = [entropy, np.log(others), float(-mine.mean()) if len(mine) else 0.0, np.log(count)]
    told = [total, total / max(size, 1), np.log1p(size)]
    return np.asarray(scalars, np.float32), np.asarray(told, np.float32)
