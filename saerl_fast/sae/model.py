"""One SAE class for every architecture the pipeline encodes with: weights, what they are, kernel calls.

Encoding and decoding follow SAELens 6 (``sae_lens/saes/{topk,jumprelu,gated,standard}_sae.py``), whose
tests-with-the-real-library live in ``tests/test_sae_files.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import mismatch
from saerl_kernels import (
    CSR,
    PackedEncoder,
    TopK,
    decode_csr,
    encode_pool,
    encode_threshold,
    encode_topk,
    pack_encoder,
    sparse_decode,
)
from saerl_kernels.pack import NORMALISATIONS

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "gated", "standard")


@dataclass(frozen=True)
class SAESpec:
    """What an SAE's weights are and where they belong; names as SAELens has them."""

    architecture: str = "topk"  # one of ARCHITECTURES; standard: a plain ReLU
    k: int | float | None = None  # topk: features kept per token; batchtopk: the average it was trained for
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False  # topk only: rank and report activations times decoder norms
    normalize_activations: str = "none"  # one of saerl_kernels' NORMALISATIONS
    hook_layer: int | None = None  # residual stream after this many blocks (transformers' hidden_states)
    hook_name: str | None = None  # as the checkpoint names it
    model_name: str | None = None
    max_norm: float | None = None  # tokens with a larger L2 norm are left out of pooling (attention sinks)
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever else the checkpoint said


