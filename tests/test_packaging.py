"""The layout's promises: what may import what, what importing costs, and that nothing shadows `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "torch-ext" / "saerl_kernels"
# The storeys of saerl_fast, from the ground up: each may import itself and what is below it.
STOREYS = [
    {"errors"},
    {"hub", "plugins"},
    {"config", "fileio"},
    {"records", "models"},
    {"prompts"},
    {"session"},
    {"sae"},
    {"signals"},
    {"plan"},
    {"rl"},
    {"stages"},
    {"integrations"},
    {"cli"},
]
STOREY = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}


def imports(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, at module level) for every import in a file, relative ones resolved."""
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inner
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{module}.{alias.name}", id(node) not in inner


def package_of(path: Path, top: Path) -> str:
    return ".".join(path.relative_to(top.parent).parent.parts)


def test_kernels_folder_is_no_package():
    """`kernels` is the name of Hugging Face's library, which transformers imports."""
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "pyproject.toml").exists()
    assert (ROOT / "kernels" / "build.toml").exists()


def test_saerl_kernels_imports_only_torch_and_triton():
    allowed = {"torch", "triton", "saerl_kernels"} | set(sys.stdlib_module_names)
    for path in KERNELS.rglob("*.py"):
        package = package_of(path, KERNELS)
        in_numba = "_numba" in path.parts
        for name, top_level in imports(path, package):
            head = name.split(".")[0]
            if head == "triton" and "_triton" not in path.parts:
                pytest.fail(f"{path} imports triton outside _triton")
            if head in ("numba", "numpy") and in_numba:
                continue
            if head == "scipy" and not top_level:  # CSR.to_scipy, on request
                continue
            assert head in allowed, f"{path.name} imports {name}"
            lazy = {"_triton", "_numba"} & set(name.split("."))
            inside = {"_triton", "_numba"} & set(path.parts)
            assert not (lazy and top_level and not inside), f"{path.name} imports {name} when it is imported"
        source = path.read_text()
        assert "import saerl_kernels" not in source and "from saerl_kernels" not in source, "relative only"
        ast.parse(source, feature_version=(3, 9))


def test_import_direction():
    """Downwards only, between the folders and (no circle) between the files of each."""
    top = ROOT / "saerl_fast"
    rooms = {path.stem if path.is_file() else path.name for path in top.iterdir() if path.name[0] != "_"}
    assert rooms - {"py"} == set(STOREY), "a new room needs a storey"  # py.typed is none
    assert len(list(top.glob("[!_]*.py"))) <= 7
    arrows: dict[str, set[str]] = {}
    for path in top.rglob("*.py"):
        parts = path.relative_to(top).with_suffix("").parts
        for name, _ in imports(path, package_of(path, top)):
            head, *rest = name.split(".")
            assert head not in ("tests", "benchmarks", "examples"), f"{path} imports {name}"
            if head == "saerl_kernels":
                assert STOREY.get(parts[0], 9) > STOREY["prompts"], f"{path} imports {name}"
            if (
                head != "saerl_fast"
                or not rest
                or rest[0] not in STOREY
                or parts[0] in ("__init__", "__main__")
            ):
                continue
            down = STOREY[rest[0]] < STOREY[parts[0]]
            assert down or rest[0] == parts[0], f"{path} imports {name}, which is not below it"
            if rest[0] == parts[0]:
                arrows.setdefault(".".join(parts), set()).add(".".join(rest[:2]))
    while arrows:  # take away the files that import no other one, until none is left
        free = {file for file, to in arrows.items() if not (to - {file}) & arrows.keys()}
        assert free, f"these files import each other in a circle: {sorted(arrows)}"
        arrows = {file: to for file, to in arrows.items() if file not in free}


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light():
    out = run(
        "import sys, torch; had = set(sys.modules)\nimport saerl_kernels\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - had}\nprint(sorted(new))"
    )
    assert not {"triton", "numba", "scipy", "transformers"} & set(ast.literal_eval(out)), out


def test_works_without_triton_and_numba():
    """As on macOS: both missing, and the torch path serves."""
    out = run(
        "import sys; sys.modules['triton'] = sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('triton', 'numba') else find(name, *a)\n"
        "import torch, saerl_kernels as sk\n"
        "e = sk.pack_encoder(torch.eye(4))\n"
        "print(sk.encode_topk(torch.tensor([[1., 3., 2., 0.]]), e, 2).indices.tolist())\n"
        "try: sk.encode_topk(torch.ones(1, 4), e, 2, backend='numba')\n"
        "except ValueError as err: print(err)"
    )
    assert out.splitlines()[0] == "[[1, 2]]" and "not installed" in out


