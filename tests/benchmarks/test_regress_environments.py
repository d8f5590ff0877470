"""Environments for revisions: shared where requirements are equal, made once, kept within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastllama_benchmarks.harness import Unavailable
from fastllama_benchmarks.regress import environments
from fastllama_benchmarks.regress.environments import COMPLETE, Requirements, interpreter, prune

PROJECT = '[project]\nname = "fastllama"\ndependencies = ["torch>=2.11", "numpy>=1.26"]\n'
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def tree(folder: Path, project: str | None = PROJECT, lock: str | None = "torch==2.13.0\n") -> Path:
    """A revision's folder with these two files."""
    folder.mkdir(parents=True)
    for name, text in (("pyproject.toml", project), ("requirements-dev.lock", lock)):
        if text is not None:
            (folder / name).write_text(text)
    return folder


def wheel(folder: Path, name: str, version: str) -> Path:
    """A package that can be installed without a network."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", METADATA.format(name=name, version=version))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run."""
    ran: list[list[str]] = []

    def run(command: list[str], failure: str) -> None:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(environments, "_run", run)
    return ran


def say(message: str) -> None:
    pass


def test_requirements_are_the_dependencies_and_the_lock(tmp_path: Path) -> None:
    found = Requirements.of(tree(tmp_path / "a"))
    assert found == Requirements(("torch>=2.11", "numpy>=1.26"), "torch==2.13.0\n")


def test_a_revision_without_a_lock_has_no_constraints(tmp_path: Path) -> None:
    assert Requirements.of(tree(tmp_path / "a", lock=None)).constraints == ""


@pytest.mark.parametrize("project", [None, "[tool.ruff]\n", "not toml"])
def test_a_revision_without_a_readable_project_is_one_line(tmp_path: Path, project: str | None) -> None:
    with pytest.raises(Unavailable, match=r"^it(s| has no) pyproject\.toml"):
        Requirements.of(tree(tmp_path / "a", project=project))


def test_equal_requirements_share_an_environment(tmp_path: Path) -> None:
    unrelated = PROJECT.replace("dependencies", 'version = "2"\ndependencies') + "[tool.ruff]\nline-length = 80\n"
    one, other = tree(tmp_path / "a"), tree(tmp_path / "b", project=unrelated)
    assert Requirements.of(one).key == Requirements.of(other).key


def test_other_dependencies_other_pins_and_other_indexes_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Requirements.of(tree(tmp_path / "a")).key,
        Requirements.of(tree(tmp_path / "b", project=PROJECT.replace("2.11", "2.12"))).key,
        Requirements.of(tree(tmp_path / "c", lock="torch==2.12.0\n")).key,
    ]
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    found.append(Requirements.of(tmp_path / "a").key)
    assert len(set(found)) == 4


def test_an_environment_is_made_once(tmp_path: Path, commands: list[list[str]]) -> None:
    needed = Requirements(("torch>=2.11",), "torch==2.13.0\n")
    python = interpreter(needed, tmp_path, say)
    assert python == tmp_path / needed.key / "bin" / "python"
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert commands[1][-3:] == ["-c", str(tmp_path / needed.key / "requirements-dev.lock"), "torch>=2.11"]
    assert interpreter(needed, tmp_path, say) == python
    assert len(commands) == 2


def test_an_environment_that_was_left_half_made_is_made_anew(tmp_path: Path, commands: list[list[str]]) -> None:
    needed = Requirements(("torch>=2.11",), "")
    interpreter(needed, tmp_path, say)
    (tmp_path / needed.key / COMPLETE).unlink()
    interpreter(needed, tmp_path, say)
    assert len(commands) == 4


def test_what_pip_says_last_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "a lot\nERROR: No matching distribution found for torch\n")

    monkeypatch.setattr(environments.subprocess, "run", fail)
    with pytest.raises(Unavailable, match="No matching distribution found for torch; --python names an interpreter"):
        environments._run(["pip"], "cannot install its requirements")


def test_a_real_environment_has_the_pinned_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for version in ("1.0", "2.0"):
        wheel(shelf, "dependency", version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    said: list[str] = []
    python = interpreter(Requirements(("dependency",), "dependency==1.0\n"), tmp_path / "made", said.append)
    shown = subprocess.run([python, "-c", "import dependency, sys; print(dependency.version, sys.prefix)"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert shown.stdout.split() == ["1.0", str(python.parents[1])]
    assert python.is_relative_to(tmp_path / "made")
    assert said == [f"making an environment in {python.parents[1]}, once: this takes minutes"]


def test_only_the_folders_used_last_are_kept(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "newer", "older", "oldest"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    (tmp_path / "oldest" / COMPLETE).touch()  # its mark tells when an environment was used
    prune(tmp_path.iterdir(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newest", "oldest"]


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="tomllib is there")
def test_python_3_10_without_tomli_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(Unavailable, match="needs the package tomli"):
        Requirements.of(tree(tmp_path / "a"))
