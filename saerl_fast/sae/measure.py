"""What an SAE is worth: the variance it explains, a model's loss with it spliced in, how it has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saerl_fast.models.layout import decoder
from saerl_fast.sae.blocks import on_layer
from saerl_fast.sae.capture import check_layer
from saerl_fast.sae.model import SAE

_CE_TOKENS = 2048  # of the spliced forward passes
_LOGITS = 1 << 25  # held at once
MOVED = 0.9  # cosine below which a feature counts as another one


@torch.no_grad()
def measure(sae: SAE, x: Tensor, backend: str = "auto") -> tuple[float, float, Tensor]:
    """(fraction of variance unexplained, features per token, rows each fires on [d_sae]) of x [n, d_in]."""
    mean = x.float().mean(0)
    error = total = active = 0.0
    fired = torch.zeros(sae.d_sae, device=x.device)
    for part in x.split(4096):
        codes = sae.encode(part, backend=backend)
        part = part.float()
        error += float((part - sae.decode(codes, part)).pow(2).sum())
        total += float((part - mean).pow(2).sum())
        found = codes.indices[codes.values > 0].long()
        active += float(len(found))
        fired += torch.bincount(found, minlength=sae.d_sae)
    return error / max(total, 1e-12), active / len(x), fired


@torch.no_grad()
def ce_recovered(
    model: Any, sae: SAE, rows: Sequence[Sequence[int]], layer: int, *, backend: str = "auto"
) -> dict[str, float]:
    """The model's loss on texts (rows of token ids, some 2,048 tokens) with reconstructions in its stream.

    In nats a token: "ce" as it is, "ce_sae" with the hidden states of ``layer`` replaced by the SAE's
    reconstructions (tokens above its ``max_norm`` pass through), "ce_zero" with zeros; and "ce_recovered",
    the share (ce_zero - ce_sae) / (ce_zero - ce), SAELens' ``ce_loss_score``. {} if no text has two tokens.
    """
    chosen, count = [], 0
    for row in rows:
        if len(row) > 1 and count < _CE_TOKENS:
            chosen.append(list(row))
            count += len(row) - 1
    if not chosen:
        return {}
    check_layer(model, layer)

    def spliced(hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, -2)
        made = sae.decode(sae.encode(x, backend=backend), x)
        if sae.cfg.max_norm is not None:
            made = torch.where(x.float().norm(dim=-1, keepdim=True) <= sae.cfg.max_norm, made, x.float())
        return made.to(hidden.dtype).view_as(hidden)

    ce = _loss(model, chosen)
    found = {"ce": ce}
    for name, use in (("ce_sae", spliced), ("ce_zero", torch.zeros_like)):
        handle = on_layer(decoder(model)[1], layer, use)
        try:
            found[name] = _loss(model, chosen)
        finally:
            handle.remove()
    gap = found["ce_zero"] - ce
    if gap > 0:
        found["ce_recovered"] = (found["ce_zero"] - found["ce_sae"]) / gap
    return found


@torch.no_grad()
def feature_drift(old: SAE, new: SAE) -> dict[str, float]:
    """How far features of the same index have moved: "drift_cosine", the mean cosine of their decoder rows,
    and "drift_moved", the share below 0.9."""
    cosines = F.cosine_similarity(old.W_dec, new.W_dec.to(old.W_dec.device), dim=1)
    return {"drift_cosine": float(cosines.mean()), "drift_moved": float((cosines < MOVED).float().mean())}


def _loss(model: Any, rows: list[list[int]]) -> float:
    """Mean negative log-probability of every token but the first of each row."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows, total, count = sorted(rows, key=len, reverse=True), 0.0, 0
    while rows:
        width = len(rows[0])
        many = max(1, _LOGITS // (vocabulary * width))
        batch, rows = rows[:many], rows[many:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        wanted = torch.full((len(batch), width), -100)  # which cross_entropy leaves out
        for at, row in enumerate(batch):
            ids[at, : len(row)] = wanted[at, : len(row)] = torch.tensor(row)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1).float()
        wanted = wanted[:, 1:].flatten()
        total += float(F.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
        count += int((wanted >= 0).sum())
    return total / count
