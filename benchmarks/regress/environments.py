"""Python environments for revisions: one for each set of requirements, made once and kept.

A revision's requirements are the dependencies its pyproject.toml lists and the versions its requirements-dev.lock pins.
Revisions with equal ones share an environment. Nothing of fastllama itself is installed in it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..harness import Unavailable

LOCK = "requirements-dev.lock"
COMPLETE = ".complete"  # in an environment whose installation has come to its end
KEY_LENGTH = 12


@dataclass(frozen=True)
class Requirements:
    """What a revision needs.

    Attributes:
        dependencies: as in pyproject.toml.
        constraints: text of the lock file; empty where there is none.
    """

    dependencies: tuple[str, ...]
    constraints: str

    @classmethod
    def of(cls, tree: Path) -> Requirements:
        """Those of the revision whose files lie in ``tree``.

        Raises:
            Unavailable: it has no pyproject.toml that can be read.
        """
        try:
            project = _toml(tree / "pyproject.toml")["project"]
        except (FileNotFoundError, KeyError):
            raise Unavailable("it has no pyproject.toml with a [project], so its requirements are unknown") from None
        except ValueError as error:
            raise Unavailable(f"its pyproject.toml cannot be read: {error}") from None
        lock = tree / LOCK
        return cls(tuple(project.get("dependencies", ())), lock.read_text(encoding="utf-8") if lock.exists() else "")

    @property
    def key(self) -> str:
        """Names an environment: these requirements, this Python, and where pip was told to look for packages."""
        pip = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_"))
        parts = [sys.version, *sorted(self.dependencies), self.constraints, *pip]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:KEY_LENGTH]


def interpreter(requirements: Requirements, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of the environment with these requirements, which is made if it is not there yet.

    Args:
        requirements: what to install.
        folder: holds the environments.
        say: told what is going on.

    Raises:
        Unavailable: it could not be made.
    """
    home = folder / requirements.key
    python = home / "bin" / "python"
    if (home / COMPLETE).exists():
        os.utime(home / COMPLETE)
        return python
    say(f"making an environment in {home}, once: this takes minutes")
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)], "cannot make a virtual environment")
    if requirements.dependencies:
        constraints = home / LOCK
        constraints.write_text(requirements.constraints, encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        _run([*install, "-c", str(constraints), *requirements.dependencies], "cannot install its requirements")
    (home / COMPLETE).touch()
    return python


def prune(folders: Iterable[Path], keep: int) -> None:
    """Delete all but the ``keep`` folders that were used last."""
    for folder in sorted(folders, key=_last_used, reverse=True)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    marker = folder / COMPLETE
    return (marker if marker.exists() else folder).stat().st_mtime


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise Unavailable(f"{failure}: {lines[-1].strip()}; --python names an interpreter to use instead")


def _toml(path: Path) -> dict:
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise Unavailable("Python 3.10 needs the package tomli to read pyproject.toml; or name a --python") from None
    return toml.loads(path.read_text(encoding="utf-8"))
