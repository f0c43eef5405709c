"""Scores of a pool: columns, held-out figures, files; and the whole of it on a tiny model."""

import json
import typing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saerl_fast.config import (
    Config,
    DifficultyConfig,
    DiversityConfig,
    QualityConfig,
    ScoreConfig,
    load_config,
)
from saerl_fast.errors import SaerlError
from saerl_fast.plan import build_plan
from saerl_fast.prompts.pool import Pool
from saerl_fast.records import packed
from saerl_fast.records.packed import Packed
from saerl_fast.signals import features as features_module
from saerl_fast.signals import table
from saerl_fast.signals.features import block
from saerl_fast.signals.labelled import label_columns
from saerl_fast.signals.scores import Scores, score, score_features
from saerl_fast.signals.shards import Shards
from saerl_fast.signals.stored import Stored
from saerl_kernels import CSR


def make_pool(n: int = 120, **columns) -> tuple[Pool, CSR]:
    rng = np.random.default_rng(0)
    task, good = rng.integers(0, 3, n), rng.random(n) < 0.8
    hidden = rng.random(n)
    on = rng.random((n, 60)) < 0.1
    for name in range(3):
        on[:, 5 * name : 5 * name + 5] |= (task == name)[:, None] & (rng.random((n, 5)) < 0.9)
    on[:, 20:28] = rng.random((n, 8)) < hidden[:, None]
    on[:, 30:40] |= (~good)[:, None] & (rng.random((n, 10)) < 0.6)
    dense = on * rng.gamma(5.0, 0.2, on.shape)
    base = {
        "prompt_id": [f"p{i}" for i in range(n)],
        "prompt": [f"question {i}" for i in range(n)],
        "answer": [str(i) for i in range(n)],
        "task": [f"t{name}" for name in task],
        "quality_label": [bool(g) if i % 2 else None for i, g in enumerate(good)],
        "rate": [float(1 - h) if i % 3 else None for i, h in enumerate(hidden)],
    }
    kept = {name: column for name, column in (base | columns).items() if column is not None}
    return Pool(kept), CSR.from_dense(torch.tensor(dense, dtype=torch.float32))


def make_config(**sections) -> Config:
    sections.setdefault("difficulty", DifficultyConfig(label_column="rate"))
    sections.setdefault("diversity", DiversityConfig(n_clusters=3, svd=16))
    return Config(**sections)


def test_all_three_signals_with_their_held_out_figures():
    pool, features = make_pool()
    scores = score_features(pool, features, None, make_config())
    metadata = scores.metadata
    assert metadata["quality"]["auc"] > 0.8 and metadata["quality"]["n_labels"] == 60
    assert metadata["difficulty"]["spearman"] > 0.4 and metadata["difficulty"]["n_labels"] == 80
    assert metadata["clusters"]["purity"] > 0.9 > 0.6 > metadata["clusters"]["purity_chance"]
    assert metadata["clusters"]["silhouette"] > metadata["clusters"]["null_max"]
    json.dumps(metadata, allow_nan=False)
    assert np.nanmax(scores.columns["saerl_pass_rate"]) <= 1
    plan = build_plan(scores, make_config().plan, batch_size=8, total_steps=4, seed=0)
    assert plan.schedule == "adaptive" and 5 < len(plan.dropped) < 60


def test_equal_prompts_are_counted_and_contradictions_named(caplog):
    texts = [f"question {'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{i // 100}x" for i in range(120)]
    texts[5], texts[9], texts[11] = "Question  ak0x", "question bk0x ", "question bk7x"
    answers = [str(i) for i in range(120)]
    answers[9] = answers[1]
    pool, features = make_pool(prompt=texts, answer=answers)
    found = score_features(pool, features, None, make_config()).metadata["duplicates"]
    assert found["rows"] == 2 and found["conflicting"] == 1 and found["conflicts"] == "p0, p5"
    assert found["renumbered"] == 18  # of the twenty from 100 on, all but those of 5, 9 and 11; and 11 itself
    assert "p0, p5" in caplog.text and "2 of 120" in caplog.text


