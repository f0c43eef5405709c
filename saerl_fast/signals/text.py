"""What the text of a prompt says by itself: counts of its marks, and TF-IDF."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NUMBER = re.compile(r"\d+")
COUNTS: dict[str, Callable[[str], int]] = {  # the columns of `surface`; the first is the length
    "characters": len,
    "words": lambda text: len(text.split()),
    "lines": lambda text: text.count("\n"),
    "digits": lambda text: sum(map(str.isdigit, text)),
    "numbers": lambda text: len(NUMBER.findall(text)),
    "sentence ends": lambda text: len(re.findall(r"[.?!;。？！]", text)),
    "question marks": lambda text: text.count("?") + text.count("？"),
    "equals signs": lambda text: text.count("="),
    "powers": lambda text: text.count("^"),
    "braces": lambda text: text.count("{"),
    "LaTeX commands and escapes": lambda text: text.count("\\"),
    "LaTeX formulas": lambda text: text.count("$"),
}
SINGLE = "\u3040-\u9fff"  # of scripts without spaces a letter is a term
MARKS = (
    "[asy]",
    "\\(",
    "\\[",
    "$$",
    "\\begin",
    "\\frac",
    "```",
    "**",
    "|",
    "#",
    "<",
    "_",
    ":",
    '"',
)  # see `look`
TOKEN = rf"[{SINGLE}]|\\?[^\W\d_{SINGLE}]+|\d+|[^\w\s]"  # else words and LaTeX commands, numbers, signs


def plain(prompt: Any) -> str:
    """The text of a prompt that may be chat messages."""
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)


class Plain(Sequence[str]):
    """The texts of prompts, made when they are read."""

    def __init__(self, prompts: Sequence[Any]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return (
            [plain(prompt) for prompt in self.prompts[at]]
            if isinstance(at, slice)
            else plain(self.prompts[at])
        )

    def __iter__(self) -> Iterator[str]:
        return map(plain, self.prompts)


def surface(texts: Sequence[str]) -> np.ndarray:
    """log(1 + count) of the marks in COUNTS, float64 [n, len(COUNTS)]."""
    counts = np.array([[count(text) for count in COUNTS.values()] for text in texts], dtype=np.float64)
    return np.log1p(counts.reshape(len(texts), len(COUNTS)))


def look(texts: Sequence[str]) -> np.ndarray:
    """How texts look, whatever they say: `surface`, and which of MARKS they hold, float64 [n, columns]."""
    held = np.array([[mark in text for mark in MARKS] for text in texts], dtype=np.float64)
    return np.hstack([surface(texts), held.reshape(len(texts), len(MARKS))])


class Tfidf:
    """TF-IDF of single terms and pairs (scikit-learn's), of at most ``columns`` columns, the most frequent in
    the texts that it is made from. Of few or empty texts there may be no columns at all.
    """

    def __init__(self, texts: Sequence[str], columns: int = 1 << 15) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        few = 2 if len(texts) < 1000 else 3  # a term must occur in so many texts
        self._terms = TfidfVectorizer(
            token_pattern=TOKEN,
            ngram_range=(1, 2),
            sublinear_tf=True,
            min_df=few,
            max_features=columns,
            dtype=np.float32,
        )
        self._none = False
        try:
            self._terms.fit(texts)
        except ValueError:  # no term is left
            self._none = True

    def __call__(self, texts: Sequence[str]) -> csr_matrix:
        """CSR float32 [n, columns], rows of norm 1."""
        from scipy.sparse import csr_matrix

        return csr_matrix((len(texts), 0), dtype=np.float32) if self._none else self._terms.transform(texts)