def test_transformers_imports_from_the_root():
    pytest.importorskip("transformers")
    run("from transformers.models.llama.modeling_llama import LlamaForCausalLM")


def test_local_hub_layout_loads():
    """The folder loads as a hub kernel does: under another name, by relative imports alone."""
    name = "some_other_name"
    spec = importlib.util.spec_from_file_location(
        name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        import torch

        encoder = module.pack_encoder(torch.eye(3))
        # Not numba: its cache on disk would hold this name, and the usual one would meet it there.
        assert module.encode_topk(torch.ones(1, 3), encoder, 1, backend="torch").values.item() == 1.0
        assert module.PackedEncoder.__module__ == f"{name}.pack"
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[key]


def test_loads_as_a_local_hub_kernel(tmp_path):
    """Through Hugging Face's loader, beside the installed package: op names must not collide."""
    if not hasattr(pytest.importorskip("kernels"), "get_local_kernel"):
        pytest.skip("kernels is not installed; what was found is the folder of that name")
    if shutil.which("make") is None:
        pytest.skip("no make")
    where = f"KERNEL={tmp_path}/build/torch-universal"
    done = subprocess.run(["make", "-s", "kernel", where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = run(
        "from pathlib import Path\n"
        "from kernels import get_local_kernel\n"
        "from kernels._rust import Build\n"
        "import torch, saerl_kernels\n"
        "Build.open(Path('kernels'))\n"  # raises for a build.toml that the kernel builder would refuse
        f"root = Path({str(tmp_path)!r})\n"
        "variant = root / 'build' / 'torch-universal'\n"
        "loaded = get_local_kernel(root)\n"
        "assert loaded is not saerl_kernels and str(variant) in loaded.__file__\n"
        "x, W = torch.randn(3, 8), torch.randn(8, 40)\n"
        "for each in (saerl_kernels, loaded):\n"
        "    encoder = each.pack_encoder(W)\n"
        "    encode = lambda x: each.encode_topk(x, encoder, 5, backend='torch').indices\n"
        "    compiled = torch.compile(encode, backend='eager', fullgraph=True)\n"
        "    assert torch.equal(compiled(x), each.reference.encode_topk(x, encoder, 5).indices)\n"
        "import json\n"
        "names = ['saerl_kernels', json.loads((variant / 'metadata.json').read_text())['id']]\n"
        "print([hasattr(getattr(torch.ops, name), 'encode_topk') for name in dict.fromkeys(names)])\n"
    )
    assert out.splitlines()[-1] == "[True, True]"


def test_one_version():
    """The kernels may be copied without the distribution, so they carry a number of their own."""
    import saerl_fast
    import saerl_kernels

    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared.group(1) == saerl_fast.__version__ == saerl_kernels.__version__


def test_the_wheel_holds_what_is_no_python(tmp_path):
    """py.typed, or type checkers ignore the annotations, and the data files of both packages."""
    pytest.importorskip("setuptools", minversion="77")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "saerl_fast", tmp_path / "saerl_fast", ignore=skip)
    kernels = tmp_path / "kernels" / "torch-ext" / "saerl_kernels"
    shutil.copytree(KERNELS, kernels, ignore=skip)
    (kernels / "_numba" / "__pycache__").mkdir()
    for kind in ("nbi", "nbc", "pyc"):  # what numba and Python leave behind where the kernels have run
        (kernels / "_numba" / "__pycache__" / f"select.product.{kind}").touch()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=skip)
    code = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    (tmp_path / "wheels").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in held if "__pycache__" in name]
    for top, package in ((ROOT, ROOT / "saerl_fast"), (KERNELS.parent, KERNELS)):
        files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert package / "py.typed" in files
        assert {path.relative_to(top).as_posix() for path in files} <= held
    demo = [path for path in (ROOT / "examples" / "demo").rglob("*") if path.is_file()]
    demo.append(ROOT / "examples" / "demo.yaml")
    assert {f"saerl_fast/examples/{path.relative_to(ROOT / 'examples').as_posix()}" for path in demo} <= held
    assert wheel.stat().st_size < 5e6


def test_documents_name_files_that_exist():
    """Every `folder/file.py` in backticks, seen from the root, saerl_fast or the kernels."""
    tops = [ROOT, ROOT / "saerl_fast", ROOT / "kernels/torch-ext", KERNELS]
    for page in ("README.md", "CONTRIBUTING.md", "kernels/README.md"):
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for name in re.findall(r"`([\w/]+\.py)`", text):
            assert any((top / name).is_file() for top in tops), f"{page} names {name}"
    files = (ROOT / "README.md").read_text().partition("## Files")[2].split("```")[1]
    for line in filter(None, files.splitlines()):
        assert (ROOT / line.split()[0].rstrip(",")).exists(), f"README.md names {line.split()[0]}"
