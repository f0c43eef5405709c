"""Chats as people keep them, as chat messages: ``[{"role": "user", "content": "..."}, ...]``."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

Messages = list[dict[str, Any]]

_ROLES = {  # of ShareGPT and its many relatives
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **{"system": "system", "tool": "tool", "function": "tool", "observation": "tool"},
}


def read_prompt(value: Any) -> str | Messages:
    """A prompt cell as text or chat messages with text contents.

    Read are: text; messages, also written as JSON text; messages whose content is a list of text parts
    (joined by line breaks, as vLLM does); ShareGPT's ``from`` and ``value``; a dictionary of lists, which
    `datasets` may make of a list of dictionaries. Raises ValueError with the end of a sentence on anything
    else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty")
        chat = _written_chat(value)
        if chat is None:
            return value
        value = chat
    if value is None:
        raise ValueError("is null")
    if isinstance(value, dict) and value and all(isinstance(part, (list, tuple)) for part in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is a {type(value).__name__}, not text or a list of chat messages")
    if not value:
        raise ValueError("has no chat messages")
    messages = [_message(message) for message in value]
    if all(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message but the assistant's")
    if not any(message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise ValueError("has no message with a text")
    return messages


def _written_chat(text: str) -> list[Any] | None:
    """The chat in a text that is one as JSON, or as Python prints it, as in a CSV file; None for other texts.

    ValueError for one that neither reads: pandas prints the arrays that Parquet gives it without commas.
    """
    if not text.lstrip().startswith("[") or not re.search(r"""["'](role|from)["']\s*:""", text):
        return None
    try:
        chat = json.loads(text)
    except (ValueError, RecursionError):
        try:
            chat = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            if re.fullmatch(r"""\s*\[\{'(?:role|from|content|value)': .*\}\]\s*""", text, re.DOTALL):
                raise ValueError("is a list as Python prints it; write the column with json.dumps") from None
            return None
    named = isinstance(chat, list) and all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in chat)
    return chat if named else None


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        role = _ROLES.get(message["from"].lower())
        if role is None:
            raise ValueError(
                f"has a chat message from {message['from']!r}, which is none of {', '.join(_ROLES)}; name it "
                'user, assistant or system, as in {"role": "user", "content": row["value"]}'
            )
        rest = {key: part for key, part in message.items() if key not in ("from", "value")}
        message = {"role": role, "content": message.get("value"), **rest}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("has a chat message without a role")
    role = _ROLES.get(message["role"].lower(), "")  # "human" is no role that a template knows
    if role in ("user", "assistant", "system") and role != message["role"]:
        message = message | {"role": role}
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        message = message | {"content": ""}
        content = ""
    return message if isinstance(content, str) else message | {"content": _text(content)}


def _text(content: Any) -> str:
    """The text of content parts ``[{"type": "text", "text": "..."}]``."""
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError("has a chat message without text content")
    found = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"has a content part of type {kind}, and only text is read; keep the text alone, as in "
                '"".join(part["text"] for part in content if part["type"] == "text")'
            )
        found.append(text)
    return "\n".join(found)


def wrap(prompt: str | Messages, template: str) -> str | Messages:
    """``prompt`` inside the template; of a chat the last message that is not the assistant's.

    Plain replacement, so that braces in either stay as they are.
    """
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    last = max(i for i, message in enumerate(prompt) if message["role"] != "assistant")
    wrapped = prompt[last] | {"content": template.replace("{prompt}", prompt[last]["content"])}
    return [*prompt[:last], wrapped, *prompt[last + 1 :]]


def is_prefilled(prompt: str | Messages) -> bool:
    """Whether the chat ends with the beginning of an answer, which is to be continued."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
