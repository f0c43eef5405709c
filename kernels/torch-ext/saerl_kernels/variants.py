"""Other selections made of the same parts: AbsTopK, GroupMax, and a dictionary spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import _torch
from ._check import check_k, need_encoder
from .dispatch import implementation, resolve
from .encode import encode_topk
from .library import ENCODER_SCHEMA, encode_fake, register
from .pack import PackedEncoder
from .types import TopK, need_tensors

LAST = (1 << 31) - 1


@dataclass(frozen=True, eq=False, repr=False)
class _BothSigns(PackedEncoder):
    """What ``pack_both_signs`` makes, so that no plain encoder is taken for it."""


def pack_both_signs(encoder: PackedEncoder) -> PackedEncoder:
    """The encoder of ``encode_abs_topk``: every feature beside its negative, twice the memory."""
    need_encoder(encoder)
    plain = encoder.natural()
    weight = torch.stack([plain.weight, -plain.weight], dim=1).reshape(-1, plain.d_in)
    bias = torch.stack([plain.bias, -plain.bias], dim=1).reshape(-1)
    return _BothSigns(
        weight, bias, None, plain.normalize_activations, None, plain.permute, plain.seed
    )._permuted()


def encode_abs_topk(x: Tensor, both: PackedEncoder, k: int, *, backend: str = "auto") -> TopK:
    """AbsTopK: the k pre-activations of largest magnitude, with their signs.

    Args:
        x: [..., d_in].
        both: from ``pack_both_signs``; a product of twice the features is what it costs.
        k: 1 .. d_sae.

    Returns values float32 [..., k], falling in magnitude, and indices int32 [..., k]; of equal magnitudes the
    lower feature comes first. Only features other than 0 are selected: a row with fewer is filled up with 0.0
    at low features, which may be among the selected ones. Raises ValueError for another encoder.
    """
    if not isinstance(both, _BothSigns):
        raise ValueError(f"both is {both!r:.80}; give pack_both_signs(encoder), made once")
    check_k(k, both.d_sae // 2)
    values, indices = encode_topk(x, both, k, backend=backend)
    negative = indices % 2 == 1
    return TopK(torch.where(negative & (values > 0), -values, values), indices // 2)


def encode_group_max(x: Tensor, encoder: PackedEncoder, k: int, *, backend: str = "auto") -> TopK:
    """GroupMax: the largest activation of each of k equal groups of neighbouring features.

    Args:
        x: [..., d_in].
        k: a divisor of d_sae: the number of groups.

    Returns values float32 [..., k] (0.0 for a group without a positive activation, at its first feature) and
    indices int32 [..., k], in the order of the groups; of equal values the lower feature. Ranked in float32.
    """
    need_encoder(encoder)
    check_k(k, encoder.d_sae)
    if encoder.d_sae % k:
        raise ValueError(f"k={k} must divide d_sae={encoder.d_sae} into equal groups")
    rows, parts = encoder.prepare(x), (encoder.weight, encoder.bias, encoder.permutation)
    values, indices = _group_max_op(rows, *parts, k, backend)
    shape = (*x.shape[:-1], k)
    return TopK(values.reshape(shape), indices.reshape(shape))


def _group_max(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], k: int, backend: str
) -> Tuple[Tensor, Tensor]:
    name = resolve(backend, x.device)
    encoder = PackedEncoder(weight, bias, permutation=permutation)
    kept = TopK.empty((x.shape[0], k), x.device)
    first = torch.arange(k, device=x.device) * (encoder.d_sae // k)
    module = implementation("torch" if name == "reference" else name)
    blocks = _torch.score_chunks(x, encoder.natural()) if x.shape[0] else ()
    for start, scores in blocks:
        scores = torch.where(scores > 0, scores, 0.0)  # a NaN counts as 0
        best = module.topk(scores.view(-1, encoder.d_sae // k), 1)
        at = slice(start, start + len(scores))
        kept.values[at] = best.values.view(-1, k)
        kept.indices[at] = (best.indices.view(-1, k) + first).int()
    return kept.values, kept.indices


_group_max_op = register("encode_group_max", _group_max, ENCODER_SCHEMA, encode_fake, True)


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """The top k of a dictionary from those of its shards, exactly as ``encode_topk`` has them of the whole.

    parts: for each shard the min(k, its features) largest ([..., k_i], any order), with indices in the whole
    dictionary's numbering and values that are not negative. Ties and fillers come out as for the whole,
    because every entry of the answer is among those of its shard. Raises ValueError for what does not fit.
    """
    if isinstance(parts, TopK) or not parts or not all(isinstance(part, TopK) for part in parts):
        raise ValueError("parts must be a list of one TopK or more, one of each shard")
    if len({part.values.shape[:-1] for part in parts}) > 1:
        shapes = [tuple(part.values.shape) for part in parts]
        raise ValueError(f"parts are of different rows: their shapes are {shapes}; encode the same x")
    for part in parts:
        need_tensors(values=part.values, indices=part.indices)
    values = torch.cat([part.values for part in parts], dim=-1)
    indices = torch.cat([part.indices for part in parts], dim=-1).long()
    check_k(k, values.shape[-1], "the number of entries in all parts")
    keys = values.float().view(torch.int32).long() * (LAST + 1) + (LAST - indices)
    keys = keys.topk(k, dim=-1, sorted=True).values
    bits = torch.div(keys, LAST + 1, rounding_mode="floor").int()
    return TopK(bits.view(torch.float32), (LAST - keys % (LAST + 1)).int())


def encode_topk_sharded(
    x: Tensor, shard: PackedEncoder, first: int, k: int, *, group: Optional[Any] = None, backend: str = "auto"
) -> TopK:
    """``encode_topk`` of a dictionary whose features lie on several processes (torch.distributed).

    Args:
        x: [..., d_in], the same on every process.
        shard: this process's features, a stretch of the dictionary.
        first: the number of its first feature in the whole dictionary; the stretches do not overlap.
        k: 1 .. all features.
        group: the process group; None: the default one.

    Returns the same ``TopK`` on every process, equal to that of the whole. Each sends min(k, its features)
    entries of 8 bytes a row, so shards of different sizes are padded to the largest. Raises ValueError, on
    every process, for stretches that overlap.
    """
    import torch.distributed as dist

    own = encode_topk(x, shard, min(k, shard.d_sae), backend=backend)
    width = torch.tensor([own.values.shape[-1], shard.d_sae, first], device=x.device)
    widths = [torch.empty_like(width) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, width, group=group)
    check_k(k, sum(int(w[1]) for w in widths))
    stretches = sorted((int(w[2]), int(w[2] + w[1])) for w in widths)
    if stretches[0][0] < 0 or any(end > start for (_, end), (start, _) in zip(stretches, stretches[1:])):
        raise ValueError(
            f"the shards' features {stretches} overlap; first is the number of a shard's first feature"
        )
    room = max(int(w[0]) for w in widths)
    spare = room - own.values.shape[-1]
    bits = torch.nn.functional.pad(own.values.view(torch.int32), (0, spare))
    packed = torch.stack([bits, torch.nn.functional.pad(own.indices + first, (0, spare))]).contiguous()
    found: List[Tensor] = [torch.empty_like(packed) for _ in widths]
    dist.all_gather(found, packed, group=group)
    cut = [part[..., : int(w[0])] for part, w in zip(found, widths)]
    return merge_topk([TopK(part[0].contiguous().view(torch.float32), part[1]) for part in cut], k)
