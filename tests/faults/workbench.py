"""A small run of every command, run in forks of a process that has the libraries loaded."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.limit=120",
    "sae.steps=20",
    "sae.d_sae=96",
    "sae.batch_size=256",
    "difficulty.n_labels=12",
    "difficulty.rollouts=2",
    "diversity.n_clusters=4",
    "diversity.svd=8",
    "plan.adaptive.svd=8",
    "train.steps=4",
    "train.save_every=2",
    "score.shard=40",
    "train.rollout.prompts_per_step=4",
    "train.rollout.group_size=2",
    "train.rollout.max_new_tokens=4",
    "train.eval.every=2",
    "data.eval_limit=16",
    "compare.arms=[vanilla,adaptive]",
    "compare.seeds=[0]",
    "compare.pools=",
    "compare.target_values=null",
    "compare.until=false",
]
# The pools of `compare --pools`, which needs no SAE for one arm.
POOLS = ["compare.pools=[a={0};data.limit=60,b={0};data.limit=40]", "compare.arms=[vanilla]"]
RUNS = tuple(f"{arm}/{what}" for arm in ("vanilla", "adaptive") for what in ("*.jsonl", "plan.*", "model/*"))
STAGES = {  # what each command adds to a folder in which those before it have run
    "sae train": ("sae/*.safetensors", "sae/cfg.json"),
    "score": ("scores.parquet", "features.safetensors", "labels.json"),
    "plan": ("plan.json", "plan.safetensors"),
    "train": ("adaptive/*.jsonl", "adaptive/plan.*", "adaptive/model/*"),
    "compare": RUNS,
    "report": ("report.md",),
    "sae convert": ("converted/cfg.json", "converted/*.safetensors"),  # its manifest names the source
}
MORE = {  # what other commands write, and the stage whose folder they begin in
    "sae train --from": ("sae train", ("sae/*.safetensors", "sae/cfg.json")),
    "train --overwrite": ("compare", ("adaptive/*.jsonl", "adaptive/plan.*", "adaptive/model/*")),
    "demo": ("sae train", ("scores.parquet", "plan.json", *RUNS)),
    "compare --pools": ("sae train", ("report.md", "[ab]/vanilla/*.jsonl")),  # theirs tell seconds
    "watch": ("report", ("live.png",)),
    "export": ("train", ("exported/*.parquet", "exported/plan.*")),
}
READING = ("report", "watch", "sae convert", "export")  # commands without --redo
VOLATILE = re.compile(r"seconds|time|date|per_second|phases|overhead|machine|started|memory|^id$|run_id")
LIMIT = 120.0  # seconds that no command here needs


@dataclass
class Ended:
    """How a command ended: exit code (negative: by that signal), what it printed, None where it hung."""

    code: int | None
    text: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text or self.code not in (
            0,
            2,
            None,
            130,
            143,
            129,
        )

    @property
    def said(self) -> str:
        """The last line that the command itself put into words."""
        return next((line for line in reversed(self.text.splitlines()) if line.startswith("saerl: ")), "")


@dataclass
class Started:
    """A command in a child process."""

    pid: int
    out: int  # a pipe with room for all that a command says
    began: float = field(default_factory=time.monotonic)

    def wait(self, limit: float = LIMIT) -> Ended:
        while time.monotonic() - self.began < limit:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return Ended(os.waitstatus_to_exitcode(status), self._text())
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return Ended(None, self._text())

    def _text(self) -> str:
        with open(self.out, "rb", buffering=0) as pipe:
            os.set_blocking(self.out, False)
            return (pipe.read() or b"").decode(errors="replace")


def command(name: str, run_dir: Path, *settings: str) -> list[str]:
    """The arguments of one of the STAGES, of MORE, or of ``sae info``."""
    if name in ("report", "watch"):
        return [name, str(run_dir)]
    if name == "export":
        return [name, str(run_dir), str(run_dir / "exported"), "--to", "trl"]  # which asks for a plan
    if name == "sae info":
        return ["sae", "info", str(run_dir / "sae")]
    if name == "sae convert":
        return ["sae", "convert", str(run_dir / "sae"), str(run_dir / "converted")]
    head, *flags = name.split(" --")
    config = ["--config", str(ROOT / "examples" / "demo.yaml"), "--quiet"]
    if "from" in flags:
        flags.remove("from")
        config.append(f"sae.init={os.environ['FAULTS_SAE']}")
    small = SMALL
    if "pools" in flags:
        flags.remove("pools")
        small = [*SMALL, *(text.format(ROOT / "examples" / "demo" / "pool.jsonl") for text in POOLS)]
    return [*head.split(), *(f"--{flag}" for flag in flags), *config, f"run_dir={run_dir}", *small, *settings]


def scratch(kind: str) -> Path:
    """A name that is free in the folder of the trial, which FAULTS_WORK holds."""
    return Path(os.environ["FAULTS_WORK"]) / f"{kind}-{time.monotonic_ns()}-{os.getpid()}"


def start(arguments: list[str], *, before: Callable[[], None] | None = None) -> Started:
    """Run ``saerl`` with these arguments in a fork; ``before`` is called in the child first."""
    out, to = os.pipe()
    fcntl.fcntl(to, fcntl.F_SETPIPE_SZ, 1 << 20)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(to)
        return Started(pid, out)
    code = 1
    try:
        os.dup2(to, 1)
        os.dup2(to, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        from saerl_fast.__main__ import main

        sys.argv = ["saerl", *arguments]
        code = main()
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def run(name: str, run_dir: Path, *settings: str, before: Callable[[], None] | None = None) -> Ended:
    """A command from beginning to end."""
    return start(command(name, run_dir, *settings), before=before).wait()


# --- what was written ----------------------------------------------------------------------------------


def written(run_dir: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """A digest of every file that matches, of its content without times and dates."""
    found = sorted({file for pattern in patterns for file in run_dir.glob(pattern) if file.is_file()})
    return {str(file.relative_to(run_dir)): _digest(file) for file in found}


def _digest(file: Path) -> str:
    try:
        value: Any = _content(file)
    except Exception:  # damaged
        value = file.read_bytes()
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(file)
        return [(n, t.shape, hashlib.sha256(t.tobytes()).hexdigest()) for n, t in sorted(tensors.items())]
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(file).to_pydict()
    if file.suffix == ".json":
        return _steady(json.loads(file.read_text()))
    if file.suffix == ".jsonl":
        return [_steady(json.loads(line)) for line in file.read_text().splitlines()]
    return re.sub(rb"\| date \|.*", b"", file.read_bytes())  # of a report, where a run.json was made again


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        volatile = ("sha256", "config", "fingerprint")  # of safetensors files: their keys have no order
        return {k: _steady(v) for k, v in value.items() if not VOLATILE.search(k) and k not in volatile}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def leftovers(run_dir: Path) -> list[str]:
    """Temporary files that nothing will ever clean."""
    return [
        str(f.relative_to(run_dir)) for f in run_dir.rglob("*") if ".tmp" in f.name or ".partial" in f.name
    ]


# --- templates -----------------------------------------------------------------------------------------


def _small_picture(figure: Any, path: Path, **_: Any) -> None:
    """In place of ``Figure.savefig``, which takes half of a command's time here: one pixel."""
    from matplotlib.image import imsave

    imsave(path, [[0.0]], format="png")


