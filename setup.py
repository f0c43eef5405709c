"""Beside pyproject.toml: the demo travels in the wheel, copied from examples/ when it is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithDemo(build_py):
    """Adds saerl_fast/examples/ (demo.yaml and demo/), which `saerl demo` runs; a clone has them beside."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "saerl_fast" / "examples"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("examples/demo", target / "demo")
        shutil.copy("examples/demo.yaml", target)


setup(cmdclass={"build_py": WithDemo})
