"""``make`` on a bare machine: it says what it does and what is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (
    "help",
    "demo",
    "chat",
    "test",
    "test-slow",
    "test-real",
    "test-compat",
    "test-versions",
    "lint",
    "format",
    "docs",
    "bench",
    "clean",
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout in which nothing was installed yet."""
    for name in ("Makefile", "pyproject.toml", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make there."""
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


def fake_python(folder: Path, fails_on: str) -> str:
    """A python that fails whenever its program text holds these words."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ncase "$2" in *"{fails_on}"*) exit 1;; esac\necho Python 3.9.1\n')
    script.chmod(0o755)
    return f"PYTHON={script}"


def test_make_alone_lists_the_targets(folder: Path) -> None:
    listed = make(folder).stdout
    assert all(f"  {target} " in listed for target in TARGETS)


def test_a_missing_python_is_named(folder: Path) -> None:
    done = make(folder, "test", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "'no-such-python' not found" in done.stderr


@pytest.mark.parametrize(
    ("fails_on", "message"),
    [
        ("version_info", "Python 3.9.1 is too old"),
        ("ensurepip", "python3-venv"),
        ("Python.h", "python3-dev"),
    ],
)
def test_what_python_lacks_is_named_and_nothing_is_installed(folder: Path, fails_on: str, message: str) -> None:
    done = make(folder, "demo", fake_python(folder, fails_on))
    assert done.returncode != 0
    assert message in done.stderr
    assert not (folder / ".venv").exists()
