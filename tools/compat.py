"""Runs tests on other versions of what fastllama stands on.

    python tools/compat.py VERSION [VERSION ...] [-- ARGUMENTS OF PYTEST]

A VERSION is one of transformers (``4.57.6``), or requirements with commas between them, of which the first may name a
Python that is on the PATH (``python3.12,torch==2.11.0``).

On a version of transformers the tests that compare with it run, in an environment of its own in ``.venvs``, on top of
the one that runs this: it holds transformers and what that needs in another version than is installed; torch and the
rest come from below. On another torch or Python the core of the suite runs, in an environment that has everything of
its own, takes gigabytes and is removed afterwards. ``make test-compat`` and ``make test-versions`` use it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version as installed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not slow and not real")
AGAINST_TRANSFORMERS = ("tests/integrations", "tests/generation", "tests/model", "tests/kernels/sampling")
CORE = (
    "tests/config", "tests/engine", "tests/generation", "tests/kernels", "tests/loading", "tests/model",
    "tests/quantization", "tests/tokenizer", "tests/test_ops.py", "tests/test_life.py", "tests/test_imports.py",
)  # fmt: skip
WITH_IT = ("peft", "accelerate")  # tests use them with transformers; resolved again, since its versions bound theirs
KEPT = ("torch", "numpy")  # an environment on top of another never gets its own


class Wanted(NamedTuple):
    """What is to be there.

    Attributes:
        python: the command of another Python; None for the one that runs this.
        requirements: as pip takes them.
    """

    python: str | None
    requirements: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Wanted:
        """Read a VERSION."""
        parts = text.split(",")
        python = parts.pop(0) if parts[0].startswith("python") else None
        return cls(python, tuple(part if "=" in part else f"transformers=={part}" for part in parts))

    @property
    def is_whole(self) -> bool:
        """Whether everything has to be installed again."""
        return self.python is not None or any(part.startswith("torch") for part in self.requirements)

    @property
    def folder(self) -> Path:
        """Where its environment is."""
        return ROOT / ".venvs" / "-".join((self.python or "on-top", *self.requirements)).replace("==", "-")


def environment(wanted: Wanted) -> Path:
    """Return the Python of an environment that has what is wanted, made where there is none yet.

    Raises:
        CalledProcessError: the package index does not have it, or does not answer.
        FileNotFoundError: there is no such Python.
    """
    folder = wanted.folder
    python, done = folder / "bin" / "python", folder / "installed"
    if wanted.is_whole:
        subprocess.run([wanted.python or sys.executable, "-m", "venv", "--clear", folder], check=True)
        _install(python, "-e", f"{ROOT}[test]", *wanted.requirements)
        return python
    below = Path(sysconfig.get_path("purelib"))
    if done.exists() and done.stat().st_mtime > below.stat().st_mtime:  # else packages have come or gone below
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={installed(name)}\n" for name in KEPT))
    _install(python, "-c", str(constraints), *wanted.requirements, *WITH_IT)
    done.touch()
    return python


def _install(python: Path, *arguments: str) -> None:
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, *arguments], check=True)


def main(arguments: list[str]) -> int:
    """Run the tests on each version; the exit status is 1 if they fail on any."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    versions, options = arguments[:cut], arguments[cut + 1 :]
    results = {}
    for version in versions:
        print(f"---- {version}", flush=True)
        wanted = Wanted.of(version)
        try:
            python = environment(wanted)
            tests = CORE if wanted.is_whole else AGAINST_TRANSFORMERS
            done = subprocess.run([python, *PYTEST, *tests, *options], cwd=ROOT, check=False)
            results[version] = "failed" if done.returncode else "passed"
        except (subprocess.CalledProcessError, FileNotFoundError) as error:  # pip has said why
            results[version] = f"could not be installed: {error}"
        if wanted.is_whole:
            shutil.rmtree(wanted.folder, ignore_errors=True)
    for version, result in results.items():
        print(f"{version}: {result}")
    return int(set(results.values()) != {"passed"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
