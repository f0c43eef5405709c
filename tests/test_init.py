"""The promised names: light to import, all there, documented, and what README and examples use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saerl_fast

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, saerl_fast\n"
        "print(len(dir(saerl_fast)), sorted(m for m in sys.modules if m.startswith('saerl_fast.')))\n"
        "saerl_fast.Config, saerl_fast.SaerlError\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'sklearn', 'saerl_kernels', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", saerl_fast.__all__)
def test_every_promised_name_resolves_and_is_documented(name):
    found = getattr(saerl_fast, name)
    assert found is getattr(saerl_fast, name)
    doc = found.__doc__ or ""
    assert doc.strip() and not doc.startswith(f"{name}("), "a docstring of its own"
    assert name in dir(saerl_fast)
    assert re.search(rf"^\| [^|]*`{name}`[^|]* \|", README, re.MULTILINE), "in README's table"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(saerl_fast.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.asname or alias.name: node.module for alias in node.names}
    assert seen == {name: f"saerl_fast.{module}" for name, module in saerl_fast._HOME.items()}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'Scoress'; it has Config"):
        saerl_fast.Scoress  # noqa: B018
    with pytest.raises(ImportError):
        exec("from saerl_fast import nothing_like_this")


def imported(source: str) -> set[tuple[str, str]]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "", alias.name) for node in nodes for alias in node.names}


@pytest.mark.parametrize("source", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_imports_promised_names_only(source):
    import saerl_kernels

    for module, name in imported(source):
        if module.split(".")[0] == "saerl_fast":
            assert module == "saerl_fast" and name in saerl_fast.__all__
        if module == "saerl_kernels":
            assert name in saerl_kernels.__all__


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_promised_names(path):
    deep = {(module, name) for module, name in imported(path.read_text()) if module.startswith("saerl_fast.")}
    assert not {(module, name) for module, name in deep if name in saerl_fast.__all__}


def test_readme_functions_of_your_own_work(tmp_path, monkeypatch):
    """The block is a module that the settings beside it name."""
    from saerl_fast.plan.static import get_schedule
    from saerl_fast.rl.loss import get_loss

    (block,) = (block for block in BLOCKS if block.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)  # another test's
    assert get_schedule("mine:hard_to_easy").needs == ("difficulty",)
    assert get_loss("mine:rf").clip == (0.2, 0.28)
    get_loss.cache_clear()
    sys.modules.pop("mine")
