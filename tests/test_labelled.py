"""Columns that scoring reads are checked before an SAE is trained or a prompt is read."""

from __future__ import annotations

import numpy as np
import pytest

from saerl_fast.config import Config, DifficultyConfig, QualityConfig, ScoreConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool
from saerl_fast.signals.labelled import label_columns

INF = float("inf")
FLAGS, SCORE = QualityConfig(label_column="q"), QualityConfig(label_column="q", head="ridge")


def pool(**columns):
    rows = {"prompt_id": ["a", "b"], "prompt": ["A?", "B?"], "answer": ["1", "2"]}
    return Pool(rows | columns)


@pytest.mark.parametrize(
    ("columns", "sections", "said"),
    [
        ({"q": [1, 2]}, {"quality": QualityConfig(label_column="q")}, "label 2.0 is neither 0 nor 1"),
        ({"q": [1, INF]}, {"quality": QualityConfig(label_column="q")}, "label inf is neither 0 nor 1"),
        (
            {"q": [1, INF]},
            {"quality": QualityConfig(label_column="q", head="ridge")},
            "label inf is no score",
        ),
        (
            {"q": [1, -1e31]},
            {"quality": QualityConfig(label_column="q", head="ridge")},
            r"label -1e\+31 is no score; use numbers up to 1e\+30",
        ),
        ({"q": ["ok", 1]}, {"quality": QualityConfig(label_column="q")}, "'ok' in row 0; use numbers"),
        ({"r": ["0.5", "0_5"]}, {"difficulty": DifficultyConfig(label_column="r")}, "holds '0_5' in row 1"),
        ({"r": [10**400, 1]}, {"difficulty": DifficultyConfig(label_column="r")}, "holds 10{79} in row 0"),
        ({}, {"quality": QualityConfig(label_column="q")}, "no column 'q'|has no.*'q'|q"),
        ({}, {"quality": QualityConfig(kind_column="what")}, "what"),
        ({"r": [0.5, 64]}, {"difficulty": DifficultyConfig(label_column="r")}, "pass rate 64.0 is not in"),
        ({"r": [INF, None]}, {"difficulty": DifficultyConfig(label_column="r")}, "pass rate inf is not in"),
        (
            {"answer": [None, None]},
            {"score": ScoreConfig(features=["sae", "answer_logprob"])},
            "score.features names answer_logprob, but the pool has no answers",
        ),
        (
            {"answer": [None, ""]},
            {"difficulty": DifficultyConfig(features=["answer_text"])},
            "difficulty.features names answer_text, but the pool has no answers",
        ),
    ],
)
def test_bad_columns_are_a_sentence_at_once(columns, sections, said):
    with pytest.raises(SaerlError, match=said):
        label_columns(pool(**columns), Config(**sections))


def test_good_columns_are_read():
    quality = QualityConfig(label_column="q", kind_column="what")
    config = Config(quality=quality, difficulty=DifficultyConfig(label_column="r", features=["answer_text"]))
    labels, rates = label_columns(pool(q=[True, None], r=["0.25", None], what=["fine", "?"]), config)
    assert labels[0] == 1 and rates[0] == 0.25 and np.isnan([labels[1], rates[1]]).all()
    assert label_columns(pool(q=[-3, 7]), Config(quality=SCORE))[0].tolist() == [-3, 7]
