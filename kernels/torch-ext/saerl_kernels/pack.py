"""One-time packing: every affine step of an SAE's encoder folded into one weight and one bias."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from .types import need_tensors, without_memory

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")  # SAELens' names
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class PackedEncoder:
    """An encoder ready to run: pre-activations are ``prepare(x) @ weight.T + bias``.

    Column j of the packed weight is feature ``permutation[j]`` (j itself without a permutation);
    every op returns the original numbering.
    """

    weight: Tensor  # [d_sae, d_in], one feature a row; contiguous, or Triton takes a copy
    bias: Tensor  # float32 [d_sae]
    threshold: Optional[Tensor] = None  # float32 [d_sae]
    normalize_activations: str = "none"  # what is left to do to x at run time
    permutation: Optional[Tensor] = None  # int32 [d_sae]
    permute: bool = False
    seed: int = 0
    _cache: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Kernels read these as they lie in memory, whatever the encoder is made of: parameters, the column
        # of a matrix, an expanded number. Only products take a weight of any strides (``contiguous``).
        for name in ("weight", "bias", "threshold"):
            part = getattr(self, name)
            if part is None:
                continue
            fits = name == "weight" or (part.dtype == torch.float32 and part.is_contiguous())
            if part.requires_grad or not fits:
                part = part.detach()
                object.__setattr__(self, name, part if fits else part.float().contiguous())

    def __repr__(self) -> str:
        parts = [f"d_in={self.d_in}", f"d_sae={self.d_sae}", str(self.dtype).split(".")[-1], str(self.device)]
        if self.threshold is not None:
            parts.append("threshold")
        if self.normalize_activations != "none":
            parts.append(self.normalize_activations)
        if self.permutation is not None:
            parts.append("permuted")
        return f"PackedEncoder({', '.join(parts)})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # what can be made again is not saved

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_sae(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def to(self, *args: Any, device: Any = None, dtype: Optional[torch.dtype] = None) -> PackedEncoder:
        """On another device and/or with another weight dtype; bias and threshold stay float32."""
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        target = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        check_dtype(dtype)
        natural = self.natural()
        moved = replace(
            natural,
            weight=natural.weight.to(target, dtype),
            bias=natural.bias.to(target),
            threshold=None if natural.threshold is None else natural.threshold.to(target),
            _cache={},
        )
        return moved._permuted()

    def natural(self) -> PackedEncoder:
        """The same encoder with its features in their original order (itself when they are)."""
        if self.permutation is None:
            return self
        if without_memory(self.weight):  # a graph keeps nothing, and a fake tensor has no address
            return self._unpermuted()
        return self.derived("natural", self._unpermuted)

    def contiguous(self) -> PackedEncoder:
        """The same encoder with a weight that lies row by row (itself when it does)."""
        if self.weight.is_contiguous():
            return self
        return self.derived("contiguous", lambda: replace(self, weight=self.weight.contiguous(), _cache={}))

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, kept until the weight, the bias or the threshold is written to."""
        state = written(self.weight, self.bias, self.threshold)
        held = self._cache.get(name)
        if held is None or held[0] != state:
            held = self._cache[name] = (state, make())
        return held[1]

    def _unpermuted(self) -> PackedEncoder:
        assert self.permutation is not None
        order = torch.argsort(self.permutation)
        return replace(
            self,
            weight=self.weight[order],
            bias=self.bias[order],
            threshold=None if self.threshold is None else self.threshold[order],
            permutation=None,
            _cache={},
        )

    def _permuted(self) -> PackedEncoder:
        if self.permute is not True or self.permutation is not None:
            return self
        generator = torch.Generator().manual_seed(int(self.seed))
        order = torch.randperm(self.d_sae, generator=generator, device="cpu").to(self.device)
        return replace(
            self,
            weight=self.weight[order],
            bias=self.bias[order],
            threshold=None if self.threshold is None else self.threshold[order],
            permutation=order.int(),
            _cache={},
        )

    def need_rows(self, x: Tensor) -> None:
        """ValueError unless ``x`` [..., d_in] is floating point and on the encoder's device."""
        need_tensors(x=x, weight=self.weight)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be d_in={self.d_in}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device} but the encoder is on {self.device}; move one of them")

    def prepare(self, x: Tensor) -> Tensor:
        """``x`` [..., d_in] as the matrix product takes it: [n, d_in], normalised, in the weight's dtype."""
        self.need_rows(x)
        x = x.detach().resolve_neg()
        if x.dim() != 2:
            x = x.reshape(-1, self.d_in)
        x = normalise(x, self.normalize_activations)
        return (x if x.dtype == self.dtype else x.to(self.dtype)).contiguous()


def normalise(x: Tensor, kind: str) -> Tensor:
    """Rows x [n, d_in] under a run-time normalisation of SAELens (``sae_lens/saes/sae.py``), in float32."""
    if x.shape[0] and kind == "layer_norm":  # of no rows, torch warns that std is undefined
        x = x.float()
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.std(-1, keepdim=True) + 1e-5)
    elif kind == "constant_norm_rescale":
        x = x.float()
        x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
    return x


