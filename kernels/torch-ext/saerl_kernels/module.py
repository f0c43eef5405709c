"""SparseEncoder: an encoder as a torch module, with what modules do (state_dict, to, hooks)."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ._check import check_indices, check_k, need_encoder
from .encode import encode_threshold, encode_topk
from .pack import PackedEncoder, check_dtype
from .types import CSR, TopK

OUTPUTS = ("topk", "csr", "coo", "dense")
PARTS = ("weight", "bias", "threshold")


class SparseEncoder(nn.Module):
    """``encode_topk`` (or ``encode_threshold``) of one encoder as a module; not differentiable.

        sae.encoder = SparseEncoder(pack_encoder(sae.W_enc, sae.b_enc), k=64, output="coo")

    Args:
        encoder: from ``pack_encoder``.
        k: features kept per row; None takes the encoder's threshold instead.
        output: what a call on x [..., d_in] returns. "topk": ``TopK`` [..., k] (only with k). "csr": ``CSR``
            [n, d_sae], x's leading dimensions flattened. "coo": a coalesced torch sparse tensor and "dense":
            a plain one, both float32 [..., d_sae].
        features: integers [m], rising: only these latents compete and come back, under their own numbers; for
            a slice of a dictionary. None: all.
        backend: as in ``encode_topk``.

    Weight, bias and threshold are buffers, in the state_dict under these names and in the original numbering
    of the kept features; ``to``, ``half`` and so on move them, bias and threshold staying float32. A permuted
    encoder stays permuted. Raises ValueError for what does not fit.
    """

    weight: Tensor
    bias: Tensor
    threshold: Optional[Tensor]
    permutation: Optional[Tensor]
    features: Optional[Tensor]

    def __init__(
        self,
        encoder: PackedEncoder,
        k: Optional[int] = None,
        *,
        output: str = "topk",
        features: Union[Tensor, slice, range, None] = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        need_encoder(encoder)
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if k is None and (output == "topk" or encoder.threshold is None):
            raise ValueError("without k the encoder needs a threshold, and output 'csr', 'coo' or 'dense'")
        self.k, self.output, self.backend, self.d_sae = k, output, backend, encoder.d_sae
        self.normalize_activations, self.permute, self.seed = (
            encoder.normalize_activations,
            encoder.permute,
            encoder.seed,
        )
        plain = encoder.natural()
        chosen = _rising(features, encoder)
        for name in PARTS:
            part = getattr(plain, name)
            self.register_buffer(name, part if part is None or chosen is None else part[chosen])
        self.register_buffer("permutation", None, persistent=False)
        self.register_buffer("features", chosen, persistent=False)
        check_k(1 if k is None else k, self.weight.shape[0], "the number of features")
        self._store(self.packed()._permuted())

    def packed(self) -> PackedEncoder:
        """The encoder of the kept features, numbered from 0, sharing the buffers."""
        if (
            self._packed is None
            or self._packed.weight is not self.weight
            or self._packed.bias is not self.bias
            or self._packed.threshold is not self.threshold
        ):
            parts = (self.weight, self.bias, self.threshold, self.normalize_activations, self.permutation)
            self._packed = PackedEncoder(*parts, self.permute, self.seed)
            if not torch.compiler.is_compiling():  # as the encoder has them, else it is made at every call
                self._store(self._packed)
        return self._packed

    _packed: Optional[PackedEncoder] = None

    def _store(self, encoder: PackedEncoder) -> None:
        for name in (*PARTS, "permutation"):
            part = getattr(encoder, name)
            if name in self._parameters:  # one was assigned to the buffer's name
                delattr(self, name)
                self.register_buffer(name, part)
            setattr(self, name, part)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseEncoder:
        before = self.packed()
        self._store(before.natural())
        wide = (self.bias, self.threshold)  # a narrower dtype is for the weight alone
        super()._apply(fn, recurse)
        empty = not self.weight.is_meta and wide[0].is_meta  # to_empty: there is nothing to move
        new = torch.empty_like if empty else Tensor.to
        self.bias, self.threshold = (None if p is None else new(p, device=self.weight.device) for p in wide)  # type: ignore
        self._settle(before)
        return self

    def _settle(self, before: PackedEncoder) -> None:
        """Keep what came in as ``pack_encoder`` has it; what it refuses leaves ``before``, and ValueError."""
        if self.weight.dtype == torch.float64:
            self.weight = self.weight.float()
        try:
            check_dtype(self.weight.dtype)
        except ValueError:
            self._store(before)
            raise
        self._store(self.packed().contiguous()._permuted())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain = self.packed().natural()
        for name in PARTS:
            if getattr(plain, name) is not None:
                destination[prefix + name] = getattr(plain, name)

    def _load_from_state_dict(self, *args: Any) -> None:
        before = self.packed()
        plain = before.natural()
        for name in PARTS:  # what is written to in place may be the encoder's that was given
            part = getattr(plain, name)
            setattr(self, name, None if part is None else part.clone())
        self.permutation = None
        super()._load_from_state_dict(*args)
        self._packed = None  # the buffers were written in place
        self._settle(before)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_packed": None}

    def forward(self, x: Tensor) -> Union[TopK, CSR, Tensor]:
        encoder = self.packed()
        if self.k is None:
            csr = encode_threshold(x, encoder, backend=self.backend)
            csr = csr._replace(indices=self._numbers(csr.indices), n_cols=self.d_sae)
        else:
            kept = encode_topk(x, encoder, self.k, backend=self.backend)
            kept = kept._replace(indices=self._numbers(kept.indices))
            if self.output == "topk":
                return kept
            if self.output == "dense":
                return kept.to_dense(self.d_sae)
            csr = kept.to_csr(self.d_sae)
        if self.output == "csr":
            return csr
        shape = (*x.shape[:-1], self.d_sae)
        return csr.to_dense().reshape(shape) if self.output == "dense" else csr.to_coo(shape)

    def _numbers(self, indices: Tensor) -> Tensor:
        return indices if self.features is None else self.features[indices.long()].int()

    def extra_repr(self) -> str:
        rule = "threshold" if self.k is None else f"k={self.k}"
        return f"{rule}, output={self.output}, {self.packed()!r}"


def _rising(features: Union[Tensor, slice, range, None], encoder: PackedEncoder) -> Optional[Tensor]:
    if features is None:
        return None
    if isinstance(features, slice):
        features = range(*features.indices(encoder.d_sae))
    chosen = torch.as_tensor(features, device=encoder.device)
    if chosen.dim() != 1 or chosen.numel() == 0 or chosen.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"features must be integers [m], m at least 1; got {chosen.dtype} {list(chosen.shape)}"
        )
    if bool((chosen.diff() <= 0).any()):
        raise ValueError("features must rise, each once (features.unique())")
    check_indices(chosen, encoder.d_sae, "features")
    return chosen.long()
