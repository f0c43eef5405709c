"""The replay: what it counts, and that its committed table is that of its committed figures."""

import json

import numpy as np
import pytest

from benchmarks import replay
from saerl_fast.signals.bank import Bank

RESULT = replay.Path(__file__).parents[1] / "benchmarks" / "results" / "replay.json"


@pytest.fixture
def small(monkeypatch):
    for name, value in (("STEPS", 40), ("FEW", 80), ("BATCH", 8)):
        monkeypatch.setattr(replay, name, value)
    monkeypatch.setattr(replay, "WINDOWS", {"all steps": (0, 40)})
    rng = np.random.default_rng(0)
    rates = np.where(rng.random(400) < 0.3, rng.uniform(0.3, 0.7, 400), 0.0)
    bank = Bank(None, [f"{'easy' if rate else 'hard'} problem {i}" for i, rate in enumerate(rates)])
    del bank.kinds["sae"]
    bank.kinds["truth"] = lambda rows: rates[rows][:, None]
    return bank, rates


def test_rules_stand_between_chance_and_the_oracle(small):
    found = replay.replay(*small, seeds=2)
    assert list(found)[0] == "one visit, fixed policy" and len(found) == 4
    for regime, rows in found.items():
        share = {name: row["all steps"]["share"] for name, row in rows.items()}
        if regime.startswith("one"):  # rules without a cooldown may draw the same few again and again
            waiting = ("uniform", "adaptive, none", "adaptive, tfidf", "adaptive, truth")
            assert share["oracle"] > max(share[name] for name in waiting)
        assert share["uniform"] < share["adaptive, tfidf"] <= share["oracle"]  # the text tells
    one = found["one visit, fixed policy"]
    assert one["oracle"]["all steps"]["share"] > one["uniform"]["all steps"]["share"] + 0.25
    assert one["uniform"]["all steps"]["more"] is None and "+" in one["oracle"]["all steps"]["more"]
    assert "| oracle | 0." in replay.markdown({"shares": found})


def test_the_policy_improves_by_the_drift():
    truth = replay.truths(np.array([0.5, 0.0]), 0.02)
    assert truth(0)[0] == pytest.approx(0.5) and truth(50)[0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert replay.truths(np.array([0.5, 0.0]), 0.0)(50).tolist() == [0.5, 0.0]
    assert replay.informative(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 - 2 / 256, 0])


def test_a_pool_is_read(tmp_path):
    rows = [{"id": str(i), "problem": f"add {i}", "pass_rate": i / 4} for i in range(5)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bank, rates = replay.opened(tmp_path / "pool.jsonl", None)
    assert rates.tolist() == [0, 0.25, 0.5, 0.75, 1] and bank.kinds["truth"](np.array([1])).tolist() == [
        [0.25]
    ]


def test_features_that_were_kept_are_read_too(tmp_path):
    rows = [{"id": str(i), "problem": f"add {i}", "answer": i, "pass_rate": i / 4} for i in range(4)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sae, hidden = np.eye(5, 3, dtype=np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)
    ids = np.array(["3", "x", "0", "1", "2"])  # in another order, and one of another pool
    np.savez_compressed(tmp_path / "part-0000000.npz", ids=ids, sae=sae, hidden=hidden)
    bank, rates = replay.opened(tmp_path / "pool.jsonl", tmp_path)
    assert rates.tolist() == [0.75, 0, 0.25, 0.5] and {"sae", "hidden", "truth"} <= set(bank.kinds)
    assert bank.kinds["hidden"](np.array([1])).tolist() == [[4, 5]]


@pytest.mark.skipif(not RESULT.is_file(), reason="not measured yet")
def test_the_readme_has_the_committed_figures():
    readme = (RESULT.parents[1] / "README.md").read_text()
    assert replay.section(json.loads(RESULT.read_text())) in readme
