"""Prompts as a model reads them: the final text and token ids of every row, made once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import token_ids
from saerl_fast.prompts.pool import Pool

log = logging.getLogger(__name__)


@dataclass
class Prompts(Pool):
    """A pool whose rows a model can read. Whatever reads a prompt or an answer takes it from here.

    ``texts`` [n]: the final prompts, with the chat template. ``ids`` [n]: their token ids, at least one each.
    ``answer_ids`` [n]: token ids of the answers, without special tokens: prompt and answer are tokenised
    apart, as in rollouts, where a completion's tokens follow the prompt's.
    """

    texts: list[str]
    ids: list[list[int]]
    answer_ids: list[list[int]]

    def select(self, indices: Sequence[int]) -> Prompts:
        """The rows at ``indices``, in that order."""
        return Prompts(
            super().select(indices).columns,
            [self.texts[i] for i in indices],
            [self.ids[i] for i in indices],
            [self.answer_ids[i] for i in indices],
        )


def prepare(
    pool: Pool, tokenizer: Any, cfg: DataConfig | None = None, *, limit: int | None = None
) -> Prompts:
    """Render and tokenise every row of ``pool``; rows of too many tokens are dropped, with a log line.

    ``cfg`` says how prompts are rendered, and the most tokens of one (`max_prompt_tokens`). ``limit``: tokens
    the model can take for a prompt (its positions less the new tokens), where that is known; the smaller of
    the two holds. Raises SaerlError, naming it, when no row is short enough, and for a prompt of no tokens.
    """
    cfg = cfg or DataConfig()
    most, which, fix = cfg.max_prompt_tokens, "data.max_prompt_tokens", "raise it"
    if limit is not None and limit < most:
        most, which = limit, "the model's positions less train.rollout.max_new_tokens"
        fix = "lower max_new_tokens, or use a model that reads more"
    texts = render(pool, tokenizer, cfg)
    ids = token_ids(tokenizer, texts)
    empty = next((i for i, row in enumerate(ids) if not row), None)
    if empty is not None:
        name = pool.column("prompt_id")[empty]
        raise SaerlError(f"prompt {name!r} ({texts[empty][:40]!r}) has no tokens; remove it from the pool")
    answers = token_ids(tokenizer, [str(answer or "") for answer in pool.column("answer")], special=False)
    made = Prompts(pool.columns, texts, ids, answers)
    keep = [i for i, row in enumerate(ids) if len(row) <= most]
    if len(keep) == len(pool):
        return made
    if not keep:
        shortest = min(len(row) for row in ids)
        raise SaerlError(
            f"all {len(pool)} prompts are longer than {which}={most} (the shortest has {shortest}); {fix}"
        )
    log.warning("dropped %d of %d prompts over %d tokens (%s)", len(pool) - len(keep), len(pool), most, which)
    return made.select(keep)


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
