"""Which tokens of a rendered chat are its messages' own, and which the chat template's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from saerl_fast.models.layout import token_ids
from saerl_fast.prompts.chats import Messages

log = logging.getLogger(__name__)

Spans = Sequence[int]  # ranges of tokens: start, end, start, end ...


def own_tokens(
    tokenizer: Any,
    chats: Sequence[Messages],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    write: Callable[[Messages], str],
    prefill: str = "",
) -> list[Spans]:
    """The tokens of each chat that come from its messages' contents; all where that cannot be told (said).

    ``texts``, ``ids``: the rendered chats; ``write`` renders one, to which ``prefill`` is added. The template
    is rendered once for every sequence of roles, with marks for contents: what stands between the marks is
    the template's, and must stand between the contents as well. Tokens that hold both count as own.
    """
    between: dict[tuple[str, ...], list[str] | None] = {}
    ends: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    found: list[Spans] = [(0, len(row)) for row in ids]
    places: dict[int, list[tuple[int, int]]] = {}  # characters, of rows whose tokens have to be asked for
    unsure = 0
    for i, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        roles = tuple(message["role"] for message in chat)
        if roles not in between:
            between[roles] = _between(roles, write, prefill)
            parts = between[roles] or [""]
            head, tail = token_ids(tokenizer, [parts[0], parts[-1]], special=False)
            ends[roles] = head, tail
        spans = _contents(chat, between[roles], text)
        if spans is None:
            unsure += 1
            continue
        head, tail = ends[roles]
        row = list(ids[i])
        stop = len(row) - len(tail)
        if len(roles) == 1 and row[: len(head)] == head and row[stop:] == tail and len(head) < stop:
            found[i] = (len(head), stop)
        else:
            places[i] = spans
    unsure += _by_offsets(tokenizer, texts, places, found)
    if unsure:
        log.warning(
            "the chat template's tokens cannot be told from the messages' own in %d of %d prompts: features "
            "of all their tokens are pooled",
            *(unsure, len(chats)),
        )
    return found


def _between(roles: tuple[str, ...], write: Callable[[Messages], str], prefill: str) -> list[str] | None:
    """What the template writes before, between and after the contents; None where that is not plain."""
    marks = [f"Qx{i}jZvK{i}wQ" for i in range(len(roles))]
    try:
        text = write([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
    except Exception:  # a template may look into contents
        return None
    parts = re.split("|".join(marks), text + prefill)
    return parts if re.findall("|".join(marks), text) == marks else None


def _contents(chat: Messages, between: list[str] | None, text: str) -> list[tuple[int, int]] | None:
    """Where the contents stand in ``text``, in characters: as they are, or without spaces around them."""
    for trim in (str, str.strip):
        contents = [trim(message["content"]) for message in chat]
        if between and text == "".join(a + b for a, b in zip(between, [*contents, ""], strict=True)):
            spans, at = [], 0
            for part, content in zip(between, contents, strict=False):
                at += len(part)
                spans.append((at, at + len(content)))
                at += len(content)
            return spans
    return None


def _by_offsets(
    tokenizer: Any, texts: Sequence[str], places: dict[int, list[tuple[int, int]]], found: list[Spans]
) -> int:
    """Put the tokens of ``places`` into ``found``; of how many rows they are not known."""
    if not places:
        return 0
    if not getattr(tokenizer, "is_fast", False):
        return len(places)
    rows = tokenizer([texts[i] for i in places], add_special_tokens=False, return_offsets_mapping=True)
    unsure = 0
    for (i, spans), offsets in zip(places.items(), rows["offset_mapping"], strict=True):
        own = [any(start < b and a < end for a, b in spans) for start, end in offsets]
        edges = [at for at in range(len(own) + 1) if (own + [False])[at] != ([False] + own)[at]]
        if edges and len(own) == found[i][1]:
            found[i] = tuple(edges)
        else:
            unsure += 1
    return unsure
