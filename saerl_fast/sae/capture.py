"""Hidden states of a causal language model: for scoring (the forward stops early) and during rollouts.

Layer L is the residual stream after L blocks: L = 0 is what enters the first block (the embeddings),
L = n is what leaves the last one. This is transformers' ``hidden_states[L]``, except that transformers
shows the last entry after the final norm and this module never does (SAEs are trained without it). Mamba's
``hidden_states`` leave out the embeddings, so there it is ``hidden_states[L - 1]``.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import check_fit, decoder, hidden_size, n_blocks
from saerl_fast.sae.blocks import check_stream, forward_through, forward_to, on_layer

if TYPE_CHECKING:
    from saerl_fast.prompts.own import Spans
    from saerl_fast.sae.model import SAE
    from saerl_kernels import CSR

log = logging.getLogger(__name__)

WIDE = 256  # hidden size from which bfloat16 products take about half of float32's time
Progress = Callable[[int, int], None]  # (rows done, rows in all)


class Capture:
    """Records the hidden states of each prefill that runs inside its ``with`` block.

    A prefill is a forward pass on an empty cache: the first one of ``model.generate`` or of a
    hand-written loop. Decoding steps pass through untouched, and nothing here waits for the device
    before ``take``. Several prefills (a batch generated in chunks) are recorded one after the other.

    model: a transformers decoder-only model; layer: 0 to the number of blocks.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.layer = model, check_layer(model, layer)
        self.seconds = 0.0  # spent in take() and in the hooks since the last reset_timings()
        self._records: list[tuple[Tensor, Tensor | None]] = []
        self._mask: Tensor | None = None
        self.ids: list[Tensor] = []  # of the recorded prefills that were made from ids
        self._armed = False
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        if self._handles:
            raise SaerlError("this capture is already active; leave its with-block before entering it again")
        body, layers = decoder(self.model)
        self._records.clear()
        self.ids.clear()
        self._handles = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            on_layer(layers, self.layer, self._record),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._armed = False

    def hand_to(self, stream: torch.cuda.Stream) -> None:
        """Let ``stream`` read what was recorded: it waits for the prefill, and the memory waits for it."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for hidden, mask in self._records:
            hidden.record_stream(stream)
            if mask is not None:
                mask.record_stream(stream)

    @torch.no_grad()
    def take(self, *, timed: bool = True) -> tuple[Tensor, Tensor]:
        """(x [n_tokens, d_in] in the model's dtype, offsets int64 [n_rows + 1]), padding removed.

        Rows are those of the prefills since the block was entered, in order; taking them forgets them.
        Raises SaerlError when nothing was recorded or a value is not finite. ``timed``: add to ``seconds``.
        """
        start = time.perf_counter()
        if not self._records:
            raise SaerlError("nothing was captured; run the model inside the capture's with-block first")
        parts = [_remove_padding(x, mask) for x, mask in self._records]
        self._records.clear()
        x = torch.cat([part[0] for part in parts])
        lengths = torch.cat([part[1] for part in parts])
        check_finite(x, self.layer)
        if timed:
            self.seconds += time.perf_counter() - start
        return x, _offsets(lengths)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        self._armed = ids is not None and self._is_prefill(ids, kwargs)
        if self._armed:
            assert ids is not None
            self._mask = _padding_mask(ids, kwargs)
            if ids.ndim == 2:
                self.ids.append(ids)

    def _is_prefill(self, ids: Tensor, kwargs: dict[str, Any]) -> bool:
        # shapes and host integers only: reading a device tensor here would stall every decoding step
        mask = kwargs.get("attention_mask")
        names = ("cache", "past_key_values", "cache_params", "state")  # the first since transformers 5.24
        cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.shape[1] == ids.shape[1]
        if cache is None:
            return True
        try:
            past = cache.get_seq_length()
        except (AttributeError, ValueError):  # states without a sequence axis do not know their length
            past = None
        return past == 0 if isinstance(past, int) else ids.shape[1] > 1

    def _record(self, hidden: Tensor) -> None:
        if not self._armed:
            return
        start = time.perf_counter()
        self._armed = False
        self._records.append((hidden.detach(), self._mask))
        self.seconds += time.perf_counter() - start


class FeatureCapture:
    """Pooled SAE features of the prompts whose rollouts are generated inside its ``with`` block.

    ``with fc: model.generate(...)`` then ``fc.features()``: one CSR row per row of the batch, from the
    prefill that generation ran anyway. ``timings`` holds the seconds spent since the last
    ``reset_timings()``: "capture" (hooks, padding removal) and "encode".

    On a GPU, leaving the block starts padding removal and encoding on a stream of their own and in a thread
    of their own: both read sizes back from the device, and the thread waits for them, not the decoding
    loop. "encode" is then what ``features()`` had to wait.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SAE,
        reduce: str = "max",
        backend: str = "auto",
        *,
        layer: int | None = None,
    ) -> None:
        check_width(model, sae)
        self.sae, self.reduce, self.backend = sae, reduce, backend
        self.capture = Capture(model, resolve_layer(model, sae, layer))
        self._encode_seconds = 0.0
        self._own: dict[tuple[int, ...], Spans] = {}
        device = next(model.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, "capture") if device.type == "cuda" else None
        self._pending: Future[CSR] | None = None

    def warm_up(self) -> None:
        """Encode two made-up tokens, so that compiling the kernels is no part of the first step."""
        x = torch.zeros(2, self.sae.d_in, device=self.sae.W_enc.device, dtype=self.sae.W_enc.dtype)
        offsets = torch.tensor([0, 2], device=x.device)
        self.sae.pool(x, offsets, reduce=self.reduce, backend=self.backend)

    def expect(self, prompts: Sequence[Sequence[int]], own: Sequence[Spans] | None) -> None:
        """Which tokens (`own_tokens`) of the prompts to come are pooled; of others, and of None, all are."""
        self._own = {tuple(row): spans for row, spans in zip(prompts, own or (), strict=False)}

    @property
    def timings(self) -> dict[str, float]:
        return {"capture": self.capture.seconds, "encode": self._encode_seconds}

    def reset_timings(self) -> None:
        self.capture.seconds = self._encode_seconds = 0.0

    def __enter__(self) -> FeatureCapture:
        if self._pending is not None:  # of a generation that failed: nobody asked for its features
            self._pending.exception()
            self._pending = None
        self.capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.capture.__exit__(kind, error, trace)
        if self._worker is not None and kind is None:
            if self._stream is not None:
                self.capture.hand_to(self._stream)
            self._pending = self._worker.submit(self._encode_aside)

    def features(self) -> CSR:
        """CSR [n prompts, d_sae] on the CPU; forgets the batch it came from."""
        start = time.perf_counter()
        if self._pending is None:
            x, offsets = self.capture.take()
            start = time.perf_counter()  # taking is counted by the capture itself
            pooled = self._encode(x, offsets)
        else:
            pending, self._pending = self._pending, None
            pooled = pending.result()
        self._encode_seconds += time.perf_counter() - start
        return pooled

    def pool(self, x: Tensor, offsets: Tensor, rows: Sequence[Sequence[int]]) -> CSR:
        """The same of hidden states that somebody else captured: x [n_tokens, d_in], offsets int64 [n + 1].

        ``rows``: the token ids of the prompts that they are of.
        """
        if self._own and len(rows) == len(offsets) - 1 and self.reduce != "last":
            x, offsets = owned(x, offsets, [self._own.get(tuple(row), (0, len(row))) for row in rows])
        return self.sae.pool(x, offsets, reduce=self.reduce, backend=self.backend).to("cpu")

    def _encode(self, x: Tensor, offsets: Tensor) -> CSR:
        rows = [row for ids in self.capture.ids for row in ids.tolist()] if self._own else []
        lengths = offsets.diff().tolist()
        return self.pool(x, offsets, [row[len(row) - n :] for row, n in zip(rows, lengths, strict=False)])

    def _encode_aside(self) -> CSR:
        with torch.cuda.stream(self._stream):  # None: where the caller would be
            return self._encode(*self.capture.take(timed=False))


