"""Features of a prompt's own text."""

from __future__ import annotations

import numpy as np
import pytest

from saerl_fast.signals.text import COUNTS, MARKS, Tfidf, look, plain, surface


def test_counts_are_of_the_text() -> None:
    text = "Solve $x^2 = 12$.\nWhat is \\frac{1}{3}?"
    expected = [len(text), 7, 1, 5, 4, 2, 1, 1, 1, 2, 1, 2]
    np.testing.assert_allclose(surface([text, ""]), np.log1p([expected, [0] * len(COUNTS)]))
    assert surface([]).shape == (0, len(COUNTS))


def test_chats_are_read_as_their_contents() -> None:
    assert plain("a") == "a"
    assert plain([{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]) == "b\nc"
    assert plain([{"role": "assistant", "tool_calls": []}]) == ""


def test_tfidf_knows_words_commands_signs_and_scripts_without_spaces() -> None:
    texts = ["\\frac is 12", "\\frac was 12", "求三角形的面积", "求三角形的周长"] * 2
    rows = Tfidf(texts, columns=50)(texts)
    assert rows.shape == (8, rows.shape[1]) and rows.shape[1] <= 50 and rows.dtype == np.float32
    close = (rows @ rows.T).toarray()
    assert close[2, 3] > 0.3 > 0.1 > close[0, 2]


@pytest.mark.parametrize("texts", [["", ""], ["one"], []])
def test_texts_without_terms_have_no_columns(texts: list[str]) -> None:
    assert Tfidf(texts)(texts).shape == (len(texts), 0)


def test_the_look_of_a_text_is_its_counts_and_marks() -> None:
    found = look(["Find \\(x\\).", "a_b"])
    assert found.shape == (2, len(COUNTS) + len(MARKS))
    np.testing.assert_array_equal(found[:, : len(COUNTS)], surface(["Find \\(x\\).", "a_b"]))
    assert [MARKS[i] for i in np.flatnonzero(found[1, len(COUNTS) :])] == ["_"]
    assert MARKS[int(np.argmax(found[0, len(COUNTS) :]))] == "\\("
