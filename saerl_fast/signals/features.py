"""Pooled SAE features as every signal reads them: weighted, normalised, reduced, saved.

Weighting is what text retrieval uses for words: a feature active in few prompts says more than one
active in all. It decides more about the quality of clusters than the algorithm does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from saerl_kernels import CSR

FORMAT = "saerl-features-1"


def as_scipy(X: CSR | csr_matrix) -> csr_matrix:
    """``X`` as a float32 scipy CSR matrix [n_rows, n_cols]; explicit zeros are removed."""
    from scipy.sparse import csr_matrix, issparse

    if issparse(X):
        matrix = csr_matrix(X, dtype=np.float32, copy=True)
    else:
        parts = (X.values, X.indices, X.indptr)
        values, indices, indptr = (part.detach().cpu().numpy() for part in parts)
        shape = (len(indptr) - 1, int(X.n_cols))
        matrix = csr_matrix((values.astype(np.float32), indices.copy(), indptr.copy()), shape=shape)
    if not np.isfinite(matrix.data).all():
        row = int(np.searchsorted(matrix.indptr, int(np.argmin(np.isfinite(matrix.data))), side="right")) - 1
        raise SaerlError(f"the features of prompt number {row} are NaN or infinite; score the pool again")
    matrix.eliminate_zeros()
    return matrix


def idf_weights(X: CSR | csr_matrix, floor: float = 0.0) -> np.ndarray:
    """Inverse document frequency, float32 [n_cols]: floor + ln((1 + n) / (1 + rows with the feature)).

    Smoothed as if one more row had every feature; a feature active in all rows weighs ``floor``:
    0 keeps it out of clusters, 1 lets a regression read how strongly it is active.
    """
    matrix = as_scipy(X)
    n_rows, n_cols = matrix.shape
    rows_with = np.bincount(matrix.indices, minlength=n_cols)
    return (floor + np.log((1.0 + n_rows) / (1.0 + rows_with))).astype(np.float32)


def l2_rows(matrix: csr_matrix) -> csr_matrix:
    """A copy whose rows have Euclidean norm 1; rows without features stay zero."""
    counts = np.diff(matrix.indptr)
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float64)).ravel()
    scaled = matrix.copy()
    scaled.data = (matrix.data / np.repeat(np.where(norms > 0, norms, 1.0), counts)).astype(np.float32)
    return scaled


def weighted(X: CSR | csr_matrix, idf: np.ndarray | None = None) -> csr_matrix:
    """Rows times ``idf`` (``idf_weights`` of ``X`` when None), each then of norm 1."""
    matrix = as_scipy(X)
    idf = idf_weights(matrix) if idf is None else idf
    if len(idf) != matrix.shape[1]:
        raise SaerlError(
            f"the features have {matrix.shape[1]} columns but {len(idf)} were expected; use the same SAE"
        )
    matrix.data *= idf[matrix.indices]
    matrix.eliminate_zeros()
    return l2_rows(matrix)


def probe_matrix(blocks: Sequence[CSR | csr_matrix], min_rows: int = 3) -> csr_matrix:
    """What the probes are fitted on: each block weighted and of row norm 1, side by side.

    float64 [n_rows, columns]. A feature active in fewer than ``min_rows`` rows is left out: it
    cannot be learned from some rows and tested on others.
    """
    from scipy.sparse import hstack

    counts = {as_scipy(block).shape[0] for block in blocks}
    if len(counts) != 1:
        raise SaerlError(
            f"feature blocks of {sorted(counts)} rows cannot be joined; give one row per prompt each"
        )
    matrix = hstack([weighted(block, idf_weights(block, 1.0)) for block in blocks], format="csr").astype(
        np.float64
    )
    rows_with = np.bincount(matrix.indices, minlength=matrix.shape[1])
    return matrix[:, np.flatnonzero(rows_with >= min_rows)]


def svd_reduce(X: CSR | csr_matrix, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``dim`` leading right singular directions of ``X`` and its rows' coordinates in them.

    Returns ``dense`` float32 [n_rows, d] and ``components`` float32 [d, n_cols] with orthonormal rows,
    ``dense = X @ components.T``, d = min(dim, n_rows, n_cols). Randomised (Halko, Martinsson and
    Tropp, arXiv 0909.4061), the same for the same seed; signs are fixed. ``X`` is taken as it is:
    weight it before.
    """
    from sklearn.utils.extmath import randomized_svd

    if dim < 1:
        raise SaerlError(f"svd={dim} dimensions are too few; use 1 or more")
    matrix = as_scipy(X)
    d = min(dim, *matrix.shape)
    if d == 0:
        raise SaerlError(f"features of shape {list(matrix.shape)} cannot be reduced; score some prompts")
    components = randomized_svd(matrix, d, n_iter=4, random_state=seed)[2]
    components = np.ascontiguousarray(components, dtype=np.float32)
    return np.asarray(matrix @ components.T, dtype=np.float32), components


def ids_hash(prompt_ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order: features belong to rows by position, so both must agree."""
    return hashlib.sha256("\0".join(map(str, prompt_ids)).encode()).hexdigest()


def save_features(path: str | Path, X: CSR, prompt_ids: Sequence[str]) -> Path:
    """Write ``X`` [n, n_cols] to a safetensors file that also records which prompts its rows are."""
    from safetensors.torch import save_file

    if len(X.indptr) - 1 != len(prompt_ids):
        raise SaerlError(f"{len(X.indptr) - 1} feature rows cannot belong to {len(prompt_ids)} prompts")
    tensors = {name: getattr(X, name).detach().cpu().contiguous() for name in ("indptr", "indices", "values")}
    metadata = {"format": FORMAT, "n_cols": str(int(X.n_cols)), "prompt_ids_sha256": ids_hash(prompt_ids)}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)
    return Path(path)


def load_features(path: str | Path, prompt_ids: Sequence[str] | None = None) -> CSR:
    """The CSR in a file of ``save_features``; ``prompt_ids`` must be those it was saved with."""
    from safetensors import safe_open

    from saerl_kernels import CSR

    path = Path(path)
    if not path.is_file():
        raise SaerlError(f"{path} does not exist; make it with `saerl score`")
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("indptr", "indices", "values")}
    except Exception as err:  # safetensors raises its own type, built in Rust
        raise SaerlError(f"{path} is damaged ({err}); make it again with `saerl score`") from None
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise SaerlError(f"{path} has format {found!r}, not {FORMAT!r}; make it again with `saerl score`")
    if prompt_ids is not None and metadata.get("prompt_ids_sha256") != ids_hash(prompt_ids):
        raise SaerlError(f"{path} belongs to other prompts than the scores; run `saerl score` again")
    return CSR(tensors["indptr"], tensors["indices"], tensors["values"], int(metadata["n_cols"]))
