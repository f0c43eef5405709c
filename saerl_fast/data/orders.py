"""One pass over the rows under each static schedule: arrays in, batches of row indices out.

``literal`` follows the published description of SAERL (arXiv 2605.27354): batches from one cluster,
easy-to-hard inside it, batches alternating between clusters, a few rows mixed between neighbours.
The paper leaves the mixing rule open; the one below is ours. ``global`` is this project's variant.

Every function takes ``rows`` [m], distinct row indices with m a multiple of ``batch_size``, and a
generator, and returns [m / batch_size, batch_size] int64. Ties are broken at random.
"""

from __future__ import annotations

import numpy as np


def shuffled(rows: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A uniform permutation, in batches."""
    return rng.permutation(rows).reshape(-1, batch_size)


def literal(
    rows: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    *,
    difficulty: np.ndarray,
    cluster: np.ndarray,
    mix: float,
) -> np.ndarray:
    """Cluster-coherent batches, each cluster's in easy-to-hard order, clusters taking turns.

    ``difficulty`` and ``cluster`` are indexed by row. Rows left over after a cluster's last whole
    batch are its hardest; they are joined, cluster after cluster, into batches that take a turn
    like those of one more cluster. At last ``mix`` of each batch is exchanged with its neighbours:
    half from its hard end with the easy end of the next.
    """
    rows = rng.permutation(rows)
    names = rng.permutation(np.unique(cluster[rows]))
    runs: list[np.ndarray] = []  # each [n_batches, batch_size], to be interleaved
    left: list[np.ndarray] = []
    for name in names:
        members = rows[cluster[rows] == name]
        members = members[np.argsort(difficulty[members], kind="stable")]
        whole = len(members) // batch_size * batch_size
        if whole:
            runs.append(members[:whole].reshape(-1, batch_size))
        left.append(members[whole:])
    remainder = np.concatenate(left)
    if len(remainder):
        runs.append(remainder.reshape(-1, batch_size))
    # Spread every run's batches evenly over the pass, so that large clusters do not pile up at its end.
    place = np.concatenate([(np.arange(len(run)) + 0.5) / len(run) for run in runs])
    batches = np.concatenate(runs)[np.argsort(place, kind="stable")]

    swap = int(mix * batch_size / 2)
    if swap:
        tails = batches[:-1, -swap:].copy()
        batches[:-1, -swap:] = batches[1:, :swap]
        batches[1:, :swap] = tails
    return batches


def easy_to_hard(
    rows: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    *,
    difficulty: np.ndarray,
    cluster: np.ndarray,
    mix: float,
    window: int,
) -> np.ndarray:
    """Easy-to-hard over all rows, clusters balanced, ``mix`` of every batch drawn from anywhere.

    Balance conflicts with order when clusters differ in difficulty, so it is sought among
    ``window`` consecutive batches: their rows are dealt out cluster by cluster.
    """
    n_batches = len(rows) // batch_size
    anywhere = round(mix * batch_size)
    rows = rng.permutation(rows)
    loose, rest = np.split(rows, [n_batches * anywhere])
    rest = rest[np.argsort(difficulty[rest], kind="stable")]
    ordered = np.empty((n_batches, batch_size - anywhere), dtype=np.int64)
    for start in range(0, n_batches, window):
        count = min(window, n_batches - start)
        part = rest[start * ordered.shape[1] : (start + count) * ordered.shape[1]]
        part = rng.permutation(part)
        part = part[np.argsort(cluster[part], kind="stable")]
        ordered[start : start + count] = part.reshape(-1, count).T  # row i goes to batch i mod count
    return np.concatenate([ordered, loose.reshape(n_batches, anywhere)], axis=1)


def middle(difficulty: np.ndarray, rows: np.ndarray, keep: float) -> np.ndarray:
    """The rows whose difficulty ranks in the middle ``keep`` share of ``rows``, in row order."""
    count = max(1, round(keep * len(rows)))
    start = (len(rows) - count) // 2
    ranked = rows[np.argsort(difficulty[rows], kind="stable")]
    return np.sort(ranked[start : start + count])
