"""Pooled SAE features as every signal reads them: weighted, normalised, reduced, saved.

Weighting is what text retrieval uses for words: a feature active in few prompts says more than one
active in all. It decides more about the quality of clusters than the algorithm does. Features are checked
once, where they come in (``checked``); what follows takes them as they are and shares their memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import mismatch, parse_json
from saerl_fast.records.tensors import Blocks, Place, places, put_tensors
from saerl_fast.signals.stored import AGAIN, Part, Stored
from saerl_kernels import CSR, csr

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FORMAT = "saerl-features-2"
_TENSORS = {"indptr": np.int64, "indices": np.int32, "values": np.float32}
SAMPLE = 1 << 17  # rows above which features stay in files, and clusters and components are those of a sample
BLOCK = 1 << 14

Features = CSR | Stored


def checked(X: Features, first: int = 0) -> Any:
    """``X`` itself where it is on the CPU, or in files, and stores no zeros, else a copy that is.

    Raises SaerlError, naming the row counted from ``first``, when a value is NaN or infinite.
    """
    if isinstance(X, Stored):
        dense = [checked(block(X, at), at.start).nnz for at in blocks(X.n_rows)]
        return X if sum(dense) == X.nnz else checked(X.rows(0, X.n_rows))
    X = X.to("cpu")
    finite = torch.isfinite(X.values)
    if not finite.all():
        row = first + int(X.row_ids()[~finite][0])
        raise SaerlError(f"the features of prompt number {row} are NaN or infinite; score the pool again")
    return X if X.values.all() else csr.scale_columns(X, torch.ones(X.n_cols))


def rows_with(X: Features) -> torch.Tensor:
    """Rows that store an entry of each column, int64 [n_cols]."""
    counts = torch.zeros(X.n_cols, dtype=torch.int64)
    for at in blocks(X.n_rows):
        counts += csr.rows_with(block(X, at))
    return counts


def weighted(X: CSR, idf: torch.Tensor) -> CSR:
    """Rows times ``idf`` float32 [n_cols], each then of norm 1; rows without features stay empty.

    ``idf`` is ``csr.idf(X, floor)``, or that of the features which ``X`` is compared with. A feature active
    in all rows weighs ``floor``: 0 keeps it out of clusters, 1 lets a regression read how active it is.
    """
    if len(idf) != X.n_cols:
        raise SaerlError(
            f"the features have {X.n_cols} columns but {len(idf)} were expected; use the same SAE"
        )
    return csr.l2_rows(csr.scale_columns(X, idf))


def blocks(n_rows: int) -> list[slice]:
    """All rows, in blocks that fit the memory however many they are; an empty one for none."""
    return [slice(at, min(at + BLOCK, n_rows)) for at in range(0, max(n_rows, 1), BLOCK)]


def block(X: Features, rows: slice) -> CSR:
    """Consecutive rows, sharing the memory of those in memory."""
    if isinstance(X, Stored):
        return X.rows(rows.start, rows.stop)
    first, last = int(X.indptr[rows.start]), int(X.indptr[rows.stop])
    return CSR(
        X.indptr[rows.start : rows.stop + 1] - first, X.indices[first:last], X.values[first:last], X.n_cols
    )


class ProbeMatrix:
    """What the probes are fitted on: ``X`` weighted and of row norm 1, float64 [n_rows, columns].

    Made for the rows that are asked for: ``matrix[rows]`` for an index array, or a slice with a start and an
    end. A feature active in fewer than ``min_rows`` rows is left out: it cannot be learned from some rows and
    tested on others.
    """

    def __init__(self, X: Features, min_rows: int = 3) -> None:
        counts = rows_with(X)
        self._X, self._idf = X, csr.idf(X, 1.0, counts)
        self._columns = np.flatnonzero(counts >= min_rows)
        self.shape = (X.n_rows, len(self._columns))

    def __getitem__(self, rows: slice | np.ndarray) -> csr_matrix:
        part = (
            block(self._X, rows) if isinstance(rows, slice) else self._X.select_rows(torch.from_numpy(rows))
        )
        return weighted(part, self._idf).to_scipy()[:, self._columns].astype(np.float64)


def svd_reduce(X: CSR, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``dim`` leading right singular directions of ``X`` and its rows' coordinates in them.

    Returns ``dense`` float32 [n_rows, d] and ``components`` float32 [d, n_cols] with orthonormal rows,
    ``dense = X @ components.T``, d = min(dim, n_rows, n_cols). Randomised (Halko, Martinsson and
    Tropp, arXiv 0909.4061), the same for the same seed; signs are fixed. ``X`` is taken as it is:
    weight it before.
    """
    from sklearn.utils.extmath import randomized_svd

    if dim < 1:
        raise SaerlError(f"svd={dim} dimensions are too few; use 1 or more")
    matrix = X.to_scipy()
    d = min(dim, *matrix.shape)
    if d == 0:
        raise SaerlError(f"features of shape {list(matrix.shape)} cannot be reduced; score some prompts")
    components = randomized_svd(matrix, d, n_iter=4, random_state=seed)[2]
    components = np.ascontiguousarray(components, dtype=np.float32)
    return np.asarray(matrix @ components.T, dtype=np.float32), components


