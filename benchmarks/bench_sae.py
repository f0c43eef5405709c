"""Whole trainings of TopK and BatchTopK SAEs against SAELens' and sparsify's trainers, on equal activations.

    pytest benchmarks/bench_sae.py --benchmark-json=benchmarks/results/cpu/sae.json

Hidden states of the demo's model (layer 3), centred and scaled beforehand, split once a seed; every trainer
gets the same training tokens, features, k, batch, steps, peak learning rate and warm-up (a twentieth of the
steps). Otherwise each keeps its own ways: initialisation, auxiliary loss (SAELens' coefficient 1, sparsify's
1/32 as ours), clipping (SAELens), decay of the rate (sparsify: linear from the peak; SAELens as ours over the
last fifth). Features are dead after 200 silent steps for all.

A contender runs once a seed, all in turn in one process; time is that of training alone. What comes out is
saved, loaded here and measured by one function: FVU and L0 on held-out tokens, the share of dead features on
those and up to 32,768 training tokens. Peak memory is that of the first seed's run.

"own_rates" lets each trainer have the rate of RATES with the least FVU on a seed that is not measured, on the
demo's states and on those of SmolLM2-135M-Instruct (layer 15, prompts of reasoning-gym, without tokens over
ten median norms), which is looked for in the folder SAERL_SMOLLM2_DIR and left out without it.
SAERL_BENCH_GRID=tiny runs few steps.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_score import SMOLLM2, path_of
from benchmarks.harness import DEVICE, bench_threads, environment, grid, peak_memory, summary
from saerl_fast.config import SAEConfig
from saerl_fast.sae.files import load_sae
from saerl_fast.sae.measure import measure
from saerl_fast.sae.model import SAE
from saerl_fast.sae.tokens import Tokens
from saerl_fast.sae.train import collect_activations, geometric_median, train_sae

ROOT = Path(__file__).resolve().parents[1]
LAYER = 3
DEAD_AFTER = 200
MEASURED = 32768
SEEDS = 3
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TASKS = "reasoning-gym:syllogism,isomorphic_strings,ransom_note,calendar_arithmetic,aiw,course_schedule"


class Shape(NamedTuple):
    activation: str
    lr: float
    d_sae: int
    k: int
    batch: int
    steps: int


CPU_GRID = [
    Shape("topk", 3e-3, 768, 16, 1024, 400),
    Shape("topk", 1e-3, 768, 16, 1024, 400),
    Shape("batchtopk", 3e-3, 768, 16, 1024, 400),
]
TINY_GRID = [Shape("topk", 3e-3, 64, 4, 64, 6), Shape("batchtopk", 3e-3, 64, 4, 64, 6)]
GRID = grid(TINY_GRID, CPU_GRID, CPU_GRID)


@cache
def activations(limit: int) -> Tensor:
    """The demo's hidden states, centred and of unit variance."""
    demo = ROOT / "examples" / "demo"
    places = [f"model.path={demo / 'model'}", f"data.train={demo / 'pool.jsonl'}"]
    places += [f"data.eval={demo / 'eval.jsonl'}", f"data.limit={limit}"]
    return _states(ROOT / "examples" / "demo.yaml", places, LAYER)


@cache
def of_smollm2() -> Tensor:
    """SmolLM2's, in the same form."""
    places = [f"model.path={path_of(SMOLLM2)}", f"data.train={TASKS}", "data.size=500", "data.eval_size=1"]
    return _states(None, [*places, "data.prefill=Answer:"], 15)


def _states(file: Path | None, settings: list[str], layer: int) -> Tensor:
    from saerl_fast.config import load_config
    from saerl_fast.session import Session

    session = Session.open(load_config(file, settings))
    x = collect_activations(session.model, session.train.ids, layer).float()
    norms = x.norm(dim=1)
    x = x[norms <= 10 * norms.median()]
    x -= geometric_median(x)
    return (x / x.square().mean().sqrt()).to(DEVICE)


