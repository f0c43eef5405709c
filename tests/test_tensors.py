"""Tensor files written in blocks: any safetensors reader reads them, and damage is one sentence."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from saerl_fast.errors import SaerlError
from saerl_fast.records import tensors as module
from saerl_fast.records.tensors import Blocks, read_tensors, write_tensors


def some() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "text": rng.integers(0, 255, 13).astype(np.uint8),
        "rows": rng.standard_normal((7, 3)).astype(np.float32),
        "ends": np.arange(5),
        "scale": np.array([0.5]),
        "cluster": np.arange(3, dtype=np.int32),
        "none": np.empty((0, 4), dtype=np.float32),
    }


@pytest.mark.parametrize("mapped", [0, 1 << 26])
def test_they_are_safetensors_and_read_back(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(module, "MAPPED", mapped)
    path, wanted = tmp_path / "a.safetensors", some()
    parts = Blocks(np.float32, (7, 3), (wanted["rows"][at : at + 2] for at in range(0, 7, 2)))
    write_tensors(path, {**wanted, "rows": parts}, {"format": "mine"})
    save_file(wanted, tmp_path / "b.safetensors")
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "mine"}
    for found in (load_file(path), read_tensors(path, ""), read_tensors(tmp_path / "b.safetensors", "")):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found[name], tensor)
    before = path.read_bytes()
    read_tensors(path, "")["rows"][:] = 9  # the reader's own
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_damage_is_a_sentence(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    write_tensors(path, some(), {"format": "mine"})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SaerlError, match="damaged .* again"):
        read_tensors(path, "make it again")