def test_pass_rates_given_replace_the_column():
    pool, features = make_pool()
    rates = np.full(len(pool), np.nan)
    rates[:20] = np.arange(20) / 20
    scores = score_features(pool, features, None, make_config(), rates)
    assert scores.metadata["difficulty"]["n_labels"] == 20
    np.testing.assert_array_equal(scores.columns["saerl_pass_rate"], rates.astype(np.float32))


def test_missing_labels_leave_a_signal_unknown():
    pool, features = make_pool(quality_label=None, task=None)
    scores = score_features(pool, features, None, make_config(difficulty=DifficultyConfig()))
    assert scores.column("saerl_quality") is None and scores.column("saerl_difficulty") is None
    assert scores.metadata["quality"]["note"] and scores.metadata["difficulty"]["note"]
    assert "purity" not in scores.metadata["clusters"]
    assert scores.columns["saerl_quality"].dtype == np.float32


@pytest.mark.parametrize(
    "columns, sections, words",
    [
        ({}, {"quality": QualityConfig(label_column="rating")}, "'rating'"),
        ({}, {"difficulty": DifficultyConfig(label_column="nothing")}, "'nothing'"),
        ({"rate": ["0.5"] * 60 + ["hard"] * 60}, {}, "'hard'"),
        ({"quality_label": [0.5, 1.0] * 60}, {}, "quality label 0.5"),
    ],
)
def test_wrong_labels_are_refused(columns, sections, words):
    pool, features = make_pool(**columns)
    with pytest.raises(SaerlError, match=words):
        score_features(pool, features, None, make_config(**sections))


def test_labels_are_left_aside_where_their_column_is_null():
    pool, _ = make_pool(quality_label=[0.0, 1.0] * 60)
    null = load_config(None, ["quality.label_column=null"])
    assert np.isnan(label_columns(pool, null)[0]).all() and label_columns(pool, Config())[0][1] == 1


def test_empty_pool_and_wrong_rows_are_refused():
    pool, features = make_pool()
    with pytest.raises(SaerlError, match="no prompts"):
        score_features(pool.select([]), CSR.empty(0, 60), None, make_config())
    with pytest.raises(SaerlError, match="120 feature rows"):
        score_features(pool.select(range(7)), features, None, make_config())


def test_one_row_pool_is_scored():
    pool, features = make_pool()
    scores = score_features(pool.select([0]), features.select_rows([0]), None, make_config())
    assert len(scores) == 1 and scores.columns["saerl_cluster"].tolist() == [0]


def test_an_sae_that_never_fires_is_said(caplog):
    pool, _ = make_pool(40)
    scores = score_features(pool, CSR.empty(40, 60), None, make_config())
    assert "no feature of the SAE is active in any prompt" in caplog.text
    assert scores.metadata["clusters"]["n_clusters"] == 1


def test_files_give_the_same_scores_back(tmp_path):
    pool, features = make_pool()
    chat = [[{"role": "user", "content": text}] for text in pool.columns["prompt"]]
    pool.columns["prompt"] = chat
    scores = score_features(pool, features, None, make_config())
    scores.save(tmp_path)
    back = Scores.load(tmp_path)
    assert back.metadata == scores.metadata and back.prompt_ids == scores.prompt_ids
    assert back.columns["prompt"] == chat
    for name in ("saerl_cluster", "saerl_difficulty", "saerl_quality", "saerl_pass_rate"):
        assert back.columns[name].dtype == scores.columns[name].dtype
        np.testing.assert_array_equal(back.columns[name], scores.columns[name])
    assert torch.equal(back.features.to_dense(), features.to_dense())
    schema = pq.read_schema(tmp_path / "scores.parquet")
    assert json.loads(schema.metadata[b"saerl"])["quality"]["auc"] == scores.metadata["quality"]["auc"]
    kinds = {name: str(schema.field(f"saerl_{name}").type) for name in ("cluster", "difficulty", "quality")}
    assert kinds == {"cluster": "int32", "difficulty": "float", "quality": "float"}
    assert json.loads((tmp_path / "scores.json").read_text())["metadata"] == scores.metadata