def ids_hash(prompt_ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order: features belong to rows by position, so both must agree."""
    found, rest = hashlib.sha256(), iter(prompt_ids)
    joint = ""
    while part := list(map(str, islice(rest, BLOCK))):
        found.update((joint + "\0".join(part)).encode())
        joint = "\0"
    return found.hexdigest()


def save_features(path: str | Path, X: Features, prompt_ids: Sequence[str]) -> Path:
    """Write ``X`` [n, n_cols] to a safetensors file that also records which prompts its rows are.

    Equal features make equal files. What lies in files is copied a block at a time.
    """
    if X.n_rows != len(prompt_ids):
        raise SaerlError(f"{X.n_rows} feature rows cannot belong to {len(prompt_ids)} prompts")
    about = {"format": FORMAT, "n_cols": int(X.n_cols), "prompt_ids_sha256": ids_hash(prompt_ids)}
    indices = (block(X, at).indices.cpu().numpy() for at in blocks(X.n_rows))
    values = (block(X, at).values.cpu().numpy() for at in blocks(X.n_rows))
    tensors = {
        "indptr": Blocks(np.int64, (X.n_rows + 1,), _starts(X)),
        "indices": Blocks(np.int32, (X.nnz,), indices),
        "values": Blocks(np.float32, (X.nnz,), values),
    }
    put_tensors(Path(path), tensors, {"saerl": json.dumps(about)})
    return Path(path)


def _starts(X: Features) -> Iterator[np.ndarray]:
    """The ``indptr`` of all rows, in blocks."""
    total = np.zeros(1, dtype=np.int64)
    yield total
    for at in blocks(X.n_rows):
        ends = block(X, at).indptr[1:].cpu().numpy() + total
        yield ends
        total = ends[-1:] if len(ends) else total


def load_features(path: str | Path, prompt_ids: Sequence[str] | None = None) -> CSR:
    """The CSR in a file of ``save_features``; ``prompt_ids`` must be those it was saved with."""
    found = open_features(path, prompt_ids)
    return found.rows(0, found.n_rows)


def open_features(path: str | Path, prompt_ids: Sequence[str] | None = None) -> Stored:
    """As ``load_features``, but checked only and left in the file."""
    path = Path(path)
    if not path.is_file():
        raise SaerlError(f"{path} does not exist; make it with `saerl score`")
    tensors, about = places(path, AGAIN)
    metadata = parse_json(str(about.get("saerl", "{}")), f"the metadata of {path}")
    if fault := mismatch(metadata, {}):
        raise SaerlError(f"{path} is damaged ({fault}); {AGAIN}")
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise SaerlError(f"{path} has format {found!r}, not {FORMAT!r}; {AGAIN}")
    if prompt_ids is not None and metadata.get("prompt_ids_sha256") != ids_hash(prompt_ids):
        raise SaerlError(f"{path} belongs to other prompts than the scores; run `saerl score` again")
    if fault := _fault(tensors, metadata.get("n_cols")):
        raise SaerlError(f"{path} is damaged ({fault}); {AGAIN}")
    indptr, indices, values = (tensors[name] for name in _TENSORS)
    size = (indptr.shape[0] - 1, indices.shape[0])
    stored = Stored([Part(path, *size, indptr.at, indices.at, values.at)], int(metadata["n_cols"]))
    stored.check()
    return stored


def _fault(tensors: dict[str, Place], n_cols: Any) -> str | None:
    """What is wrong with the kinds of the parts of a CSR, or None."""
    for name, dtype in _TENSORS.items():
        if name not in tensors or tensors[name].dtype != dtype or len(tensors[name].shape) != 1:
            return f"it holds no {name} as a row of {np.dtype(dtype)}"
    if mismatch(n_cols, int) or not 0 < n_cols < 2**31:
        return "n_cols is no number of columns"
    if not tensors["indptr"].shape[0] or tensors["indices"].shape != tensors["values"].shape:
        return "its tensors differ in length"
    return None
