"""Features in files: the same rows as in memory, whichever are asked for, and damage is one sentence."""

import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.signals import features, stored
from saerl_fast.signals.features import ProbeMatrix, checked, open_features, rows_with, save_features
from saerl_fast.signals.stored import Stored
from saerl_kernels import CSR, csr


def dense(n_rows: int = 50) -> torch.Tensor:
    found = torch.rand(n_rows, 7, generator=torch.Generator().manual_seed(0)).clamp_min(0.6) - 0.6
    found[3:6] = 0.0
    return found


def in_files(folder, X: torch.Tensor, cuts=(0, 1, 20, 50)) -> Stored:
    parts = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        file, ids = folder / f"{first}.safetensors", [str(i) for i in range(first, last)]
        parts += open_features(save_features(file, CSR.from_dense(X[first:last]), ids), ids).parts
    return Stored(parts, 7)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (features, stored):
        monkeypatch.setattr(module, "BLOCK", 8)


def test_rows_are_those_in_memory(tmp_path):
    X = dense()
    lying = in_files(tmp_path, X)
    assert (lying.n_rows, lying.nnz, lying.n_cols) == (50, int((X > 0).sum()), 7)
    for start, stop in ((0, 50), (0, 1), (1, 20), (19, 21), (3, 6), (49, 50), (50, 50)):
        assert lying.rows(start, stop).to_dense().equal(X[start:stop])
    for index in ([], [4], [49, 0, 0, 20, 19], list(range(49, -1, -1)), list(range(0, 50, 3))):
        chosen = torch.tensor(index, dtype=torch.int64)
        assert lying.select_rows(chosen).to_dense().equal(X[chosen])


def test_figures_of_all_rows_are_those_of_the_matrix(tmp_path):
    X = dense()
    lying, whole = in_files(tmp_path, X), CSR.from_dense(X)
    assert rows_with(lying).equal(csr.rows_with(whole))
    assert csr.idf(lying, 1.0, rows_with(lying)).equal(csr.idf(whole, 1.0))
    assert (ProbeMatrix(lying)[slice(0, 50)] != ProbeMatrix(whole)[slice(0, 50)]).nnz == 0
    assert checked(lying) is lying


def test_zeros_are_left_out_and_nan_names_its_row(tmp_path):
    zeros = CSR(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]).int(), torch.tensor([1.0, 0.0, 2.0]), 7)
    file = save_features(tmp_path / "zeros.safetensors", zeros, ["a", "b"])
    assert checked(open_features(file)).values.tolist() == [1.0, 2.0]
    X = dense()
    X[27, 3] = float("nan")
    with pytest.raises(SaerlError, match="prompt number 27"):
        checked(in_files(tmp_path, X))


def test_a_file_that_changes_under_the_reader_is_a_sentence(tmp_path):
    lying = in_files(tmp_path, dense())
    file = lying.parts[2].path
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SaerlError, match="damaged .its end is missing.*saerl score"):
        lying.rows(0, 50)
    file.unlink()
    with pytest.raises(SaerlError, match="is missing; make it again"):
        lying.rows(40, 41)