def warm_up() -> None:
    """Load what the children need, on one thread; no gradients, for a fork must not inherit them."""
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    import datasets.io.parquet
    import matplotlib.pyplot
    import peft
    import pyarrow.parquet
    import sklearn.cluster
    import sklearn.decomposition
    import sklearn.feature_extraction.text
    import sklearn.linear_model
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import saerl_fast.__main__
    import saerl_fast.integrations.export
    import saerl_fast.integrations.share
    import saerl_fast.records.page
    import saerl_fast.records.watch
    import saerl_fast.rl.trainer
    import saerl_fast.sae.capture
    import saerl_fast.sae.pooled
    import saerl_fast.sae.train
    import saerl_fast.signals.shards
    import saerl_fast.stages.compare
    import saerl_fast.stages.pipeline
    from saerl_kernels import encode_pool, pack_encoder, spherical_kmeans

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    matplotlib.use("Agg")
    matplotlib.figure.Figure.savefig = _small_picture
    demo = ROOT / "examples" / "demo" / "model"
    assert AutoModelForCausalLM.from_pretrained(demo) and AutoTokenizer.from_pretrained(demo)
    assert transformers and peft and pyarrow.parquet and sklearn and saerl_fast
    with torch.no_grad():  # compiled code is read from its cache once
        encoder = pack_encoder(torch.randn(8, 16), torch.zeros(16))
        X = encode_pool(torch.randn(6, 8), [0, 3, 6], encoder, 2)
        spherical_kmeans(X, 1)
    assert saerl_fast.records.page.packed_plotly()
    gc.freeze()  # or each child would search all of it for garbage


def templates(home: Path) -> dict[str, Path]:
    """A folder for every stage in which all before it have run, and ``compare``'s end under ``end``.

    For every command of MORE the one that it begins in, and what it makes of it under ``after ...``.
    """
    made, before = {}, None
    for name in (*STAGES, "end"):
        made[name] = _template(home, name, made[before] if before else None, before)
        before = name
    os.environ["FAULTS_SAE"] = str(made["score"] / "sae")
    for name, (stage, _) in MORE.items():
        made[name] = made[stage]
        made[f"after {name}"] = _template(home, f"after {name}", made[stage], name)
    return made


def _template(home: Path, name: str, base: Path | None, ran: str | None) -> Path:
    """A copy of ``base`` in which a command ran, made once."""
    folder = home / name.replace(" ", "-") / "run"
    if not (done := folder.with_name("done")).exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder) if base else folder.mkdir(parents=True)
        if ran:
            ended = run(ran, folder)
            assert ended.code == 0, f"{ran}: {ended.text}"
        done.touch()
    return folder


def fresh(template: Path) -> Path:
    """A copy of a template, to be spoilt, in the folder of the trial that asks."""
    folder = scratch("trial") / "run"  # reports tell the folder's name
    shutil.copytree(template, folder, symlinks=True)
    return folder
