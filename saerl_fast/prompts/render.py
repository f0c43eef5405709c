"""Prompts as a model reads them: the final text and token ids of every row, made once."""

from __future__ import annotations

import datetime
import logging
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import token_ids
from saerl_fast.prompts.chats import Messages, is_prefilled
from saerl_fast.prompts.own import Spans, own_tokens
from saerl_fast.prompts.pool import Pool
from saerl_fast.records.packed import LARGE, Tokens, chosen, strings
from saerl_fast.records.spilled import rows_where

log = logging.getLogger(__name__)

BLOCK = 1 << 14  # texts made into tokens at a time
_SECONDS = 10.0  # for a prompt to be rendered: real templates take milliseconds
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # what templates call for the date
_DAY = datetime.datetime(2024, 7, 26)  # that Llama's templates write where the date is not known
_MARK = "QxjZvKwQ"
_OURS = (  # arguments of apply_chat_template that decide the form of its result
    *("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "padding"),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


@dataclass
class Prompts(Pool):
    """A pool whose rows a model can read. Whatever reads a prompt or an answer takes it from here.

    ``texts`` [n]: the final prompts, with the chat template. ``ids`` [n]: their token ids, at least one each.
    ``answer_ids`` [n]: token ids of the answers, without special tokens: prompt and answer are tokenised
    apart, as in rollouts, where a completion's tokens follow the prompt's. ``prefill``: the end of every
    text that belongs to the completion, for whoever judges it. ``own`` [n]: with a chat template, the tokens
    that are not the template's (see `own_tokens`).
    """

    texts: Sequence[str]
    ids: Sequence[list[int]]
    answer_ids: Sequence[list[int]]
    prefill: str = ""
    own: Sequence[Spans] | None = None

    def select(self, indices: Sequence[int] | np.ndarray) -> Prompts:
        """The rows at ``indices``, in that order."""
        return Prompts(
            super().select(indices).columns,
            chosen(self.texts, indices),
            chosen(self.ids, indices),
            chosen(self.answer_ids, indices),
            self.prefill,
            None if self.own is None else chosen(self.own, indices),
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
    templated = uses_template(tokenizer, cfg)
    ids = _tokens(tokenizer, texts, not templated)
    sizes = ids.sizes if isinstance(ids, Tokens) else np.array([len(row) for row in ids], dtype=np.int64)
    empty = next(iter(np.flatnonzero(sizes == 0).tolist()), None)
    if empty is not None:
        name = pool.column("prompt_id")[empty]
        raise SaerlError(f"prompt {name!r} ({texts[empty][:40]!r}) has no tokens; remove it from the pool")
    answers = _tokens(tokenizer, _Answers(pool.column("answer")), False)
    own = _own(tokenizer, cfg, pool.column("prompt"), texts, ids) if templated else None
    made = Prompts(pool.columns, texts, ids, answers, cfg.prefill, own)
    keep = rows_where(lambda part: sizes[part] <= most, len(sizes))
    if len(keep) == len(pool):
        return made
    if not len(keep):
        shortest = sizes.min()
        raise SaerlError(
            f"all {len(pool)} prompts are longer than {which}={most} (the shortest has {shortest}); {fix}"
        )
    log.warning("dropped %d of %d prompts over %d tokens (%s)", len(pool) - len(keep), len(pool), most, which)
    return made.select(keep)


class _Answers:
    """Answers as texts, made when they are read."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: slice) -> list[str]:
        return [str(answer or "") for answer in self.answers[rows]]


def _own(
    tokenizer: Any, cfg: DataConfig, prompts: Sequence[Any], texts: Sequence[str], ids: Sequence[list[int]]
) -> Sequence[Spans]:
    """`own_tokens` of all rows, many at a time."""
    parts = (slice(at, at + LARGE) for at in range(0, len(texts), LARGE))
    found = (
        spans
        for part in parts
        for spans in own_tokens(
            tokenizer,
            [_chat(prompt) for prompt in prompts[part]],
            texts[part],
            ids[part],
            partial(_write, tokenizer, cfg),
            cfg.prefill,
        )
    )
    return Tokens.of(found) if len(texts) > LARGE else list(found)


def _tokens(tokenizer: Any, texts: Sequence[str] | _Answers, special: bool) -> Sequence[list[int]]:
    """Token ids [n] of the texts; of many, made and kept in blocks, 4 bytes an id."""
    starts = range(0, len(texts), BLOCK)
    parts = (token_ids(tokenizer, texts[at : at + BLOCK], special=special) for at in starts)
    rows = (row for part in parts for row in part)
    return Tokens.of(rows) if len(texts) > BLOCK else list(rows)


def uses_template(tokenizer: Any, cfg: DataConfig) -> bool:
    """Whether prompts go through the chat template; SaerlError when they must and there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if cfg.chat == "always" and not template:
        raise SaerlError("data.chat=always, but the tokenizer has no chat template; use data.chat=never")
    return bool(template) and cfg.chat != "never"


def render(pool: Pool, tokenizer: Any, cfg: DataConfig) -> Sequence[str]:
    """Final prompt strings.

    Where `uses_template`, they are what the chat template writes with ``cfg.chat_template_kwargs``, to be
    tokenised without further special tokens, as `apply_chat_template(tokenize=True)`, TRL and vLLM do; a chat
    that ends with an assistant's message is continued from there. Else they are plain text, to be tokenised
    with the tokenizer's defaults. ``cfg.prefill`` follows. Raises SaerlError when the template rejects a
    prompt's messages (some know no system role, say), and for arguments that it does not read.
    """
    prompts = pool.column("prompt")
    if not uses_template(tokenizer, cfg):
        if cfg.chat_template_kwargs:
            raise SaerlError("data.chat_template_kwargs needs a chat template, and none is used; unset it")
        chats = sum(not isinstance(p, str) for p in prompts)
        if chats and cfg.chat != "never":
            log.warning(
                "the tokenizer has no chat template: the messages of %d prompts are joined by blank lines, "
                "without their roles; data.chat=never says that this is wanted",
                chats,
            )
        plain = (p if isinstance(p, str) else "\n\n".join(m["content"] for m in p) for p in prompts)
        return strings((text + cfg.prefill for text in plain), len(prompts))
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SaerlError(
            "the tokenizer's chat template needs jinja2; pip install jinja2, or set data.chat=never"
        ) from None
    template = str(tokenizer.chat_template)
    _check_arguments(template, cfg.chat_template_kwargs)
    _check_powers(template)
    if _TODAY.search(template) and "date_string" not in cfg.chat_template_kwargs:
        log.warning(
            "the chat template writes today's date; prompts have %s in its place, to be equal on every day",
            _DAY.strftime("%d %b %Y"),
        )
    tools = "tools" in pool.columns and "tools" not in cfg.chat_template_kwargs
    if tools and re.search(r"\btools\b", template):
        log.warning(
            "the column 'tools' is not given to the chat template; data.chat_template_kwargs.tools gives all "
            "prompts the same ones"
        )
    begun = sum(map(is_prefilled, prompts))
    if begun:
        log.warning(
            "%d of %d prompts end with a message of the assistant, which is continued; "
            "remove it from the data where it is the answer",
            *(begun, len(prompts)),
        )
    return strings(_rendered(pool, tokenizer, cfg), len(prompts))


def _rendered(pool: Pool, tokenizer: Any, cfg: DataConfig) -> Iterator[str]:
    """What the chat template writes of every prompt, with the prefill.

    SaerlError where it leaves out the message that is to be answered; other messages left out are said.
    """
    ignored: dict[tuple[str, ...], list[int]] = {}  # which messages, by the roles of a chat
    lost: list[str] = []
    for name, prompt in zip(pool.column("prompt_id"), pool.column("prompt"), strict=True):
        chat = _chat(prompt)
        try:
            with _within(_SECONDS):
                text = _write(tokenizer, cfg, chat)
            if not isinstance(text, str):
                raise TypeError(f"it gives a {type(text).__name__}, not text")
        except Exception as err:  # templates raise what they like, from TemplateError to OverflowError
            names = ", ".join(message["role"] for message in chat)
            reason = (str(err).strip().splitlines() or [""])[0].rstrip(".") or type(err).__name__
            raise SaerlError(
                f"the chat template rejects prompt {name!r} with roles {names} ({reason}); "
                "change its messages or data.chat_template_kwargs, or set data.chat=never"
            ) from None
        written = "".join(text.split())
        if not all("".join(message["content"].split()) in written for message in chat):
            roles = tuple(message["role"] for message in chat)
            if roles not in ignored:
                ignored[roles] = _ignored(tokenizer, cfg, chat, text)
            if len(roles) - is_prefilled(chat) - 1 in ignored[roles]:
                raise SaerlError(
                    f"the chat template leaves out the last message of prompt {name!r} with roles "
                    f"{', '.join(roles)}; change its messages, or set data.chat=never"
                )
            if ignored[roles]:
                lost.append(f"that of the role {roles[ignored[roles][0]]} of prompt {name!r}")
        yield text + cfg.prefill
    if lost:
        log.warning(
            "the chat template leaves out messages of %d of %d prompts, such as %s; put what matters into "
            "the user's message",
            *(len(lost), len(pool), lost[0]),
        )


def _ignored(tokenizer: Any, cfg: DataConfig, chat: Messages, text: str) -> list[int]:
    """Which messages, the assistant's aside, may say anything: the template writes the same ``text``."""
    found = []
    for i, message in enumerate(chat):
        if message["role"] != "assistant" and message["content"].strip():
            other = message | {"content": f"{_MARK} {message['content']} {_MARK}"}
            with suppress(Exception):  # one that looks into contents reads them
                if _write(tokenizer, cfg, [*chat[:i], other, *chat[i + 1 :]]) == text:
                    found.append(i)
    return found


def _chat(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _write(tokenizer: Any, cfg: DataConfig, chat: Messages) -> Any:
    way = "continue_final_message" if is_prefilled(chat) else "add_generation_prompt"
    how = {way: True, **cfg.chat_template_kwargs}
    if _TODAY.search(str(tokenizer.chat_template)):
        template = tokenizer.get_chat_template(tools=how.get("tools"))
        how["chat_template"] = _TODAY.sub(lambda m: repr(_DAY.strftime(m[2])), template)
    return tokenizer.apply_chat_template(chat, tokenize=False, **how)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError in a block that takes longer, where signals can end it: in the main thread, on POSIX."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _check_powers(template: str) -> None:
    """jinja's sandbox bounds ranges but not 9 ** 9 ** 9, which no signal ends."""
    from jinja2 import Environment, TemplateError

    with suppress(TemplateError):  # said when it is rendered
        if any(token[1:] == ("operator", "**") for token in Environment().lex(template)):
            raise SaerlError(
                "the chat template computes powers (**), which may never end; use another one, or set "
                "data.chat=never"
            )


def _check_arguments(template: str, arguments: dict[str, Any]) -> None:
    """SaerlError for what is ours to say, and for names the template does not read (jinja ignores them)."""
    for name in arguments:
        if name in _OURS:
            raise SaerlError(f"data.chat_template_kwargs.{name} is set by this project; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise SaerlError(
                f"the tokenizer's chat template does not read {name!r} (data.chat_template_kwargs); "
                "correct the name or remove it"
            )
