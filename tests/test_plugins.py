"""Functions from outside by name: what is found, and the one sentence for what is not."""

from __future__ import annotations

import sys

import pytest

from saerl_fast import plugins
from saerl_fast.errors import SaerlError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("saerl_plugged", None)


def test_a_function_of_the_working_folder_by_module_and_by_file(folder):
    (folder / "saerl_plugged.py").write_text("def f():\n    return 3\n\nlimit = 5\n")
    for spec in ("saerl_plugged:f", "saerl_plugged.py:f", f"{folder}/saerl_plugged.py:f"):
        assert plugins.load_function(spec, "a.b")() == 3
    assert plugins.load_function("saerl_plugged:limit", "a.b", int) == 5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("saerl_no_module:f", "a.b=saerl_no_module:f: importing saerl_no_module raised ModuleNotFoundError"),
        ("none.py:f", "a.b=none.py:f: none.py does not exist"),
        ("saerl_plugged:g", "a.b=saerl_plugged:g: saerl_plugged has no function 'g'; it has f"),
        ("saerl_plugged:limit", "has no function 'limit'; it has f"),
        ("broken.py:f", "a.b=broken.py:f: importing broken.py raised ZeroDivisionError: division by zero"),
        ("script.py:f", "a.b=script.py:f: importing script.py raised SystemExit: 3"),
    ],
)
def test_what_cannot_be_loaded_names_the_setting(folder, spec, said):
    (folder / "saerl_plugged.py").write_text("def f():\n    return 3\n\nlimit = 5\n")
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "script.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SaerlError) as caught:
        plugins.load_function(spec, "a.b")
    assert str(caught.value).startswith("a.b=") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_of_other_arguments_is_refused_when_it_is_loaded(folder):
    (folder / "saerl_plugged.py").write_text("def f(a, b=1, *, c=2):\n    pass\n\nclass C:\n    pass\n")
    assert plugins.load_function("saerl_plugged:f", "a.b", takes=("x", "y"))
    assert plugins.load_function("builtins:max", "a.b", takes=("x", "y"))  # has no signature
    for spec, takes in [("saerl_plugged:f", ("x", "y", "z")), ("saerl_plugged:C", ("x",))]:
        with pytest.raises(SaerlError, match=rf"a.b={spec} must take \({', '.join(takes)}\): too many"):
            plugins.load_function(spec, "a.b", takes=takes)


@pytest.mark.parametrize("name", ["one", "pkg.mod:fn", "dir/file.py:fn"])
def test_names_that_pass(name):
    plugins.check_name(name, ("one", "two"), "a.b")


@pytest.mark.parametrize("name", ["onne", "nothing", "mod:", ":fn", "mod:two words", ""])
def test_names_that_do_not(name):
    with pytest.raises(SaerlError, match="a.b='.*' is unknown.*choose one of one, two or module:function"):
        plugins.check_name(name, ("one", "two"), "a.b")
    with pytest.raises(SaerlError, match="did you mean one"):
        plugins.check_name("onne", ("one", "two"), "a.b")


def test_what_a_function_raises_is_said_and_some_kinds_pass():
    with pytest.raises(
        SaerlError, match="^thing raised ZeroDivisionError: .*zero .*plugins.py line .*; mend it$"
    ):
        plugins.call("thing", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plugins.call("thing", lambda: 1 // 0, let=ZeroDivisionError)


def test_the_digest_follows_the_file(folder):
    file = folder / "saerl_plugged.py"
    file.write_text("def f():\n    return 3\n")
    first = plugins.source_digest("saerl_plugged:f")
    assert first == plugins.source_digest("saerl_plugged.py:f") is not None
    file.write_text("def f():\n    return 4\n")
    assert plugins.source_digest("saerl_plugged:f") != first
    assert plugins.source_digest("saerl_no_module.sub:f") is None
    assert plugins.source_digest("none.py:f") is None


def test_a_file_that_changed_after_it_was_read_is_refused(folder):
    file = folder / "saerl_edited.py"
    file.write_text("def f():\n    return 3\n")
    spec = "saerl_edited:f"
    assert plugins.load_function(spec, "train.reward")() == 3
    first = plugins.source_digest(spec)
    file.write_text("def f():\n    return 4\n")
    for _ in range(2):  # a record that names the new content would tell of code that does not run
        with pytest.raises(SaerlError, match="saerl_edited:f was changed .* start the command again"):
            plugins.source_digest(spec)
        assert plugins.load_function(spec, "train.reward")() == 3
    file.write_text("def f():\n    return 3\n")
    assert plugins.source_digest(spec) == first
    script = "saerl_edited.py:f"  # is read at each load
    assert plugins.load_function(script, "train.reward")() == 3
    file.write_text("def f():\n    return 4\n")
    assert plugins.load_function(script, "train.reward")() == 4 and plugins.source_digest(script) != first


def test_a_change_of_what_a_function_imports_is_seen(folder):
    """Of its own folder, package and the working folder, not of what is installed."""
    files = {
        "saerl_plugged.py": "import numpy, saerl_fast.cli\nfrom saerl_helper import x\n\ndef f(): ...\n",
        "saerl_helper.py": "def x():\n    from saerl_pack.one import y\n",
        "saerl_pack/__init__.py": "",
        "saerl_pack/one.py": "from . import two\nfrom .sub import three\nimport saerl_plugged\n",
        "saerl_pack/two.py": "",
        "saerl_pack/sub/__init__.py": "from ..four import z\n",
        "saerl_pack/sub/three.py": "",
        "saerl_pack/four.py": "z = 1\n",
        "unused.py": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    used = {str(path.relative_to(folder)) for path in plugins._sources(folder / "saerl_plugged.py")}
    assert used == set(files) - {"unused.py"}
    before = plugins.source_digest("saerl_plugged:f")
    for name in files:
        (folder / name).write_text(files[name] + "# other\n")
        assert (plugins.source_digest("saerl_plugged:f") == before) == (name == "unused.py")
        (folder / name).write_text(files[name])
    assert plugins.source_digest("saerl_plugged:f") == before
    (folder / "saerl_helper.py").write_text("def :")
    assert plugins.source_digest("saerl_plugged:f") is None  # load_function says so
