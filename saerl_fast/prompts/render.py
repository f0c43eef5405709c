"""Prompts as a tokenizer's model reads them: final texts, and which of them fit."""

from __future__ import annotations

import logging
from typing import Any

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool

log = logging.getLogger(__name__)


def render(pool: Pool, tokenizer: Any, cfg: DataConfig) -> list[str]:
    """Final prompt strings, to be tokenised with the tokenizer's defaults.

    A chat template is applied when ``cfg.chat`` says so. A beginning-of-sequence token that both the
    template and the tokenizer would add is kept once: it is removed from the string. Raises SaerlError
    when the template rejects a prompt's messages (some know no system role, say).
    """
    template = getattr(tokenizer, "chat_template", None)
    if cfg.chat == "always" and not template:
        raise SaerlError("data.chat=always, but the tokenizer has no chat template; use data.chat=never")
    prompts = pool.column("prompt")
    if cfg.chat == "never" or not template:
        return [p if isinstance(p, str) else "\n\n".join(m["content"] for m in p) for p in prompts]
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    try:
        from jinja2 import TemplateError
    except ImportError:
        raise SaerlError(
            "the tokenizer's chat template needs jinja2; pip install jinja2, or set data.chat=never"
        ) from None
    texts = []
    for name, chat in zip(pool.column("prompt_id"), chats, strict=True):
        try:
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except TemplateError as err:
            roles = ", ".join(message["role"] for message in chat)
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
            raise SaerlError(
                f"the chat template rejects prompt {name!r} with roles {roles} ({reason}); "
                "change its messages, or set data.chat=never"
            ) from None
    bos = getattr(tokenizer, "bos_token", None)
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        texts = [text.removeprefix(bos) for text in texts]
    return texts


def fit_context(pool: Pool, tokenizer: Any, cfg: DataConfig, *, limit: int | None = None) -> Pool:
    """The rows whose rendered prompt has at most `max_prompt_tokens` tokens; the others are logged.

    ``limit``: tokens the model can take for a prompt (its positions less `max_new_tokens`), where that
    is known; the smaller of the two holds. Raises SaerlError, naming it, when no row is short enough.
    """
    most, which, fix = cfg.max_prompt_tokens, "data.max_prompt_tokens", "raise it"
    if limit is not None and limit < most:
        most, which = limit, "the model's positions less train.rollout.max_new_tokens"
        fix = "lower max_new_tokens, or use a model that reads more"
    texts = render(pool, tokenizer, cfg)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    keep = [i for i, length in enumerate(lengths) if length <= most]
    if not keep:
        raise SaerlError(
            f"all {len(pool)} prompts are longer than {which}={most} (the shortest has {min(lengths)}); {fix}"
        )
    if len(keep) < len(pool):
        dropped = len(pool) - len(keep)
        log.warning("dropped %d of %d prompts over %d tokens (%s)", dropped, len(pool), most, which)
    return pool.select(keep)