@torch.no_grad()
def iter_hidden_ids(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layer: int,
    batch_tokens: int = 8192,
    on_progress: Progress | None = None,
    *,
    done: int = 0,
    dtype: torch.dtype | None = None,
    read: Callable[[list[int], Tensor], None] | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Stream the hidden states of many texts: (row numbers, x [n_tokens, d_in], offsets int64 [n_rows + 1]).

    ``rows`` holds the texts' token ids. Batches are of similar length, longest first, at most
    ``batch_tokens`` tokens with padding (a longer text is a batch by itself); the row numbers tell where each
    belongs in ``rows``. The first ``done`` rows of that order, whole batches, are left out. Blocks after
    ``layer`` never run, unless ``read`` wants to see the row numbers and logits [rows, longest, V] of each
    batch. ``dtype``: of the matrix products (autocast), where it is not the model's. Raises SaerlError on a
    layer the model lacks, an empty or too long row, and values that are not finite.
    """
    check_layer(model, layer)
    check_fit(model, rows, what="text")
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    if on_progress is not None:
        on_progress(done, len(order))
    while done < len(order):
        width = len(rows[order[done]])
        chosen = order[done : done + max(1, batch_tokens // width)]
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        # right padding needs no mask: in a causal model no real token sees what follows it
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        for at, i in enumerate(chosen):
            ids[at, : len(rows[i])] = torch.tensor(rows[i])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if read is None:
                hidden = forward_to(model, layer, ids.to(device))
            else:
                hidden, logits = forward_through(model, layer, ids.to(device))
                read(chosen, logits)
                del logits
        hidden = hidden.flatten(0, 1)
        if int(lengths[-1]) < width:
            real = (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(1)
            hidden = hidden[real.to(device)]
        check_finite(hidden, layer)
        done += len(chosen)
        yield chosen, hidden, _offsets(lengths).to(device)
        if on_progress is not None:
            on_progress(done, len(order))


def check_layer(model: nn.Module, layer: int) -> int:
    """``layer`` if the model has it and its blocks pass on one residual stream, else SaerlError."""
    blocks = n_blocks(model)
    if not 0 <= layer <= blocks:
        raise SaerlError(f"layer {layer} does not exist in a model of {blocks} blocks; use 0 to {blocks}")
    check_stream(model, layer)
    return layer


def resolve_layer(model: nn.Module, sae: SAE | None = None, layer: int | None = None) -> int:
    """The layer asked for, else the SAE's own, else the middle one (checked against the model).

    A layer other than the SAE's own, and the middle one for an SAE that names none, are said in the log.
    """
    if layer is not None:
        if sae is not None and sae.layer not in (None, layer):
            _warn_once(f"sae.layer={layer}, but the SAE was trained on layer {sae.layer}; unset sae.layer")
        return check_layer(model, layer)
    if sae is not None:
        if sae.layer is not None:
            return check_layer(model, sae.layer)
        if hook := sae.cfg.hook_name:
            raise SaerlError(
                f"the SAE reads {hook!r}, which is not known to be a residual stream; set sae.layer if it is"
            )
        middle = n_blocks(model) // 2
        _warn_once(f"the SAE names no layer: it reads the middle one, {middle}; sae.layer sets another")
    return n_blocks(model) // 2


def resolve_products(name: str, model: nn.Module) -> torch.dtype | None:
    """The dtype of a forward pass's matrix products for `score.dtype`; None: the model's own.

    auto is bfloat16 for a float32 model on a CPU that is faster with it, from WIDE on: narrower models gain
    little.
    """
    parameter = next(model.parameters())
    able = parameter.device.type == "cpu" and _half_pays()
    gains = able and parameter.dtype == torch.float32 and hidden_size(model) >= WIDE
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and gains) else None


def _half_pays() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32. Told by what it is, not by a clock: the
    same machine must make the same features.

    AMX does. AVX512's instructions do on AMD's (a third of the time); on Intel's without AMX a forward pass
    of SmolLM2 took 1.2 to 1.5 of float32's time.
    """
    amx, avx = (getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("amx_tile", "avx512_bf16"))
    return amx or (avx and "GenuineIntel" not in _maker())


@cache
def _maker() -> str:
    """What the operating system says of the processor, its maker among it."""
    info = Path("/proc/cpuinfo")
    return info.read_text(errors="replace") if info.is_file() else platform.processor()


def check_width(model: nn.Module, sae: SAE) -> None:
    """SaerlError naming both widths when the SAE was made for another width.

    An SAE of the right width that names another model is only warned of: names of one model differ.
    """
    width = hidden_size(model)
    if sae.d_in != width:
        raise SaerlError(
            f"the SAE reads activations of width {sae.d_in} but the model's hidden size is {width}; "
            "use an SAE trained on this model's width"
        )
    own, loaded = sae.cfg.model_name, getattr(model.config, "_name_or_path", None)
    if own and loaded and not _short_names(own) & _short_names(loaded):
        _warn_once(f"the SAE was trained on {own} but the model is {loaded}; check that they belong together")


def _short_names(name: str) -> set[str]:
    """What a model may be called without its owner or folder; a GGUF file also goes by its folder."""
    path = Path(name.lower() if not Path(name).exists() else os.path.abspath(name).lower())
    return set(path.parts[-2:] if path.suffix == ".gguf" else path.parts[-1:])


@cache
def _warn_once(sentence: str) -> None:
    """Scoring asks shard by shard; one line is enough."""
    log.warning(sentence)


def check_finite(x: Tensor, layer: int) -> None:
    """SaerlError when an activation is NaN or infinite (waits for the device)."""
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).any(dim=-1).sum())
        raise SaerlError(
            f"the hidden states of layer {layer} are not finite at {bad} of {x.shape[0]} tokens; "
            "try model.dtype=float32 or bfloat16, and check the checkpoint"
        )


