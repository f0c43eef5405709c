"""Makes the pages of `mkdocs build`: the repository's own Markdown files, and an API page of every folder.

A file of the repository that a page links to comes along, so that links work in the site as they do in the
repository; a linked folder becomes a link to its README, or plain text where there is none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "kernels/README.md", "benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PACKAGES = {"saerl_fast": ROOT / "saerl_fast", "saerl_kernels": ROOT / "kernels/torch-ext/saerl_kernels"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    api = [{name: f"api/{name}.md"} for name in sorted(_modules())]
    home, kernels, measured, contributing, changes = PAGES
    config.nav = [
        {"Home": home},
        {"Kernels": kernels},
        {"Benchmarks": measured},
        {"API": api},
        {"Contributing": contributing},
        {"Changes": changes},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    todo, done = list(PAGES), set[str]()
    while todo:
        uri = todo.pop()
        if uri in done:
            continue
        done.add(uri)
        if not uri.endswith(".md"):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
            continue
        text, linked = _page(uri)
        files.append(File.generated(config, uri, content=text))
        todo += linked
    for name, modules in _modules().items():
        text = "".join(f"::: {module}\n\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n{text}"))
    return files


def _page(uri: str) -> tuple[str, list[str]]:
    """A page's text with its links to folders resolved, and the files of the repository that it links to."""
    linked: list[str] = []

    def mend(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (ROOT / uri).parent / target
        if path.is_dir():
            if not (path / "README.md").is_file():
                return label
            target, path = f"{target.rstrip('/')}/README.md", path / "README.md"
        if path.is_file():
            linked.append(path.resolve().relative_to(ROOT).as_posix())
        return f"{image}[{label}]({target}{anchor or ''})"

    return LINK.sub(mend, (ROOT / uri).read_text(encoding="utf-8")), linked


def _modules() -> dict[str, list[str]]:
    """The public modules of every folder, by the folder's dotted name."""
    found: dict[str, list[str]] = {}
    for package, top in PACKAGES.items():
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if any(part.startswith("_") and part != "__init__" for part in parts):
                continue
            folder = ".".join((package, *parts[:-1]))
            if path.name != "__init__.py":
                found.setdefault(folder, []).append(f"{package}.{'.'.join(parts)}")
            elif path.read_text(encoding="utf-8").strip():
                found.setdefault(folder, []).insert(0, folder)
    return found