class Problem:
    """One seed of a shape: its split, and how each trainer is run on it."""

    def __init__(self, shape: Shape, seed: int, x: Tensor) -> None:
        self.shape, self.x = shape, x
        self.cfg = SAEConfig(
            **{k: v for k, v in shape._asdict().items() if k != "batch"},
            batch_size=shape.batch,
            dead_after=DEAD_AFTER,
            sink_ratio=0.0,
            seed=seed,
        )
        self.tokens = Tokens(x, self.cfg, torch.Generator().manual_seed(seed), None)

    def contenders(self) -> dict[str, Callable[[], Callable[[str], Any]]]:
        """Name -> training, which returns how to save what it has trained."""
        found = {"SAELens": self._saelens, "saerl_fast": self._ours}
        if self.shape.activation == "topk":
            found["sparsify"] = self._sparsify
        return found

    def _ours(self) -> Callable[[str], Any]:
        from saerl_fast.sae.files import save_sae

        sae = train_sae(self.x, self.cfg)[0]
        return lambda folder: save_sae(sae, folder)

    def _saelens(self) -> Callable[[str], Any]:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape = self.shape
        kinds = {
            "topk": (sae_lens.TopKTrainingSAEConfig, sae_lens.TopKTrainingSAE),
            "batchtopk": (sae_lens.BatchTopKTrainingSAEConfig, sae_lens.BatchTopKTrainingSAE),
        }
        config, kind = kinds[shape.activation]
        torch.manual_seed(self.cfg.seed)
        size = {"d_in": self.x.shape[1], "d_sae": shape.d_sae, "k": shape.k}
        sae = kind(config(**size, device=str(DEVICE)))
        settings = SAETrainerConfig(
            total_training_samples=shape.steps * shape.batch,
            train_batch_size_samples=shape.batch,
            lr=shape.lr,
            lr_end=shape.lr / 10,  # which its constant schedule does not read
            lr_warm_up_steps=shape.steps // 20,
            lr_decay_steps=shape.steps // 5,
            dead_feature_window=DEAD_AFTER,
            device=str(DEVICE),
        )
        batches = iter(lambda: self.tokens.batch(shape.batch), None)
        SAETrainer(settings, sae, batches).fit()
        return lambda folder: sae.save_inference_model(folder)

    def _sparsify(self) -> Callable[[str], Any]:
        if DEVICE.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; its kernels need a GPU
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        shape = self.shape
        rows = [self._indices() for _ in range(shape.steps)]
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                SparseCoderConfig(num_latents=shape.d_sae, k=shape.k),
                batch_size=1,
                optimizer="adam",
                lr=shape.lr,
                lr_warmup_steps=shape.steps // 20,
                auxk_alpha=1 / 32,
                dead_feature_threshold=DEAD_AFTER * shape.batch,
                hookpoints=["stream"],
                init_seeds=[self.cfg.seed],
                log_to_wandb=False,
                save_dir=folder,
            )
            trainer = Trainer(config, [{"input_ids": row} for row in rows], Lookup(self.x))
            trainer.fit()
        coder = trainer.saes["stream"]
        coder.set_decoder_norm_to_unit_norm()  # as it does before each step
        return lambda folder: coder.save_to_disk(folder)

    def _indices(self) -> Tensor:
        size = min(self.shape.batch, len(self.tokens.train))
        if len(self.tokens.queue) < size:
            self.tokens.queue = self.tokens._shuffled()
        rows, self.tokens.queue = self.tokens.queue[:size], self.tokens.queue[size:]
        return rows

    def figures(self, sae: SAE) -> dict[str, float]:
        """What is compared, of any trainer's SAE."""
        fvu, l0, fired = measure(sae.to(DEVICE), self.tokens.test)
        fired = fired + measure(sae, self.tokens.sample(MEASURED))[2]
        return {"FVU": fvu, "dead": 1 - float((fired > 0).float().mean()), "L0": l0}