def test_damaged_and_mixed_up_files_are_refused(tmp_path):
    with pytest.raises(SaerlError, match="saerl score"):
        Scores.load(tmp_path)
    pool, features = make_pool()
    score_features(pool, features, None, make_config()).save(tmp_path / "a")
    rows = list(range(119, -1, -1))
    turned = score_features(pool.select(rows), features.select_rows(rows), None, make_config())
    turned.save(tmp_path / "b")
    file = tmp_path / "a" / "features.safetensors"
    kept = file.read_bytes()
    with pytest.raises(SaerlError, match="features.safetensors is damaged.*make it again with `saerl score`"):
        file.write_bytes(kept[:-1] + b"?")
        Scores.load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()  # as files that were copied alone
    file.write_bytes((tmp_path / "b" / "features.safetensors").read_bytes())
    with pytest.raises(SaerlError, match="other prompts"):
        Scores.load(tmp_path / "a")
    file.write_bytes(kept)
    parquet = tmp_path / "a" / "scores.parquet"
    parquet.write_bytes(parquet.read_bytes()[:500])
    with pytest.raises(SaerlError, match="damaged"):
        Scores.load(tmp_path / "a")
    parquet.unlink()
    with pytest.raises(SaerlError, match="does not exist"):
        Scores.load(tmp_path / "a")


def test_unwritable_columns_and_folders_are_refused(tmp_path):
    with pytest.raises(SaerlError, match="'mixed'"):
        Scores({"prompt_id": ["a", "b"], "mixed": [1, "x"]}).save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaerlError, match="cannot write"):
        Scores({"prompt_id": ["a"]}).save(tmp_path / "file")
    with pytest.raises(SaerlError, match="prompt_id"):
        Scores({"prompt": ["a"]})


def test_a_plan_from_loaded_scores_is_the_same(tmp_path):
    pool, features = make_pool()
    scores = score_features(pool, features, None, make_config())
    scores.save(tmp_path)
    for schedule in ("literal", "global", "adaptive"):
        cfg = make_config().plan
        cfg.schedule = schedule
        both = [
            build_plan(s, cfg, batch_size=8, total_steps=6, seed=1) for s in (scores, Scores.load(tmp_path))
        ]
        assert [both[0].next_batch() for _ in range(6)] == [both[1].next_batch() for _ in range(6)]
        assert both[0].dropped == both[1].dropped


def test_a_pool_scored_by_a_model_and_its_sae():
    """Prompt and answer features of a random model, pooled as the config says, reach the probes."""
    from saerl_fast.sae.model import SAE, SAESpec
    from saerl_fast.sae.pooled import pooled_features
    from tests.tiny_lm import session_of, tiny_model

    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 99, (40, 2))
    texts = [f"{a}+{b}=" if i % 2 else f"what is {a}?" for i, (a, b) in enumerate(pairs)]
    labels = [float(i % 2) for i in range(40)]
    columns = {"prompt_id": [str(i) for i in range(40)], "prompt": texts, "answer": ["7"] * 40}
    pool = Pool({**columns, "quality_label": labels})
    weights = torch.randn(32, 64)
    cfg = SAESpec("topk", k=4, hook_layer=1)
    sae = SAE(weights, torch.zeros(64), weights.T.contiguous(), torch.zeros(32), cfg=cfg)
    model, done = tiny_model(), []
    config = make_config(difficulty=DifficultyConfig(), score=ScoreConfig(reduce="mean"))
    session = session_of(model, pool)
    scores = score(session, sae, config, on_progress=lambda part, whole: done.append((part, whole)))
    expected, _ = pooled_features(model, sae, session.train.ids, reduce="mean")
    torch.testing.assert_close(scores.features.to_dense(), expected.to_dense())
    assert not scores.metadata["quality"]["reads_answers"] and scores.metadata["quality"]["auc"] > 0.9
    assert scores.metadata["seconds"]["features"] > 0 and done[-1][0] == done[-1][1]
    config.score.include_answer = True
    assert score(session, sae, config).metadata["quality"]["reads_answers"]


def test_the_config_offers_every_reduction():
    """saerl_fast.config imports no kernels, so it repeats their names."""
    from saerl_kernels._check import REDUCES

    assert set(typing.get_args(typing.get_type_hints(ScoreConfig)["reduce"])) == set(REDUCES)


