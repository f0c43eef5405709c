"""Pooled SAE features of a corpus: one early-stopped forward pass over prompts (and their answers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from saerl_fast.errors import SaerlError
from saerl_fast.models import check_fit
from saerl_fast.sae.capture import Progress, check_width, iter_hidden_ids, resolve_layer
from saerl_kernels import CSR

if TYPE_CHECKING:
    from saerl_fast.sae.model import SAE


def pooled_features(
    model: nn.Module,
    sae: SAE,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    layer: int | None = None,
    reduce: str = "max",
    batch_tokens: int = 8192,
    backend: str = "auto",
    on_progress: Progress | None = None,
) -> tuple[CSR, CSR | None]:
    """(prompt features, answer features or None), each CSR float32 [n prompts, d_sae] on the CPU.

    ``prompts`` and ``answers`` are token ids. They are joined, so both come from one forward pass: in a
    causal model the prompt's hidden states do not depend on the answer. Answer rows pool the answer's
    tokens only (read after the prompt); an empty answer gives an empty row. The layer defaults to the
    SAE's own. Raises SaerlError for another width, unequal lengths, an empty prompt or bad activations.
    """
    check_width(model, sae)
    layer = resolve_layer(model, sae, layer)
    if answers is not None and len(answers) != len(prompts):
        raise SaerlError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    check_fit(model, prompts)
    if not prompts:
        none = CSR.empty(0, sae.d_sae)
        return none, None if answers is None else none

    seen: list[int] = []
    parts: list[CSR] = []
    joined = [[*p, *a] for p, a in zip(prompts, answers, strict=True)] if answers is not None else prompts
    for rows, x, offsets in iter_hidden_ids(model, joined, layer, batch_tokens, on_progress):
        if answers is not None:  # two segments a row: starts of the prompts, starts of the answers, the end
            starts = offsets[:-1]
            split = starts + torch.tensor([len(prompts[i]) for i in rows], device=starts.device)
            offsets = torch.cat([torch.stack([starts, split], dim=1).flatten(), offsets[-1:]])
        parts.append(sae.pool(x, offsets, reduce=reduce, backend=backend).to("cpu"))
        seen += rows

    pooled = CSR.concat(parts)
    position = torch.empty(len(seen), dtype=torch.long)
    position[torch.tensor(seen)] = torch.arange(len(seen))
    if answers is None:
        return pooled.select_rows(position), None
    return pooled.select_rows(2 * position), pooled.select_rows(2 * position + 1)
