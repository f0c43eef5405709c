import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.run_all import heed_interrupts
from saerl_fast import cli
from saerl_fast.fileio import write_json
from saerl_fast.stages.arms import parse_pool


def code_and_error(argv, capsys):
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's own exit
        code = stop.code
    return code, capsys.readouterr().err


def test_a_home_folder_that_no_shell_has_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("run_dir: ~/runs\ndata: {train: ~/pool.jsonl}\n")
    assert cli.read_config(cli.parser().parse_args(["train", f"--config={tmp_path}/run.yaml"])).run_dir == (
        str(tmp_path / "runs")
    )
    (tmp_path / "pool.jsonl").write_text("[]\n")
    for argv, said in (
        (["report", "~/runs"], f"{tmp_path}/runs is not a folder"),
        (["score", "--config=~/run.yaml", "model.path=m"], "pool.jsonl line 1 must be a JSON object"),
    ):
        code, error = code_and_error(argv, capsys)
        assert code == 2 and said in error, error


def test_a_working_folder_that_is_no_utf8(tmp_path, monkeypatch, capsys):
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(odd)
    monkeypatch.chdir(os.fsdecode(odd))
    code, error = code_and_error(["report", "."], capsys)
    assert code == 2 and "\\udcff' is no UTF-8" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(("argv", "out"), [(["settings"], "stdout"), (["report", "nowhere"], "stderr")])
def test_a_full_disk_behind_a_stream(argv, out):
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {out: full}
        done = subprocess.run([sys.executable, "-m", "saerl_fast.cli", *argv], **streams, text=True)
    said = "saerl: cannot write standard output: No space left on device; free some space\n"
    assert done.returncode == 2 and (done.stderr or done.stdout) == (said if out == "stdout" else "")


