"""What has to hold of a model, or a run would go wrong in silence: each check says what does not hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_OTHER_HEAD = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|RewardModel)$")
_OF_A_WEIGHT = re.compile(r"\.(weight[._]\w+|SCB)$")  # scales and the like, which from_pretrained leaves out
# How far a token may move the logits before it, relative to the largest: rounding. In a bidirectional model
# it moves them by .005 (tiny, untrained) to 1.
_AHEAD = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


def check_attention(name: str | None) -> None:
    """SaerlError for an attention that transformers lacks; kernels of the hub ("a/b") are left to it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

    names = ["eager", *KNOWN.valid_keys()]
    if name is not None and "/" not in name and name not in names:
        raise SaerlError(f"model.attn={name} is unknown; choose one of {', '.join(sorted(names))}")


def check_kind(path: str, settings: Any) -> None:
    """SaerlError for a configuration of anything but a causal language model with plain weights.

    Some quantised weights can be made plain when they are loaded; ``save_pretrained`` then writes them
    quantised, beside a configuration that does not say so.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    head = next((n for n in getattr(settings, "architectures", None) or () if _OTHER_HEAD.search(n)), None)
    kind = f"has the head of a {head}" if head else None
    if getattr(settings, "is_encoder_decoder", False):
        kind = f"is an encoder-decoder ({settings.model_type})"
    elif not own and type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = f"is a {settings.model_type}, of which transformers has no causal language model"
    if quantised := getattr(settings, "quantization_config", None):
        method = (isinstance(quantised, dict) and quantised.get("quant_method")) or "by no named method"
        raise SaerlError(f"model {path} is quantised ({method}); use a copy with plain weights")
    if kind:
        raise SaerlError(f"model {path} {kind}; use a decoder-only causal language model")


def check_stored(path: str, files: Sequence[Path]) -> None:
    """SaerlError for a weight that is no floating-point number in its file, which from_pretrained would make
    one of without its scale."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as stored:  # said by loading
            names = stored.keys()
            for name in names:
                kind = stored.get_slice(name).get_dtype()
                if name.endswith(".weight") and not kind.startswith(("F", "BF")):
                    raise SaerlError(
                        f"the files of model {path} hold {name} as {kind}: it is quantised, which its "
                        "configuration does not say; use a copy with plain weights"
                    )


def check_weights(path: str, found: dict[str, Any]) -> None:
    """SaerlError for weights that the files lack, which would be random; a warning for those left over."""
    wrong = {name[0]: f"is {tuple(name[1])}, not {tuple(name[2])}" for name in found["mismatched_keys"]}
    wrong |= dict.fromkeys(found["missing_keys"], "is missing")
    if wrong:
        name = min(wrong)
        more = f" (and {len(wrong) - 1} more are wrong)" if len(wrong) > 1 else ""
        raise SaerlError(
            f"the files of model {path} do not fit its configuration: the weight {name} {wrong[name]}{more}; "
            "use a complete checkpoint of a causal language model"
        )
    extra = sorted(found["unexpected_keys"])
    if scale := next(filter(_OF_A_WEIGHT.search, extra), None):
        raise SaerlError(
            f"the files of model {path} hold {scale}, which its configuration does not name: the weight "
            "beside it is quantised, or to be made from several; use a copy with plain weights"
        )
    if extra:
        log.warning("model %s: %d weights in its files are not used, such as %s", path, len(extra), extra[0])


@torch.no_grad()
def check_causal(model: Any, path: str) -> None:
    """SaerlError when the model ``path`` cannot read ids, or a token changes the predictions before it."""
    rows = model.get_input_embeddings().weight.shape[0]
    pad = getattr(text_config(model), "pad_token_id", None) or 0
    *row, other = [token for token in range(1, 8) if token != pad][:6]
    padded = [*row[:2], pad, *row[3:]]
    ids = torch.tensor([row, [*row[:4], other], padded], device=model.device) % rows
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        shorter = model(input_ids=ids[2:, :4], use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0][:150].rstrip(".")
        raise SaerlError(
            f"model {path} cannot read a row of tokens ({reason}); use a decoder-only causal language model"
        ) from err
    ahead = (logits[0, :-1] - logits[1, :-1]).abs().max() / logits.abs().max()
    if ahead > _AHEAD.get(model.dtype, 0.05):
        raise SaerlError(
            f"model {path} is no causal language model: a token changes the predictions before it; "
            "use a decoder-only one"
        )
    if (logits[2, 3] - shorter[0, 3]).abs().max() > 0.3 * logits.abs().max():  # XLM counts what is no padding
        raise SaerlError(
            f"model {path} takes its pad token ({pad}) for padding also where it is sampled: what it "
            "predicts then changes with the tokens that follow; use another model"
        )


def check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """A tokenizer with more ids than embedding rows would index out of bounds in the middle of a run."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    rows = embeddings.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise SaerlError(
            f"the tokenizer of {path} has ids up to {largest} but the model embeds {rows}; "
            "use the tokenizer the model was trained with, or resize the embeddings and save the model again"
        )
    output = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and output is not None and output.weight is not embeddings:
        model.tie_weights()


def check_finite(model: nn.Module, path: str) -> None:
    """One NaN makes every logit NaN. Sums are looked at first: they cost one pass and no memory."""
    named = [(name, p.data) for name, p in model.named_parameters() if p.is_floating_point()]
    for name, weight in named:
        exact = weight if weight.element_size() > 1 else weight.float()  # float8 cannot be summed
        if not exact.sum(dtype=torch.float32).isfinite() and not exact.isfinite().all():
            count = int((~exact.isfinite()).sum())
            raise SaerlError(
                f"model {path}: {count} of {weight.numel()} values of {name} are NaN or infinite; copy it "
                "again, or use another checkpoint"
            )