def pack_encoder(
    W_enc: Tensor,
    b_enc: Optional[Tensor] = None,
    *,
    W_dec: Optional[Tensor] = None,
    b_dec: Optional[Tensor] = None,
    apply_b_dec_to_input: Optional[bool] = None,
    rescale_acts_by_decoder_norm: bool = False,
    normalize_activations: str = "none",
    input_scale: float = 1.0,
    threshold: Union[Tensor, float, None] = None,
    dtype: Optional[torch.dtype] = None,
    permute: bool = False,
    seed: int = 0,
) -> PackedEncoder:
    """Fold an SAE encoder into one weight and one bias.

    The encoder packed is, for a row x,
    ``norm * ((input_scale * normalize(x) - b_dec) @ W_enc + b_enc)`` with ``b_dec`` where it is given (and
    not switched off) and ``norm`` (the decoder's row norms) only under ``rescale_acts_by_decoder_norm``.

    Args:
        W_enc: [d_in, d_sae], as SAELens stores it (sparsify keeps its transpose).
        b_enc: [d_sae], or None for no bias.
        W_dec: [d_sae, d_in]; needed for ``rescale_acts_by_decoder_norm``.
        b_dec: [d_in], subtracted from x. Leave it out for an SAE that does not (Gemma Scope, Llama Scope).
        apply_b_dec_to_input: SAELens' flag: None subtracts b_dec where it is given, False never does, True
            needs it.
        normalize_activations: "none", "layer_norm", "constant_norm_rescale" (both run on x at each call), or
            "expected_average_only_in" (its scale belongs in ``input_scale``, as SAELens folds it).
        input_scale: a constant factor on x.
        threshold: per-feature [d_sae] or one number, compared with the final pre-activation; for
            ``encode_threshold`` (JumpReLU, BatchTopK at inference).
        dtype: of the packed weight (float32, bfloat16, float16); None keeps W_enc's (float64: float32).
        permute: store the features in a seeded random order. The fused GPU encoder spreads features over its
            groups by itself; this makes its statistics hold for a dictionary made against that, at the price
            of a second copy in the original order for ``encode_threshold``.

    Folding is done in float64 against the rounded weight, so a 16-bit encoder has no second rounding.
    Raises ValueError for shapes that do not fit or an unknown option.
    """
    need_tensors(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    if W_enc.dim() != 2:
        raise ValueError(f"W_enc must be [d_in, d_sae], got shape {tuple(W_enc.shape)}")
    d_in, d_sae = W_enc.shape
    if d_in == 0 or d_sae == 0:
        raise ValueError(f"W_enc has shape {(d_in, d_sae)}; both sizes must be at least 1")
    if normalize_activations not in NORMALISATIONS:
        raise ValueError(
            f"normalize_activations={normalize_activations!r} is unknown; choose one of "
            f"{', '.join(NORMALISATIONS)} (fold covariance whitening into W_enc first)"
        )
    at_run_time = "none" if normalize_activations == "expected_average_only_in" else normalize_activations
    if permute not in (True, False):
        raise ValueError(f"permute={permute!r} is unknown; choose True or False")
    if not hasattr(input_scale, "__float__") or not 0 < abs(float(input_scale)) < float("inf"):
        raise ValueError(f"input_scale={input_scale!r} must be finite and not 0")
    dtype = (torch.float32 if W_enc.dtype == torch.float64 else W_enc.dtype) if dtype is None else dtype
    check_dtype(dtype)
    device = W_enc.device
    _check_shape("b_enc", b_enc, (d_sae,))
    _check_shape("W_dec", W_dec, (d_sae, d_in))
    _check_shape("b_dec", b_dec, (d_in,))

    norms = None
    if rescale_acts_by_decoder_norm:
        if W_dec is None:
            raise ValueError("rescale_acts_by_decoder_norm=True needs W_dec [d_sae, d_in]")
        norms = W_dec.detach().to(device, torch.float64).norm(dim=-1)
    weight = W_enc.detach().t()
    if norms is not None or input_scale != 1.0:
        scale = torch.full((d_sae, 1), float(input_scale), dtype=torch.float64, device=device)
        weight = weight.double() * (scale if norms is None else scale * norms[:, None])
    # Always a copy: a packed encoder must not change when training goes on.
    weight = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    bias = torch.zeros(d_sae, dtype=torch.float64, device=device)
    if b_enc is not None:
        bias += b_enc.detach().to(device, torch.float64)
    if norms is not None:
        bias *= norms
    if apply_b_dec_to_input is None:
        apply_b_dec_to_input = b_dec is not None
    if apply_b_dec_to_input:
        if b_dec is None:
            raise ValueError("apply_b_dec_to_input=True needs b_dec [d_in]")
        shift = b_dec.detach().to(device, torch.float64) / float(input_scale)
        for start in range(0, d_sae, 4096):  # a float64 copy of a whole large dictionary would not fit
            stop = start + 4096
            bias[start:stop] -= weight[start:stop].double() @ shift
    packed_threshold = None
    if threshold is not None:
        need_tensors(threshold=threshold if isinstance(threshold, Tensor) else None)
        limit = number_or_tensor(threshold, device)
        if limit.dim() > 0:
            _check_shape("threshold", limit, (d_sae,))
        packed_threshold = limit.expand(d_sae).clone()
    packed = PackedEncoder(weight, bias.float(), packed_threshold, at_run_time, None, permute, seed)
    return packed._permuted()


def number_or_tensor(threshold: Any, device: torch.device) -> Tensor:
    """``threshold``, a number or an array, as float32; ValueError for anything else."""
    try:
        return torch.as_tensor(threshold, dtype=torch.float32, device=device).detach()
    except (RuntimeError, TypeError, ValueError) as err:
        raise ValueError(f"threshold={threshold!r:.80} is no number; give one, or [d_sae] of them") from err


def written(*tensors: Optional[Tensor]) -> tuple:
    """Changes when one of ``tensors`` has been written to in place, for what is derived from them and kept.

    Writes through ``.data`` or NumPy views, and tensors made in inference mode, count no versions: there pack
    again. Other memory is noticed.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return tuple((0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in given)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; choose float32, bfloat16 or float16")


def _check_shape(name: str, tensor: Optional[Tensor], shape: tuple) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
