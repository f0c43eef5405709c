import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.signals import features
from saerl_fast.signals.shards import Shards
from saerl_fast.signals.stored import Stored
from saerl_kernels import CSR

IDS = [f"p{i}" for i in range(23)]
DENSE = torch.rand(23, 9, generator=torch.Generator().manual_seed(0)).clamp_min(0.5) - 0.5


def computing(calls, stop_at=None):
    def compute(start, end, progress=None):
        if stop_at is not None and start >= stop_at:
            raise KeyboardInterrupt
        calls.append((start, end))
        if progress is not None:
            progress(end - start, end - start)
        rows = DENSE[start:end]
        return {"sae": CSR.from_dense(rows), "answer": CSR.from_dense(rows * 2), "hidden": rows.numpy() - 1}

    return compute


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path):
    first, second, shown = [], [], []
    with pytest.raises(KeyboardInterrupt):
        Shards(tmp_path, "m", 5).collect(IDS, computing(first, stop_at=10))
    assert first == [(0, 5), (5, 10)]
    shards = Shards(tmp_path, "m", 5)
    found = shards.collect(IDS, computing(second), lambda done, total: shown.append((done, total)))
    assert second == [(10, 15), (15, 20), (20, 23)]
    torch.testing.assert_close(found["sae"].to_dense(), DENSE, rtol=0, atol=0)
    torch.testing.assert_close(found["answer"].to_dense(), DENSE * 2, rtol=0, atol=0)
    assert isinstance(found["hidden"], np.memmap) and (found["hidden"] == DENSE.numpy() - 1).all()
    assert shown[-1] == (23, 23) and [done for done, _ in shown] == sorted(done for done, _ in shown)
    shards.clear()
    assert list(tmp_path.iterdir()) == []


def test_other_settings_and_damage_are_computed_again(tmp_path):
    Shards(tmp_path, "old", 10).collect(IDS, computing([]))
    calls = []
    Shards(tmp_path, "new", 10).collect(IDS, computing(calls))
    assert len(calls) == 3 and not (tmp_path / "features.partial-old").exists()
    for part in ("sae", "hidden"):
        damaged = sorted((tmp_path / "features.partial-new").glob(f"*.{part}-*"))[1]
        damaged.write_bytes(damaged.read_bytes()[:40])
        again = []
        found = Shards(tmp_path, "new", 10).collect(IDS, computing(again))
        assert again == [(10, 20)]
        torch.testing.assert_close(found["sae"].to_dense(), DENSE, rtol=0, atol=0)


def test_one_shard_leaves_no_file(tmp_path):
    Shards(tmp_path, "m", 100).collect(IDS, computing([]))
    assert list(tmp_path.iterdir()) == []


def test_shards_filled_by_others_are_read(tmp_path):
    shards, calls = Shards(tmp_path, "m", 10), []
    assert shards.ranges(len(IDS)) == [(0, 10), (10, 20), (20, 23)] and shards.ranges(0) == [(0, 0)]
    for start in (20, 0, 0):
        Shards(tmp_path, "m", 10).fill(start, IDS, computing(calls))
    assert calls == [(20, 23), (0, 10)]
    found = shards.collect(IDS, computing(calls))
    assert calls[2:] == [(10, 20)]
    torch.testing.assert_close(found["sae"].to_dense(), DENSE, rtol=0, atol=0)


def test_more_rows_than_a_sample_stay_in_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SAMPLE", 20)
    shards = Shards(tmp_path, "m", 5)
    found = shards.collect(IDS, computing([]))
    prompt, answer = found["sae"], found["answer"]
    assert isinstance(prompt, Stored) and isinstance(answer, Stored)
    for start, stop in ((0, 23), (4, 6), (5, 10), (22, 23), (7, 7), (0, 0)):
        torch.testing.assert_close(prompt.rows(start, stop).to_dense(), DENSE[start:stop], rtol=0, atol=0)
    file = features.save_features(tmp_path / "whole.safetensors", answer, IDS)
    expected = features.save_features(tmp_path / "same.safetensors", CSR.from_dense(DENSE * 2), IDS)
    assert file.read_bytes() == expected.read_bytes()
    shards.clear()
    with pytest.raises(SaerlError, match="is missing; make it again"):
        prompt.rows(0, 3)


def test_a_full_memory_costs_no_shard(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Shards(tmp_path, "m", 5).collect(IDS, computing([], stop_at=10))
    before = sorted(file.name for file in tmp_path.rglob("*.*"))

    def full(*args):
        try:
            raise MemoryError
        except MemoryError as err:
            raise SaerlError("it is damaged") from err

    monkeypatch.setattr("saerl_fast.signals.shards.load_part", full)
    with pytest.raises(SaerlError):
        Shards(tmp_path, "m", 5).collect(IDS, computing([]))
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == before
