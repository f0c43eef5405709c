"""``encode_topk`` whose rows have the same bits in every batch: each score is one float32 dot product."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..pack import PackedEncoder
from ..types import TopK
from . import screen, screen_rows, select
from .threads import run

SCORES = 1 << 20  # held at once


def encode_topk_invariant(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """``x`` [n, d_in] prepared. The screen scores by the loop that ``_whole`` runs over all features."""
    encoder = encoder.natural()
    if screen.pays(x, encoder, k):
        return screen.encode_topk(x, encoder, k, _whole)
    return _whole(x, encoder, k)


def _whole(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    values, indices = TopK.empty((x.shape[0], k), "cpu")
    wide, d_sae = x.float().numpy(), encoder.d_sae
    if encoder.dtype == torch.bfloat16:
        score, weight = screen_rows.score_half, screen.bits_of(encoder.weight.detach())
    else:
        score, weight = screen_rows.score_wide, encoder.weight.detach().float().numpy()
    step = max(1, SCORES // d_sae)
    for top in range(0, len(wide), step):
        part = wide[top : top + step]
        rows = np.tile(np.arange(len(part), dtype=np.int32), d_sae)
        slots = np.repeat(np.arange(d_sae, dtype=np.int32), len(part))
        starts = np.arange(d_sae + 1) * len(part)
        scores = np.empty((len(part), d_sae), dtype=np.float32)
        run(score, d_sae, part, weight, encoder.bias.numpy(), starts, rows, slots, scores)
        at = slice(top, top + step)
        select.select_few(scores, k, values[at].numpy().view(np.int32), indices[at].numpy())
    return TopK(values, indices)
