"""The ``saerl`` command. Nothing heavy is imported before a subcommand is chosen."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from saerl_fast import __version__
from saerl_fast.config import SCHEDULES, Config, apply_overrides, describe, load_config
from saerl_fast.errors import SaerlError, halved, named, no_memory, printable
from saerl_fast.fileio import writing, written
from saerl_fast.hub import at_home
from saerl_fast.rl.interrupt import graceful_interrupt, handled

SHORTCUTS = {  # flag -> config key: what most people set on the command line
    "model": "model.path",
    "gguf-file": "model.gguf_file",
    "data": "data.train",
    "eval-data": "data.eval",
    "sae": "sae.path",
    "run-dir": "run_dir",
    "seed": "seed",
}
TORCHRUN = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}  # what it sets, and without it
GIVEN = {name: os.environ.get(name, str(usual)) for name, usual in TORCHRUN.items()}
PATHS = ("config", "plan", "run", "folder")
PROCESSES, RANK, _ = (int(at) if at.isdecimal() else TORCHRUN[name] for name, at in GIVEN.items())
OPTIONAL = {  # module -> package, of what the commands need and the kernels do not
    **{name: name for name in ("transformers", "datasets", "safetensors", "matplotlib", "numba", "pyarrow")},
    **{"scipy": "scipy", "tqdm": "tqdm", "yaml": "pyyaml", "sklearn": "scikit-learn"},
}
_said: set[str] = set()  # warnings of libraries
OVERRIDES_HELP = "settings as key.sub=value, e.g. train.lr=3e-6 (`saerl settings` lists all)"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    plain = argparse.ArgumentParser(add_help=False)
    plain.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[plain])
    common.add_argument("--config", metavar="FILE", help="YAML file with settings")
    for flag, key in SHORTCUTS.items():
        common.add_argument(f"--{flag}", metavar="VALUE", help=f"short for {key}=VALUE")
    common.add_argument("--quiet", action="store_true", help="only errors and the final table")
    common.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)

    top = argparse.ArgumentParser(
        prog="saerl",
        description="Sparse-autoencoder signals for RL post-training: score, plan, train, compare.",
    )
    top.add_argument("--version", action="version", version=f"saerl {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sae = commands.add_parser("sae", help="train a TopK SAE on a model's hidden states, or describe one")
    sae_commands = sae.add_subparsers(dest="sae_command", required=True, metavar="train|info|convert")
    sae_train = sae_commands.add_parser("train", parents=[common], help="train on the prompts' activations")
    sae_train.add_argument("--from", metavar="SAE", help="short for sae.init=SAE: go on from this one")
    info = sae_commands.add_parser("info", parents=[plain], help="describe an SAE")
    said = "write an SAE of any format as a SAELens folder"
    convert = sae_commands.add_parser("convert", parents=[plain], help=said)
    for command in (info, convert):
        command.add_argument("path", help="folder or file, SAELens release/id, or hub repository")
    convert.add_argument("folder", help="new folder to write")
    said_help = "what its files leave open, e.g. architecture=topk k=32 hook_name=blocks.12.hook_resid_post"
    convert.add_argument("said", nargs="*", metavar="name=value", help=said_help)

    score = commands.add_parser(
        "score", parents=[common], help="prompts x model x SAE -> scores.parquet and features"
    )
    plan = commands.add_parser("plan", parents=[common], help="scores -> plan.json")
    train = commands.add_parser("train", parents=[common], help="one GRPO run under a plan")
    for command in (plan, train):
        command.add_argument(
            "--schedule",
            metavar="NAME",
            help=f"short for plan.schedule: {', '.join(SCHEDULES)} or module:function",
        )
    train.add_argument("--plan", metavar="FILE", help="follow this plan.json instead of building one")
    train.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint")
    train.add_argument("--overwrite", action="store_true", help="replace a finished or interrupted run")
    compare = commands.add_parser(
        "compare", parents=[common], help="arms x seeds -> report; resumes by itself"
    )
    compare.add_argument("--arms", metavar="A,B", help="short for compare.arms=A,B")
    compare.add_argument("--seeds", metavar="0,1", help="short for compare.seeds=0,1")
    compare.add_argument("--pools", metavar="A=FILE,B=FILE", help="short for compare.pools=A=FILE,B=FILE")
    demo = commands.add_parser("demo", parents=[common], help="all of it on a tiny model that comes along")
    for command in (sae_train, score, plan, train, compare, demo):
        command.add_argument(
            "--redo", action="store_true", help="make again what was made with other settings, and only that"
        )
    watch = commands.add_parser(
        "watch", parents=[plain], help="follow a run: latest row, and its curves in live.png"
    )
    watch.add_argument("run", help="folder of a run or a comparison")
    watch.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="how often to look")
    export = commands.add_parser(
        "export", parents=[plain], help="scores and plan as Parquet with a card, for another trainer"
    )
    export.add_argument("run", help="folder that `saerl score` wrote, with plan.json of `saerl plan`")
    export.add_argument("folder", help="new folder to write")
    export.add_argument("--to", default="parquet", metavar="NAME", help="parquet (also Ray), trl or verl")
    export.add_argument("--plan", metavar="FILE", help="this plan.json instead")
    export.add_argument("--reward", metavar="A,B", help="verl: as train.reward, by default exact")
    export.add_argument("--push-to-hub", metavar="NAME", help="upload it as this dataset, user/name")
    export.add_argument("--private", action="store_true", help="a new dataset is not public")
    settings = commands.add_parser(
        "settings", parents=[plain], help="every setting with its default, meaning and range"
    )
    settings.add_argument("section", nargs="?", default="", help="only those in this section, as train.loss")
    report = commands.add_parser(
        "report", parents=[plain], help="tables and plots again from what a run recorded"
    )
    report.add_argument("run", help="folder of a run, a comparison or scores")
    return top


def read_config(args: argparse.Namespace) -> Config:
    """The config tree that the parsed arguments ask for; later settings win over earlier ones."""
    own = {
        "schedule": "plan.schedule",
        "arms": "compare.arms",
        "seeds": "compare.seeds",
        "pools": "compare.pools",
        "from": "sae.init",
    }
    shortcuts = SHORTCUTS | own
    given = ((key, getattr(args, flag.replace("-", "_"), None)) for flag, key in shortcuts.items())
    return load_config(
        args.config, [f"{key}={value}" for key, value in given if value is not None] + args.overrides
    )


def demo_config(args: argparse.Namespace) -> Config:
    """The config of the demo that comes with the package (in a clone: examples/), files where they are."""
    home = Path(__file__).parent
    root = home / "examples" if (home / "examples").is_dir() else home.parent / "examples"
    args.config = args.config or str(root / "demo.yaml")
    if not Path(args.config).is_file():
        raise SaerlError(f"{args.config} does not exist; install saerl-fast again, or pass --config")
    folder = root / "demo"
    with suppress(ValueError):  # as demo.yaml names them, where that is right
        folder = folder.relative_to(Path.cwd())
    places = {"model.path": "model", "data.train": "pool.jsonl", "data.eval": "eval.jsonl"}
    found = [f"{key}={(folder / name).as_posix()}" for key, name in places.items()]
    args.overrides = [*found, *args.overrides]
    config = read_config(args)
    if any(item.startswith("compare.pools") for item in args.overrides):
        return config
    own = [pool.replace("=examples/demo/", f"={folder.as_posix()}/") for pool in config.compare.pools]
    return apply_overrides(config, [f"compare.pools={json.dumps(own)}"]) if own else config


def run(args: argparse.Namespace) -> None:
    """Dispatch to the pipeline; imports happen here."""
    if args.command == "settings":
        _say(describe(args.section))
        return
    if args.command == "report":
        from saerl_fast.records.report import write_report

        for path in write_report(Path(args.run), echo=_say):
            _say(f"wrote {path}")
        return
    if args.command == "export":
        from saerl_fast.integrations.export import export
        from saerl_fast.integrations.share import check_share, share

        if args.push_to_hub is not None:
            check_share(args.push_to_hub)
        elif args.private:
            raise SaerlError("--private is said of an upload; add --push-to-hub NAME")
        reward = (args.reward or "exact").split(",")
        if args.reward and args.to != "verl":
            raise SaerlError(f"--to {args.to} takes no reward, its trainer has its own; leave --reward out")
        for path in export(args.run, args.folder, args.to, plan=args.plan, reward=reward):
            _say(f"wrote {path}")
        if args.push_to_hub is not None:
            _say(f"uploaded to {share(args.folder, args.push_to_hub, private=args.private)}")
        return
    if args.command == "watch":
        from saerl_fast.records.watch import watch
        from saerl_fast.stages.console import Echo

        watch(args.run, Echo(), every=args.every)
        return
    if args.command == "sae" and args.sae_command == "info":
        from saerl_fast.stages.pipeline import describe_sae

        _say(describe_sae(args.path))
        return
    if args.command == "sae" and args.sae_command == "convert":
        from saerl_fast.sae.files import convert_sae

        _say(f"wrote {args.folder}: {convert_sae(args.path, args.folder, args.said)}")
        return

    config = demo_config(args) if args.command == "demo" else read_config(args)
    from saerl_fast.stages import compare, pipeline, preflight, train
    from saerl_fast.stages.console import Echo

    echo = Echo(quiet=args.quiet or RANK > 0)
    preflight.set_up(config, new_sae=args.command == "sae")
    if args.command == "sae":
        pipeline.sae_stage(config, echo, redo=args.redo)
    elif args.command == "score":
        pipeline.score_stage(config, echo, redo=args.redo)
    elif args.command == "plan":
        pipeline.plan_stage(config, echo, redo=args.redo)
    elif args.command == "train":
        train.train_stage(
            config,
            echo,
            plan_file=args.plan,
            resume=args.resume,
            overwrite=args.overwrite,
            redo=args.redo,
            with_report=True,
        )
    elif args.command == "demo":
        compare.refuse_other_kind(config)
        if not config.compare.pools:  # each of which has its own
            pipeline.plan_stage(config, echo, redo=args.redo)  # with the SAE and the scores that it reads
        compare.compare(config, echo, redo=args.redo)
    elif args.command == "compare":
        compare.compare(config, echo, redo=args.redo)


def _run_together(args: argparse.Namespace) -> int:
    """One of the processes that torchrun started; an error in any ends all of them, and is printed once."""
    from saerl_fast.rl import distributed

    distributed.start()
    code = 0
    try:
        if args.command != "train":
            raise SaerlError(f"`saerl {args.command}` is the work of one process; start it without torchrun")
        with graceful_interrupt():  # one process that left at once would keep the others waiting
            run(args)
        distributed.gather(lambda: None)  # the others may still fail
    except SaerlError as err:
        distributed.broadcast_error(err)
        if RANK == 0:
            _complain(err, args)
        code = 2
    distributed.shutdown()
    return code


def _say(text: str) -> None:
    with writing("standard output"):
        print(printable(text), flush=True)


class _Plain(logging.Formatter):
    """Lines of the log without characters that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _warned(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """A library's warning as one line, once."""
    line = f"{category.__name__}: {(str(message).strip().splitlines() or [''])[0]}"
    if line not in _said:
        _said.add(line)
        logging.getLogger(__name__).warning("%s", line)


def _unexpected(err: Exception, args: argparse.Namespace) -> int:
    """What no border has caught, in a sentence: 2 where the machine is to blame, 1 for a bug, ours or not."""
    from saerl_fast.fileio import cannot_write

    frames = traceback.extract_tb(err.__traceback__)
    ours = [frame for frame in frames if Path(__file__).parent.name in Path(frame.filename).parts]
    place = f"{(ours or frames)[-1].filename}:{(ours or frames)[-1].lineno}" if frames else "?"
    what = named(err)
    if no_memory(err):
        fix = "lower train.micro_tokens, train.rollout.batch_size or score.batch_tokens, or limit data.train"
        _complain(SaerlError(f"there is not enough memory ({what}, at {place}); {fix}"), args, err)
        return 2
    if fault := cannot_write(getattr(err, "filename", None) or "a file", err):
        said = str(fault).removeprefix("cannot write ")
        _complain(SaerlError(f"cannot use {said} (at {place})"), args, err)
        return 2
    fix = "run the command again with --debug, and report what it shows with this line"
    _complain(SaerlError(f"unexpected {what} (at {place}); what was written stays; {fix}"), args, err)
    return 1


def _complain(err: SaerlError, args: argparse.Namespace, cause: BaseException | None = None) -> None:
    """One sentence on stderr; with --debug the traceback before it, from the first error on."""
    with suppress(OSError):  # nobody reads it, or there is no room
        _close_bars()
        if getattr(args, "debug", False):
            shown: BaseException | None = cause or err
            while shown is not None:
                shown.__suppress_context__ = False
                shown = shown.__cause__ or shown.__context__
            traceback.print_exception(cause or err)
        print(f"saerl: {SaerlError(err)}", file=sys.stderr, flush=True)  # some make their sentence late


def _kept() -> str:
    """What this process has completed, by folder, and is still there."""
    found: dict[Path, list[str]] = {}
    for path in written:
        if path.exists():
            is_step = path.parent.name == "checkpoints"
            folder = path.parent.parent if is_step else path.parent
            found.setdefault(folder, []).append(
                f"step {int(path.name.split('-')[1])}" if is_step else path.name
            )
    shown = []
    for folder, names in found.items():
        steps = [name for name in names if name.startswith("step ")]
        names = [name for name in names if name not in steps[:-1]]
        more = f" and {len(names) - 4} more" if len(names) > 5 else ""
        shown.append(f"{folder} ({', '.join(names if not more else names[-4:])}{more})")
    return f"{', '.join(shown)} kept; to go on" if shown else "nothing was written; to start again"


def _again(args: argparse.Namespace, words: Sequence[str]) -> str:
    """The command that goes on where this one was interrupted."""
    begun = args.command == "train" and any(path.name == "run.json" and path.exists() for path in written)
    if begun and not (args.resume or args.redo):
        words = [*(word for word in words if not "--overwrite".startswith(word) or len(word) < 3), "--resume"]
    return (
        f"`{shlex.join(['saerl', *words])}`" if PROCESSES == 1 else f"`... {shlex.join(words)}` by torchrun"
    )


def _close_bars() -> None:
    if "saerl_fast.stages.console" in sys.modules:
        from saerl_fast.stages.console import close_bars

        close_bars()


def _refuse_unwritable(argv: Sequence[str]) -> None:
    """SaerlError for names of bytes that are no UTF-8: the libraries that read and write files take none."""
    with suppress(OSError):
        argv = [*argv, os.getcwd()]
    if wrong := next(filter(halved, argv), None):
        raise SaerlError(f"{wrong!r} is no UTF-8, so not every library can use that name; rename the folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when done, 2 for bad input (one sentence, no traceback), 130 when interrupted.

    After SIGTERM 143 and after SIGHUP 129, as a shell counts.
    """
    try:
        with handled(), warnings.catch_warnings():
            warnings.showwarning = _warned
            return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as err:  # before the arguments are read, or when all is done
        return 128 + int(getattr(err, "number", signal.SIGINT))


def _main(argv: Sequence[str]) -> int:
    first = RANK == 0
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(message)s" if first else f"[{RANK}] %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("saerl_fast").setLevel(logging.INFO if first else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError, OSError, ValueError):  # a terminal without UTF-8 gets escapes
            getattr(sys, name).reconfigure(errors="backslashreplace")
    top = parser()
    args, extra = top.parse_known_args(argv)  # argparse takes settings in one place only; users mix them
    if any(item.startswith("-") or "=" not in item for item in extra):
        top.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra and not hasattr(args, "overrides"):
        top.error(f"`saerl {args.command}` takes no settings, got {' '.join(extra)}")
    if extra:
        args.overrides += extra
    written.clear()
    _said.clear()
    try:
        for name, value in GIVEN.items():
            if not value.isdecimal():
                raise SaerlError(f"the environment variable {name} is {value!r}, not a number; unset it")
        for name, value in vars(args).items():
            if value == "" and name != "section":
                raise SaerlError(
                    f"{name.replace('_', '-')} is empty; give a value (is a shell variable unset?)"
                )
            if name in PATHS and value is not None:
                setattr(args, name, str(at_home(value)) if value.startswith("~") else value)
        _refuse_unwritable(argv)
        if PROCESSES > 1:
            return _run_together(args)
        run(args)
    except SaerlError as err:
        full = no_memory(err) if type(err) is SaerlError else None  # a reward's own has its name
        if isinstance(full, Exception):
            return _unexpected(full, args)
        _complain(err, args)
        return 2
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if missing not in OPTIONAL:
            return _unexpected(err, args)
        fix = (
            f'run `pip install -e ".[all]"` in the clone of saerl-fast, or `pip install {OPTIONAL[missing]}`'
        )
        _complain(SaerlError(f"{missing} is not installed; {fix}"), args, err)
        return 2
    except KeyboardInterrupt as err:
        number = getattr(err, "number", 2)
        with suppress(OSError):  # of a terminal that has gone
            _close_bars()
            if RANK == 0 and args.command != "watch":
                print(f"saerl: interrupted; {_kept()}: {_again(args, argv)}", file=sys.stderr, flush=True)
        return 0 if (args.command, number) == ("watch", 2) else 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        return _unexpected(err, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