def test_features_in_files_are_scored_and_planned_as_those_in_memory(tmp_path, monkeypatch):
    pool, whole = make_pool()
    expected = score_features(pool, whole, None, make_config())
    monkeypatch.setattr(features_module, "SAMPLE", 100)
    shards = Shards(tmp_path, "m", 16)
    ids = pool.columns["prompt_id"]
    found = shards.collect(ids, lambda start, end, _: {"sae": block(whole, slice(start, end))})
    scores = score_features(pool, found["sae"], None, make_config())
    scores.save(tmp_path)
    shards.clear()
    for found in (scores, Scores.load(tmp_path)):
        assert isinstance(found.features, Stored)
        assert found.features.rows(0, 120).to_dense().equal(whole.to_dense())
        for name in ("saerl_cluster", "saerl_difficulty", "saerl_quality"):
            np.testing.assert_array_equal(found.columns[name], expected.columns[name])
        plans = [
            build_plan(s, make_config().plan, batch_size=8, total_steps=6, seed=1) for s in (found, expected)
        ]
        np.testing.assert_array_equal(plans[0].embedding.rows, plans[1].embedding.rows)


def test_the_pools_own_columns_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    pool, features = make_pool()
    score_features(pool, features, None, make_config()).save(tmp_path)
    monkeypatch.setattr(packed, "LARGE", 100)
    found = Scores.load(tmp_path)
    (tmp_path / "scores.parquet").unlink()
    assert isinstance(found.prompt_ids, Packed) and list(found.prompt_ids) == pool.columns["prompt_id"]
    assert list(found.columns) == [*pool.columns, *table.SCORE_COLUMNS]
    with pytest.raises(SaerlError, match="scores.parquet is missing; .*saerl score"):
        found.columns["prompt"]


def test_parts_of_a_column_have_one_type(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "GROUP", 2)
    info = [None, None, {"a": 1}, {}, None]
    columns = {"prompt_id": list("abcde"), "level": [1, 2, None, 4, 2.5], "info": info}
    Scores(columns).save(tmp_path)
    found = Scores.load(tmp_path).columns
    assert found["level"] == [1.0, 2.0, None, 4.0, 2.5] and found["info"][2:4] == [{"a": 1}, {"a": None}]
    with pytest.raises(SaerlError, match="'mixed'"):
        Scores({"prompt_id": list("abcd"), "mixed": [1, 2, "x", "y"]}).save(tmp_path)


def test_what_the_pass_left_is_kept_by_name_and_mapped(tmp_path):
    pool, features = make_pool()
    count = len(pool)
    kept = {
        "hidden": np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32),
        "sae_max": features,
    }
    scores = score_features(pool, features, kept, make_config(difficulty=DifficultyConfig()))
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert isinstance(loaded.kept["hidden"], np.memmap) and loaded.bank().n_rows == count
    np.testing.assert_array_equal(loaded.kept["hidden"], kept["hidden"])
    torch.testing.assert_close(loaded.kept["sae_max"].to_dense(), features.to_dense())
    assert "hidden" in loaded.bank().names(None, "x")
    file = tmp_path / "bank.hidden.npy"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SaerlError, match=r"bank\.hidden\.npy is damaged"):
        Scores.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(SaerlError, match=r"bank\.hidden\.npy is damaged"):
        Scores.load(tmp_path)
    np.save(file, kept["hidden"][1:])
    with pytest.raises(SaerlError, match=r"not a float32 row for each of"):
        Scores.load(tmp_path)
    score_features(pool, features, None, make_config()).save(tmp_path / "less")
    with pytest.raises(SaerlError, match="feature rows cannot belong"):
        score_features(pool, features, {"hidden": kept["hidden"][1:]}, make_config())


def test_labels_may_be_asked_for_with_the_bank_in_hand():
    pool, features = make_pool()
    asked = []

    def labels(bank):
        asked.append(bank.n_rows)
        return np.linspace(0, 1, len(pool))

    scores = score_features(pool, features, None, make_config(difficulty=DifficultyConfig()), labels)
    assert asked == [len(pool)] and scores.column("saerl_pass_rate")[-1] == 1
