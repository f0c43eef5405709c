"""Kinds of features by name: the same rows whichever way they are asked for, and predictions in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.signals import bank as module
from saerl_fast.signals import features, ridge
from saerl_fast.signals.bank import Bank
from saerl_kernels import CSR


def make(n: int = 60) -> Bank:
    rng = np.random.default_rng(0)
    dense = torch.tensor(rng.gamma(2.0, size=(n, 20)) * (rng.random((n, 20)) < 0.3), dtype=torch.float32)
    texts = [f"take {i} from {'many' if i % 3 else 'few'}" for i in range(n)]
    return Bank(CSR.from_dense(dense), texts, {"answer": CSR.from_dense(2 * dense)})


@pytest.mark.parametrize("kind", ["sae", "text", "tfidf", "length", "answer"])
def test_a_slice_and_an_index_give_the_same_rows(kind: str) -> None:
    rows = make().kinds[kind]
    parts = [rows(slice(10, 30)), rows(np.arange(10, 30))]
    dense = [part if isinstance(part, np.ndarray) else part.toarray() for part in parts]
    np.testing.assert_array_equal(*dense)
    assert len(dense[0]) == 20


def test_predictions_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, at = make(), np.arange(60)
    made = bank.blocks(["sae", "text", "tfidf"], at)
    fit = ridge.fit(made, np.arange(0, 60, 2), np.sin(np.arange(30.0)))
    monkeypatch.setattr(features, "BLOCK", 7)
    np.testing.assert_allclose(bank.predict(fit, made), fit.predict(made), atol=1e-6)


def test_blocks_are_made_of_the_labelled_rows_and_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 20)
    labelled = np.arange(60) < 8
    rows = make().fitted(labelled, 0)
    assert set(range(8)) <= set(rows) and len(rows) == 20 and (np.diff(rows) > 0).all()
    monkeypatch.setattr(module, "MOST", 5)
    rows = make().fitted(np.arange(60) < 50, 0)
    assert (rows < 50).sum() == 5 and len(rows) == 15


def test_what_is_kept_is_read_by_name() -> None:
    hidden = np.arange(120, dtype=np.float32).reshape(60, 2)
    bank = Bank(make().X, ["t"] * 60, {"hidden": hidden}, [str(i) for i in range(60)])
    assert bank.names(None, "x") == ["length", "text", "tfidf", "answer_text", "sae", "hidden"]
    np.testing.assert_array_equal(bank.kinds["hidden"](np.array([3, 1])), hidden[[3, 1]])
    np.testing.assert_allclose(bank.kinds["answer_text"](slice(9, 11))[:, 0], np.log1p([1, 2]))
    with pytest.raises(SaerlError, match="scalars.*add it to score.features"):
        bank.names(["scalars"], "difficulty.features")
    with pytest.raises(SaerlError, match="the pool has no answers"):
        Bank(make().X, ["t"] * 60, None, [""] * 60).names(["answer_text"], "difficulty.features")


def test_the_control_says_nothing_and_is_the_same_again() -> None:
    rows = [make().kinds["random"](slice(0, 60)) for _ in range(2)]
    np.testing.assert_array_equal(*rows)
    assert abs(np.corrcoef(rows[0].T)[0, 1:]).max() < 0.5