def test_help_imports_nothing_heavy():
    probe = (
        "import sys; from saerl_fast import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'sklearn', 'sae_lens', 'triton'}\n"
        "heavy |= {'numpy', 'scipy', 'pandas', 'pyarrow', 'matplotlib', 'ray', 'trl', 'vllm'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["plan", "--schedule", "zigzag"], "choose one of vanilla, literal, global, medium"),
        (["train", "train.stepz=3"], "did you mean train.steps"),
        (["train", "train.steps=many"], "train.steps='many' is not a valid int"),
        (["train", "threads=0"], "threads=0"),
        (["score", "data.train=examples/demo/pool.jsonl"], "model.path"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (
            ["report", "examples/demo"],
            "holds no metrics.jsonl and no scores; run `saerl score`, `saerl train`",
        ),
        (["train", "data.prompt_column=null"], "data.prompt_column cannot be null; give a value"),
        (["watch", "nowhere"], "nowhere is not a folder"),
        (["watch", "examples"], "examples holds no run"),
        (["demo", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["sae", "info", "nowhere"], "nowhere"),
        (["sae", "convert", "nowhere", "new"], "SAE nowhere does not exist"),
        (["sae", "convert", "nowhere", "new", "size=1"], "is nothing to say about an SAE"),
        (["sae", "train", "--sae", "somewhere"], "names an SAE already"),
        (["settings", "zigzag"], "unknown config key zigzag"),
        (["train", "data.limit=0"], "data.limit=0 must be at least 1"),
        (["report", "x", "a.b=1"], "takes no settings"),
        (["frobnicate"], "invalid choice"),
        (["report", "runs/\udcff"], "'runs/\\udcff' is no UTF-8"),
        (["train", "run_dir=\udcff"], "is no UTF-8"),
        (["report", "~nobody-at-all/x"], "the home folder of a user who has none"),
        (["train", "run_dir=~nobody-at-all/x"], "the home folder of a user who has none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence_and_exit_code_2(argv, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    code, error = code_and_error(argv, capsys)
    assert code == 2
    assert said in error
    assert "Traceback" not in error


def test_later_settings_win_and_may_stand_anywhere():
    args, extra = cli.parser().parse_known_args(["train", "seed=1", "--model", "m", "--resume", "seed=2"])
    args.overrides += extra
    config = cli.read_config(args)
    assert (config.seed, config.model.path, args.resume) == (2, "m", True)


def test_the_demos_pools_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = cli.demo_config(cli.parser().parse_args(["demo"]))
    assert [parse_pool(text)[0] for text in config.compare.pools] == ["demo", "hard"]
    for text in config.compare.pools:
        named = dict(item.split("=", 1) for item in parse_pool(text)[1])
        assert Path(named["data.train"]).is_file() and Path(named["sae.path"]).is_dir()
    assert cli.demo_config(cli.parser().parse_args(["demo", "compare.pools="])).compare.pools == []


def test_sae_convert_and_info(tmp_path, capsys):
    import torch

    state = {"W_enc": torch.ones(3, 5), "b_enc": torch.zeros(5), "W_dec": torch.ones(5, 3)}
    torch.save(state | {"b_dec": torch.zeros(3)}, tmp_path / "raw.pt")
    said = ["architecture=topk", "k=2", "apply_b_dec_to_input=true", "hook_name=blocks.1.hook_resid_post"]
    assert cli.main(["sae", "convert", str(tmp_path / "raw.pt"), str(tmp_path / "new"), *said]) == 0
    assert "SAE(topk, d_in=3, d_sae=5, k=2, layer=2, float32, cpu)" in capsys.readouterr().out
    assert cli.main(["sae", "info", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "SAE(topk" in shown and "hook_name: blocks.1.hook_resid_post" in shown


BAD_REWARD = """
def helper(answer):
    return {}[answer]  # the line to find

def boom(prompts, completions, answer, **columns):
    return [helper(a) for a in answer]
"""


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_where_an_error_comes_from(debug, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    (tmp_path / "mine.py").write_text(BAD_REWARD)
    argv = ["train", "--config", "examples/demo.yaml", "plan.schedule=vanilla", f"run_dir={tmp_path / 'r'}"]
    argv += [f"train.reward={tmp_path / 'mine.py'}:boom", *["--debug"] * debug]
    code, error = code_and_error(argv, capsys)
    assert code == 2 and "KeyError" in error.splitlines()[-1] and error.splitlines()[-1].startswith("saerl: ")
    assert ("Traceback" in error) == debug
    assert ("return {}[answer]  # the line to find" in error) == debug


@pytest.mark.parametrize("argv", [["report", "nowhere"], ["watch", "nowhere"], ["sae", "info", "nowhere"]])
def test_every_command_has_debug(argv, capsys):
    code, error = code_and_error([*argv, "--debug"], capsys)
    assert code == 2 and "Traceback" in error and error.splitlines()[-1].startswith("saerl: ")


@pytest.mark.parametrize(
    ("argv", "missing"), [(["sae", "info", "sae"], "safetensors"), (["report", "run"], "matplotlib.pyplot")]
)
def test_a_package_that_is_not_installed_is_one_sentence(argv, missing, tmp_path, capsys, monkeypatch):
    """As after an install without extras, wherever the import stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", lambda args: __import__(missing))
    monkeypatch.setitem(sys.modules, missing, None)
    code, error = code_and_error(argv, capsys)
    assert code == 2 and 'run `pip install -e ".[all]"`' in error and "Traceback" not in error
    monkeypatch.setitem(sys.modules, "nobodys_module", None)
    monkeypatch.setattr(cli, "run", lambda args: __import__("nobodys_module"))
    code, error = code_and_error(argv, capsys)
    assert code == 1 and error.startswith("saerl: unexpected ModuleNotFoundError")  # ours, or the user's code


COMMANDS = [
    ("pipeline", "sae_stage", ["sae", "train"]),
    ("pipeline", "score_stage", ["score"]),
    ("pipeline", "plan_stage", ["plan"]),
    ("train", "train_stage", ["train", "train.steps=2"]),
    ("compare", "compare", ["compare"]),
]


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Run a command in whose stage ``number`` comes, after files were written: its code and its last line."""
    from saerl_fast.stages import compare, preflight

    assert compare  # which would keep the stages that stand in below, were it imported later
    monkeypatch.setattr(preflight, "set_up", lambda config, new_sae=False: None)

    def run(module, stage, argv, number, files=()):
        def work(*_, **__):
            for file in files:
                write_json(tmp_path / file, {})
            os.kill(os.getpid(), number)
            time.sleep(10)

        monkeypatch.setattr(f"saerl_fast.stages.{module}.{stage}", work)
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        code = cli.main([*argv, f"run_dir={tmp_path}"])
        assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return code, capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[1])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_every_command_in_a_sentence(command, number, code, ended, tmp_path):
    again = f"to start again: `saerl {' '.join(command[2])} run_dir={tmp_path}`"
    assert ended(*command, number) == (code, f"saerl: interrupted; nothing was written; {again}")


def test_what_is_kept_and_how_to_go_on(ended, tmp_path):
    files = ["labels.json", "arm/run.json", "arm/plan.json"]
    files += [f"arm/checkpoints/step-{i:06d}-0123456789abcdef.safetensors" for i in (1, 2)]
    module, stage, argv = COMMANDS[3]
    code, said = ended(module, stage, [*argv, "--over", "a.b='x y'"][:3], signal.SIGTERM, files)
    assert said == (
        f"saerl: interrupted; {tmp_path} (labels.json), {tmp_path}/arm (run.json, plan.json, step 2) kept; "
        f"to go on: `saerl train train.steps=2 run_dir={tmp_path} --resume`"
    )
    for flag in ("--resume", "--redo"):
        assert ended(module, stage, [*argv, flag], signal.SIGTERM, files)[1].endswith(
            f"{flag} run_dir={tmp_path}`"
        )
    said = ended("compare", "compare", ["compare", "--redo"], signal.SIGTERM, files)[1]
    assert said.endswith(f"to go on: `saerl compare --redo run_dir={tmp_path}`")


@pytest.mark.parametrize(
    "argv",
    [["train", "--run-dir", ""], ["train", "--plan", ""], ["score", "--config", ""], ["plan", "--data", ""],
     ["report", ""], ["watch", ""], ["sae", "info", ""], ["sae", "convert", "x", ""], ["train", "run_dir="],
     ["train", "--schedule", ""], ["compare", "--arms", ""]],
    ids=" ".join,
)  # fmt: skip
def test_an_unset_variable_is_no_name(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = code_and_error(argv, capsys)
    assert code == 2 and error.startswith("saerl: ") and error.count("\n") == 1 and "empty" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("RANK", "-1")])
def test_a_rank_that_is_no_number_is_one_sentence(name, value):
    done = subprocess.run(
        [sys.executable, "-m", "saerl_fast.cli", "settings", "sae"],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr == f"saerl: the environment variable {name} is {value!r}, not a number; unset it\n"


@pytest.mark.parametrize("when", ["saerl_fast.config", "saerl_fast.cli"])
def test_ctrl_c_while_modules_are_loaded_shows_no_traceback(when):
    code = "import os, signal, sys\nfrom saerl_fast.__main__ import main\n"
    code += f"hit = lambda name: name == {when!r} and os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.addaudithook(lambda event, args: event == 'import' and hit(args[0]) and None)\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=heed_interrupts,
    )
    assert done.returncode == -signal.SIGINT and done.stderr == b""


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "saerl_fast", "settings", "train.lora"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0 and "train.lora.rank" in done.stdout
