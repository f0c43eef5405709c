r"""Lists, sets, tuples, intervals and named values, taken apart as they are written."""

from __future__ import annotations

import re

_NAME = re.compile(r"\s*([a-zA-Z])(?:_?\w|_\{\w+\})?\s*=")
THOUSANDS = re.compile(r"[-+$]*[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\W*")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def named_values(text: str) -> dict[str, str]:
    """Names and values of ``x=5, y=3``, by the alphabet where the letters are neighbours there, as they are
    else; empty for anything else."""
    if whole := re.fullmatch(r"\(\s*(\w(?:\s*,\s*\w)+)\s*\)\s*=\s*\((.*)\)", text):
        letters, inner = whole[1].split(","), split(whole[2], ",")
        text = (
            ",".join(map("=".join, zip(letters, inner, strict=False))) if len(letters) == len(inner) else ""
        )
    parts = [
        part.split("=") for part in split(re.sub(r"\s(?:and|\\land)\s", ",", text), ",;") if part.strip()
    ]
    names = [part[0].strip() for part in parts]
    if len(names) < 2 or len({*names}) < len(names) or {len(part) for part in parts} != {2}:
        return {}
    if not all(re.fullmatch("[a-zA-Z]", name) for name in names):
        return {}
    values = {name: part[1].strip() for name, part in zip(names, parts, strict=True)}
    letters = sorted(names)
    neighbours = all(ord(b) - ord(a) == 1 for a, b in zip(letters, letters[1:], strict=False))
    return {name: values[name] for name in letters} if neighbours else values


def as_tuple(text: str, named: dict[str, str], other: str) -> str:
    """Named values as the tuple that ``other`` is."""
    return f"({', '.join(named.values())})" if named and other.startswith("(") else text


def parts_of(text: str) -> tuple[str, list[str]] | None:
    r"""Brackets ("" for a bare list, "{" for a set) and parts of a list; two values for one with \pm."""
    text = text.strip()
    text = re.sub(r"\\[{}]", lambda m: m[0][1], text)
    if text and text[0] in _PAIRS and closing(text) == len(text) - 1 and not text.startswith("{}"):
        inner = split(_ungrouped(text[1:-1]), ",;")
        brackets = "{" if text[0] == "{" else text[0] + text[-1]
        if len(inner) > 1 or text[0] == "{":
            return brackets, [v for part in inner for v in _both(part)] if brackets == "{" else inner
        return None
    text = _ungrouped(text)
    listed = re.sub(r",?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*,?", ",", text)
    inner = [v for part in split(listed, ",;") for v in _both(part) if part.strip()]
    if len(inner) < 2:
        return None
    names = [_NAME.match(part) for part in inner]
    letters = {name[1] for name in names if name}
    if len(letters) == 1 and all(name or "=" not in part for name, part in zip(names, inner, strict=True)):
        inner = [_NAME.sub("", part) for part in inner]
    return "", inner


def _ungrouped(text: str) -> str:
    """A list without its thousands commas, which no blank follows where one follows what separates."""
    if re.search(r"[(\[{]", text) or not re.search(r",\s|;|\b(?:and|or)\b", text):
        return text
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _both(part: str) -> list[str]:
    r"""``1 \pm x`` as two values."""
    if part.count("\\pm") != 1:
        return [part.strip()]
    return [part.replace("\\pm", sign).strip().lstrip("+").strip() for sign in ("+", "-")]


def closing(text: str) -> int:
    """Where the bracket that opens ``text`` closes; round and square ones may close each other."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i
    return -1


def split(text: str, separators: str) -> list[str]:
    """``text`` at its separators outside all brackets; a thousands comma is none."""
    if THOUSANDS.fullmatch(text):
        return [text]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char in separators and text[i - 1 : i] != "\\":
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