def owned(x: Tensor, offsets: Tensor, spans: Sequence[Spans]) -> tuple[Tensor, Tensor]:
    """The tokens of x [n_tokens, d] in each row's ``spans`` (from its start), and their offsets."""
    mask = torch.zeros(len(x), dtype=torch.bool)
    for start, ranges in zip(offsets.tolist(), spans, strict=False):
        for a, b in zip(ranges[::2], ranges[1::2], strict=True):
            mask[start + a : start + b] = True
    before = torch.cat([torch.zeros(1, dtype=torch.long), mask.cumsum(0)])
    return (x if bool(mask.all()) else x[mask.to(x.device)]), before[offsets.cpu()]


def _padding_mask(ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens of a prefill are real, bool [B, T], from whatever form the mask arrives in."""
    rows, width = ids.shape[:2]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, :width] != 0
    if isinstance(positions, Tensor) and positions.ndim == 2:
        # generate() pads on the left and counts positions from each row's first real token
        lengths = positions[:, -1:].expand(rows, 1) + 1
        return torch.arange(width, device=ids.device) >= width - lengths
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.ndim == 4:
        diagonal = mask[:, 0, :, :width].diagonal(dim1=1, dim2=2)  # a real token attends to itself
        return diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return None


def _remove_padding(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, T, d] and bool [B, T] to ([n_tokens, d], lengths [B])."""
    if mask is None:
        rows, width = hidden.shape[:2]
        return hidden.flatten(0, 1), torch.full((rows,), width, device=hidden.device)
    mask = mask.to(hidden.device) != 0
    return hidden[mask], mask.sum(dim=1)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