class SAE(nn.Module):
    """A sparse autoencoder: TopK, or threshold-encoded (JumpReLU, BatchTopK at inference, gated, plain ReLU).

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], threshold [d_sae] for
    "jumprelu", "batchtopk" and "gated" (whose gate `saelens.build` writes as a threshold). Raises SaerlError
    on shapes or settings that do not fit together.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        threshold: Tensor | None = None,
        cfg: SAESpec,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        if W_enc.dim() != 2:
            raise SaerlError(f"W_enc must have two dimensions [d_in, d_sae], got shape {tuple(W_enc.shape)}")
        d_in, d_sae = W_enc.shape
        _expect("b_enc", b_enc, (d_sae,))
        _expect("W_dec", W_dec, (d_sae, d_in))
        _expect("b_dec", b_dec, (d_in,))
        _check_spec(self.cfg, d_sae, threshold)
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        if threshold is not None:
            _expect("threshold", threshold, (d_sae,))
            self.threshold: nn.Parameter | None = nn.Parameter(threshold)
        else:
            self.register_parameter("threshold", None)
        # of its training: "sparsity", log10 of the share of tokens each feature fires on, as SAELens has it,
        # and "silent_steps" since it last did, both [d_sae]; {} where that is not known
        self.usage: dict[str, Tensor] = {}
        self._packed: dict[Any, PackedEncoder] = {}

    def __repr__(self) -> str:
        k = "" if self.cfg.k is None else f", k={self.cfg.k}"
        layer = "" if self.layer is None else f", layer={self.layer}"
        dtype = str(self.W_enc.dtype).split(".")[-1]
        shape = f"d_in={self.d_in}, d_sae={self.d_sae}"
        return f"SAE({self.architecture}, {shape}{k}{layer}, {dtype}, {self.W_enc.device})"

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def architecture(self) -> str:
        return self.cfg.architecture

    @property
    def k(self) -> int | None:
        """Features kept per token; None when a threshold decides (everything but "topk")."""
        return int(self.cfg.k) if self.architecture == "topk" and self.cfg.k is not None else None

    @property
    def layer(self) -> int | None:
        """The residual stream it reads, in transformers' ``hidden_states`` numbering; None if unknown."""
        return self.cfg.hook_layer

    def packed(self, dtype: torch.dtype | None = None) -> PackedEncoder:
        """The encoder as the kernels take it, cached until a weight changes or moves."""
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold)
        key = (dtype, *((w.data_ptr(), w._version, w.device) for w in weights if w is not None))
        if key not in self._packed:
            self._packed = {  # one entry: a packed encoder is as large as the SAE
                key: pack_encoder(
                    self.W_enc,
                    self.b_enc,
                    W_dec=self.W_dec,
                    b_dec=self.b_dec,
                    apply_b_dec_to_input=self.cfg.apply_b_dec_to_input,
                    rescale_acts_by_decoder_norm=self.cfg.rescale_acts_by_decoder_norm,
                    normalize_activations=self.cfg.normalize_activations,
                    threshold=0.0 if self.architecture == "standard" else self.threshold,
                    dtype=dtype,
                )
            }
        return self._packed[key]

    @torch.no_grad()
    def encode(self, x: Tensor, *, backend: str = "auto") -> TopK | CSR:
        """Features of x [..., d_in]: TopK [..., k] for "topk", else CSR over the flattened rows."""
        encoder = self.packed(self._dtype_for(x))
        if self.k is not None:
            return encode_topk(x, encoder, self.k, backend=backend)
        return encode_threshold(x, encoder, backend=backend)

    @torch.no_grad()
    def pool(self, x: Tensor, offsets: Tensor, *, reduce: str = "max", backend: str = "auto") -> CSR:
        """Features pooled over each sequence: x [n_tokens, d_in], offsets [n_seq + 1] -> CSR [n_seq, d_sae].

        ``reduce``: as in `encode_pool` of the kernels. Moves the SAE to x's device when it is elsewhere.
        """
        if x.device != self.W_enc.device:
            self.to(x.device)
        if x.shape[-1] != self.d_in:
            raise SaerlError(f"the SAE reads activations of width {self.d_in} but got width {x.shape[-1]}")
        limit = self.cfg.max_norm
        mask = None if limit is None else x.float().norm(dim=-1) <= limit
        try:
            return encode_pool(
                x, offsets, self.packed(self._dtype_for(x)), self.k, reduce, mask=mask, backend=backend
            )
        except ValueError as err:  # the kernels' own one-sentence checks
            raise SaerlError(str(err)) from err

    def decode(self, features: TopK | CSR, x: Tensor | None = None) -> Tensor:
        """Reconstructions [..., d_in] of ``encode``'s result.

        ``x``, the encoder's input, is needed only under a run-time normalisation, which it undoes.
        """
        W_dec = self.W_dec
        if isinstance(features, CSR):
            out = decode_csr(features, W_dec, self.b_dec)
            out = out if x is None else out.reshape(x.shape)
        else:
            values = features.values
            if self.cfg.rescale_acts_by_decoder_norm:
                values = values / W_dec.norm(dim=-1)[features.indices.long()]
            out = sparse_decode(values, features.indices, W_dec, self.b_dec)
        return self._denormalise(out, x)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_in] in float32, without gradients to the encoder."""
        return self.decode(self.encode(x), x)

    def _dtype_for(self, x: Tensor) -> torch.dtype | None:
        # tensor cores want both sides in 16 bits; on a CPU the weights' own precision costs nothing
        return x.dtype if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else None

    def _denormalise(self, out: Tensor, x: Tensor | None) -> Tensor:
        kind = self.cfg.normalize_activations
        if kind not in ("layer_norm", "constant_norm_rescale"):
            return out
        if x is None:
            raise SaerlError(f"decoding with normalize_activations={kind!r} needs the encoder's input x")
        x = x.float()
        if kind == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            return out * (x - mean).std(-1, keepdim=True) + mean
        return out * (x.norm(dim=-1, keepdim=True) / self.d_in**0.5)


def _check_spec(cfg: SAESpec, d_sae: int, threshold: Tensor | None) -> None:
    architecture, k = cfg.architecture, cfg.k
    number, text = (None, float), (None, str)
    form = {"k": number, "hook_layer": (None, int), "max_norm": number, "hook_name": text}
    if fault := mismatch(vars(cfg), form):
        raise SaerlError(f"{fault}: correct it in the SAE's configuration")
    if architecture not in ARCHITECTURES:
        raise SaerlError(
            f"SAE architecture {architecture!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    if architecture == "topk" and not (isinstance(k, int) and 1 <= k <= d_sae):
        raise SaerlError(f"k={k!r} must be an integer from 1 to d_sae={d_sae} for a topk SAE")
    if (architecture in ("jumprelu", "batchtopk", "gated")) != (threshold is not None):
        has = "none" if threshold is None else "one"
        needs = "needs its" if threshold is None else "takes no"
        raise SaerlError(f"a {architecture} SAE {needs} threshold [d_sae]; the checkpoint has {has}")
    if cfg.rescale_acts_by_decoder_norm and architecture != "topk":
        raise SaerlError(f"rescale_acts_by_decoder_norm is for topk SAEs, not {architecture}")
    at_run_time = [name for name in NORMALISATIONS if name != "expected_average_only_in"]  # to be folded in
    if cfg.normalize_activations not in at_run_time:
        raise SaerlError(
            f"normalize_activations={cfg.normalize_activations!r} is not supported; "
            f"use one of {', '.join(at_run_time)}"
        )


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise SaerlError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
