"""A pool's scores: what each prompt's SAE features say about its quality, difficulty and cluster."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json
from saerl_fast.records import manifest
from saerl_fast.records.packed import Packed, Tokens
from saerl_fast.records.spilled import by_block
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.cards import cards, carriers
from saerl_fast.signals.clusters import cluster_prompts
from saerl_fast.signals.copies import find_copies
from saerl_fast.signals.difficulty import fit_difficulty
from saerl_fast.signals.features import Features, checked, open_features, save_features
from saerl_fast.signals.kept import Parts, in_memory, load_part, save_part, suffix
from saerl_fast.signals.labelled import label_columns
from saerl_fast.signals.maps import prompt_map
from saerl_fast.signals.quality import fit_quality
from saerl_fast.signals.stored import Stored
from saerl_fast.signals.table import SCORE_COLUMNS, Table, arrow_type, score_array, write_table
from saerl_fast.signals.text import Plain

if TYPE_CHECKING:
    from saerl_fast.prompts.pool import Pool
    from saerl_fast.session import Session
    from saerl_fast.signals.shards import Compute, Shards

log = logging.getLogger(__name__)
FORMAT = "saerl-scores-1"
SUMMARY = {"format": str, "n_prompts": int, "features": (None, str), "metadata": dict}  # of scores.json
ANSWER = 256  # tokens of an answer that its log-probability is of
APART = ("seconds", "difficulty_labels", "sae", "map")  # a second time or elsewhere they differ; scores.json


@dataclass
class Scores:
    """Scored prompts: ``columns`` [n] by name, at least ``prompt_id``; see ``SCORE_COLUMNS``.

    ``metadata``: JSON-able; the held-out figures of every probe under quality, difficulty, clusters.
    ``features``: pooled prompt features, CSR with n rows, or None. ``kept``: what else the forward pass left,
    by name: CSR, or float32 [n, columns] (see `bank_pass`).
    """

    columns: Mapping[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    features: Features | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "prompt_id" not in self.columns:
            raise SaerlError(f"scores need a prompt_id column, found {', '.join(self.columns) or 'none'}")
        count = len(self.columns["prompt_id"])
        for name, column in self.columns.items():
            if len(column) != count:
                raise SaerlError(
                    f"score column {name!r} has {len(column)} rows but there are {count} prompts"
                )
        if self.features is not None and self.features.n_rows != count:
            raise SaerlError(f"{self.features.n_rows} feature rows cannot belong to {count} prompts")

    def __len__(self) -> int:
        return len(self.columns["prompt_id"])

    @property
    def prompt_ids(self) -> Sequence[str]:
        ids = self.columns["prompt_id"]
        return ids if isinstance(ids, Packed) else [str(name) for name in ids]

    def column(self, name: str) -> np.ndarray | None:
        """A score column in its dtype, [n]; None when it is absent or unknown throughout."""
        if name not in self.columns:
            return None
        array = score_array(self.columns[name], SCORE_COLUMNS.get(name))
        return array if array.dtype == np.int32 or np.isfinite(array).any() else None

    def bank(self) -> Bank:
        """The kinds of features that probes and plans read, by name; SaerlError without features."""
        if self.features is None:
            raise SaerlError("the scores have no features; run `saerl score` again")
        prompts = self.columns.get("prompt", [""] * len(self))
        return Bank(self.features, prompts, self.kept, self.columns.get("answer"))

    def save(self, run_dir: str | Path, made: Mapping[str, Any] | None = None) -> Path:
        """Write scores.parquet, scores.json and, with features, features.safetensors; ``kept`` as bank.*; the
        folder.

        ``made``: what ``manifest.json`` says of them beside their hashes. Features that lie in files are
        read from the new one from then on.
        """
        folder = Path(run_dir)
        types = {name: arrow_type(name, column) for name, column in self.columns.items()}
        told = {key: value for key, value in self.metadata.items() if key not in APART}
        told_text = json.dumps(told, allow_nan=False)
        about = {"saerl": told_text, "saerl_format": FORMAT}
        summary = {"format": FORMAT, "n_prompts": len(self), "columns": list(self.columns)}
        summary["features"] = None if self.features is None else "features.safetensors"
        files = {name: f"bank.{name}{suffix(rows)}" for name, rows in self.kept.items()}
        summary["bank"] = files
        text = json.dumps({**summary, "metadata": self.metadata}, indent=1, allow_nan=False) + "\n"
        with manifest.publish(folder, "scores", made or {}) as new:
            if self.features is not None:
                save_features(new("features.safetensors"), self.features, self.prompt_ids)
            for name, file in files.items():
                save_part(new(file), self.kept[name], self.prompt_ids)
            write_table(new("scores.parquet"), self.columns, types, about)
            new("scores.json").write_text(text)
        if isinstance(self.features, Stored):
            self.features = open_features(folder / "features.safetensors")
        for name, rows in self.kept.items():
            if isinstance(rows, (Stored, np.memmap)):  # in shards that may be removed
                self.kept[name] = load_part(folder / files[name], self.prompt_ids)
        return folder

    @classmethod
    def load(cls, run_dir: str | Path) -> Scores:
        """What ``save`` wrote; checked against its hashes in a folder that has a ``manifest.json``.

        The ids and scores are read, the pool's own columns when they are asked for. Features of more than
        ``SAMPLE`` rows stay in their file. Raises SaerlError when a file is missing, damaged, of other
        prompts, or not of one writing.
        """
        folder = Path(run_dir)
        manifest.check(folder, "scores", "saerl score")
        summary = read_json(folder / "scores.json", "saerl score", SUMMARY)
        if summary["format"] != FORMAT:
            raise SaerlError(f"{folder / 'scores.json'} is not of format {FORMAT}; run `saerl score` again")
        file = folder / "scores.parquet"
        if not file.is_file():
            raise SaerlError(f"{file} does not exist; make it with `saerl score`")
        columns = Table(file, "make it again with `saerl score`")
        if columns.rows != summary["n_prompts"]:
            raise SaerlError(
                f"{file} has {columns.rows} rows but scores.json {summary['n_prompts']}; "
                "run `saerl score` again"
            )
        features: Features | None = None
        if summary["features"] is not None:
            features = open_features(folder / "features.safetensors", columns.get("prompt_id"))
        files, ids = summary.get("bank", {}), columns.get("prompt_id", [])
        kept = {name: in_memory(load_part(folder / Path(file).name, ids)) for name, file in files.items()}
        return cls(columns, summary["metadata"], in_memory(features), kept)


def score_features(
    pool: Pool,
    prompt_features: Features,
    kept: Parts | None,
    config: Config,
    pass_rates: Any | None = None,
) -> Scores:
    """Quality, difficulty and cluster of every row of ``pool`` from features computed before.

    ``prompt_features``: pooled, one CSR row per prompt; ``kept``: what else there is, by name (see
    `bank_pass`). ``pass_rates`` [n] in [0, 1], NaN where unknown, or a function of the bank that finds
    them; None reads ``difficulty.label_column``. Quality labels come from
    ``quality.label_column``; a pool without the default column is not scored for quality, a column
    asked for by another name must be there. Row ``task``, where present, is compared with the clusters.
    """
    count = len(pool)
    if not count:
        raise SaerlError("the pool has no prompts to score; check data.train and data.limit")
    kept = {
        name: rows if isinstance(rows, np.ndarray) else checked(rows) for name, rows in (kept or {}).items()
    }
    for features in (prompt_features, *kept.values()):
        rows = len(features) if isinstance(features, np.ndarray) else features.n_rows
        if rows != count:
            raise SaerlError(f"{rows} feature rows cannot belong to {count} prompts")
    prompt_features = checked(prompt_features)
    if not prompt_features.nnz:
        log.warning(
            "no feature of the SAE is active in any prompt: there is one cluster, and probes read everything "
            "else; check that the SAE is of this model and layer"
        )
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    labels, known = label_columns(pool, config)
    bank = Bank(prompt_features, pool.columns["prompt"], kept, pool.columns["answer"])
    ids = pool.columns["prompt_id"]
    texts, near = Plain(pool.columns["prompt"]), config.quality.near
    copies = find_copies(prompt_features, texts, pool.columns["answer"], ids, near=near, seed=config.seed)
    lap("duplicates")
    column = config.quality.kind_column
    quality = fit_quality(
        bank, labels, config.quality, seed=config.seed, kinds=None if column is None else pool.column(column)
    )
    lap("quality")
    found = pass_rates(bank) if callable(pass_rates) else pass_rates
    rates = known if found is None else np.asarray(found, dtype=np.float64)
    difficulty = fit_difficulty(bank, rates, config.difficulty, seed=config.seed)
    lap("difficulty")
    diverse = config.diversity
    read = kept.get("sae_mean", prompt_features) if diverse.features == "auto" else prompt_features
    clusters = cluster_prompts(read, diverse, tasks=pool.columns.get("task"), texts=bank.texts)
    known_of = {"difficulty": difficulty.scores, "quality": quality.scores, "pass_rate": rates}
    clusters.metrics["cards"] = cards(read, clusters.weights, clusters.labels, ids, bank.texts, known_of)
    for probe in (quality, difficulty):
        if probe.effects is not None:
            probe.metrics["features"] = carriers(prompt_features, probe.effects, ids, bank.texts)
    lap("clusters")
    drawn = prompt_map(read, clusters.weights, bank.texts, config.seed)
    lap("map")

    active = prompt_features.nnz / count
    metadata = {
        "n_prompts": count,
        "quality": quality.metrics,
        "difficulty": difficulty.metrics,
        "clusters": clusters.metrics,
        "duplicates": copies.metrics,
        "features": {
            "d_sae": int(prompt_features.n_cols),
            "active_per_prompt": active,
            "reduce": config.score.reduce,
        },
        "map": drawn,
        "seconds": seconds,
    }
    added = {
        "saerl_cluster": clusters.labels,
        "saerl_difficulty": difficulty.scores,
        "saerl_quality": quality.scores,
        "saerl_pass_rate": by_block(rates.__getitem__, count, np.float32),
        "saerl_copy_of": copies.of,
    }
    kept.pop("answer", None)  # of no use but to the quality probe
    return Scores({**pool.columns, **added}, metadata, prompt_features, kept)


def feature_pass(session: Session, sae: Any, config: Config) -> Compute:
    """``compute(start, end, progress)``: what ``score.features`` names of these rows (see `bank_pass`).

    With ``score.include_answer`` and an answer in every row, the quality probe reads the answers' too. For
    the answers' log-probabilities they are cut to ANSWER tokens, which is said.
    """
    from saerl_fast.sae.capture import resolve_products
    from saerl_fast.sae.pooled import bank_pass

    prompts, kinds = session.train, [str(name) for name in config.score.features]
    answers: Sequence[list[int]] | None = None
    if config.score.include_answer and config.quality.head != "none" and None not in prompts.column("answer"):
        answers, kinds = prompts.answer_ids, [*kinds, "answer"]
    elif "answer_logprob" in kinds:
        cut_off = (answer[:ANSWER] for answer in prompts.answer_ids)
        answers = Tokens.of(cut_off) if isinstance(prompts.answer_ids, Tokens) else list(cut_off)
        if cut := sum(len(answer) > ANSWER for answer in prompts.answer_ids):
            log.warning(
                "answer_logprob reads the first %d tokens of answers: %d of %d are longer",
                *(ANSWER, cut, len(answers)),
            )
    dtype = resolve_products(config.score.dtype, session.model)

    def compute(start: int, end: int, progress: Callable[[int, int], None] | None) -> Any:
        return bank_pass(
            session.model,
            sae,
            prompts.ids[start:end],
            None if answers is None else answers[start:end],
            kinds=kinds,
            own=None if prompts.own is None else prompts.own[start:end],
            dtype=dtype,
            layer=config.sae.layer,
            reduce=config.score.reduce,
            batch_tokens=config.score.batch_tokens,
            backend=config.score.backend,
            on_progress=progress,
        )

    return compute


def score(
    session: Session,
    sae: Any,
    config: Config,
    *,
    pass_rates: Any | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    shards: Shards | None = None,
) -> Scores:
    """Quality, difficulty and cluster of every training prompt, from one early-stopped forward pass.

    ``pass_rates`` and errors as in ``score_features``. ``shards`` keeps finished parts of the pass on the
    disk; without it the pass is made in one go.
    """
    pool = session.train
    began = time.perf_counter()
    compute = feature_pass(session, sae, config)
    if shards is None:
        found = dict(compute(0, len(pool), on_progress))
    else:
        found = dict(shards.collect(pool.column("prompt_id"), compute, on_progress))
    seconds = time.perf_counter() - began
    scores = score_features(pool, found.pop("sae"), found, config, pass_rates)
    scores.metadata["seconds"] = {"features": seconds, **scores.metadata["seconds"]}
    return scores
