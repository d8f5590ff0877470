"""What pyproject.toml cannot say: a wheel holds the C++ kernels, compiled for every instruction set of its platform.

The build needs a C++ compiler and no torch: the headers of torch's stable ABI lie in third_party/. Without a compiler
the wheel is one of Python alone, and the kernels are compiled where they are first used. ``FASTLLAMA_BUILD_LEVELS``
chooses the instruction sets: all (the default), own, none, or names with commas.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
HEADERS = ROOT / "third_party" / "torch-2.11" / "include"
sys.path.insert(0, str(ROOT / "kernels"))

from fastllama_kernels.common import compiling, levels  # noqa: E402


def wanted() -> list[levels.Level]:
    """The instruction sets to build for; none without a compiler."""
    chosen = levels.named(os.environ.get("FASTLLAMA_BUILD_LEVELS", "all"))
    try:
        compiling.compiler()
    except RuntimeError as error:
        print(f"the C++ kernels are compiled when they are first used: {error}", file=sys.stderr)
        return []
    return chosen


class BuildWithKernels(build_py):
    """Python files, then the kernels' libraries: those that are built in the checkout already, or new ones."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # its libraries come from python -m fastllama_kernels build
            return
        folder = Path(self.build_lib, "fastllama_kernels", "built")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        targets = {level: folder / compiling.file_name(level) for level in wanted()}
        for level, target in [*targets.items()]:
            here = compiling.PACKAGE / "built" / target.name
            if here.exists():
                shutil.copy(here, targets.pop(level))
        with tempfile.TemporaryDirectory() as workspace:
            failed = compiling.compile_all(targets, HEADERS, Path(workspace)) if targets else {}
        for level, reason in failed.items():
            print(f"no C++ kernels for {level.name}: {reason}", file=sys.stderr)


class WithKernels(Distribution):
    """Belongs to a platform if there are libraries in it."""

    def has_ext_modules(self) -> bool:
        return bool(wanted())


class WheelForAnyPython(bdist_wheel):
    """The libraries use nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return ("py3", "none", platform)


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForAnyPython})