class Lookup(nn.Module):
    """A "model" for sparsify's trainer: ids are rows of the activations, which its module returns."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.stream = nn.Embedding.from_pretrained(x)
        self.base_model_prefix, self.config, self.device = "", None, x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.stream(input_ids)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers print and draw bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def own_rates(shape: Shape, x: Tensor, rates: Sequence[float]) -> dict[str, float]:
    """Contender -> the rate with the least FVU, on a seed that `compare` does not use."""
    found: dict[str, dict[float, float]] = {}
    for rate in rates:
        tried = shape._replace(lr=rate)
        for name in Problem(tried, SEEDS, x).contenders():
            problem = Problem(tried, SEEDS, x)
            with contextlib.suppress(ImportError), quiet(), tempfile.TemporaryDirectory() as folder:
                problem.contenders()[name]()(folder)
                found.setdefault(name, {})[rate] = problem.figures(load_sae(folder))["FVU"]
    return {name: min(of, key=lambda rate: of[rate]) for name, of in found.items()}


def compare(
    shape: Shape, seeds: int, x: Tensor, rates: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Contender -> p20_ms, p50_ms, p80_ms, ratio, peak_mb and the mean and deviation of each figure.

    ``rates``: of contenders that are not trained at the shape's.
    """
    times: dict[str, list[float]] = {}
    found: dict[str, list[dict[str, float]]] = {}
    peaks: dict[str, float | None] = {}
    for train in Problem(shape._replace(steps=4), 0, x).contenders().values():
        with contextlib.suppress(ImportError), quiet():  # imports and compiling are nobody's time
            train()
    for seed in range(seeds):
        for name in Problem(shape, seed, x).contenders():
            mine = shape._replace(lr=(rates or {}).get(name, shape.lr))
            problem = Problem(mine, seed, x)  # the same split for each, none has drawn from it
            train = problem.contenders()[name]
            kept: list[Callable[[str], Any]] = []

            def run(train: Any = train, kept: Any = kept, name: str = name) -> None:
                clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
                start = clock()
                with quiet():
                    kept.append(train())
                times.setdefault(name, []).append(clock() - start)

            try:
                if seed:
                    run()
                else:
                    peaks[name] = peak_memory(run, DEVICE)
            except ImportError:  # a peer that is not installed
                continue
            with tempfile.TemporaryDirectory() as folder:
                kept[0](folder)
                found.setdefault(name, []).append(problem.figures(load_sae(folder)))
    table = summary(times, "SAELens")
    for name, rows in found.items():
        for key in rows[0]:
            table[name][key] = statistics.fmean(row[key] for row in rows)
            table[name][f"{key} sd"] = statistics.pstdev([row[key] for row in rows])
        if (peak := peaks.get(name)) is not None:
            table[name]["peak_mb"] = peak
    return table


@pytest.mark.parametrize("shape", GRID, ids=lambda s: "x".join(map(str, s)))
def test_sae_training(benchmark: Any, shape: Shape) -> None:
    tiny = shape in TINY_GRID
    with bench_threads():
        x = activations(60 if tiny else 2000)
        table = compare(shape, 2 if tiny else SEEDS, x)
        seeds = 2 if tiny else SEEDS
        about = {**shape._asdict(), "d_in": x.shape[1], "seeds": seeds}
        benchmark.extra_info.update(about, base="SAELens", contenders=table, environment=environment(DEVICE))
        benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("source", ["demo", SMOLLM2])
def test_own_rates(benchmark: Any, source: str) -> None:
    shape = CPU_GRID[0] if source == "demo" else CPU_GRID[0]._replace(d_sae=1024, steps=200)
    with bench_threads():
        x = activations(2000) if source == "demo" else of_smollm2()
        rates = own_rates(shape, x, RATES)
        table = compare(shape, SEEDS, x, rates)
        about = {key: value for key, value in shape._asdict().items() if key not in ("activation", "lr")}
        about = {"states": source, **about, "d_in": x.shape[1], "seeds": SEEDS}
        about["rates"] = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        benchmark.extra_info.update(about, base="SAELens", contenders=table, environment=environment(DEVICE))
        benchmark.pedantic(lambda: None, rounds=1)
