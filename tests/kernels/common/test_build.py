"""The C++ kernels: what is built is loaded, what is not is compiled by one process at a time, whatever becomes of it.

The compiler is a stub.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastllama_kernels.__main__ import main
from fastllama_kernels.common import build, compiling, folders, levels

LOAD = """
import os, pathlib
from fastllama_kernels.common import build
build.PATIENCE, build.BUILT = 0.2, pathlib.Path(os.environ["BUILT"])
print(build.load(), build.level())
"""
OWN = levels.runnable()[0]
COMPILED = f"None {OWN.name}"
CALLS = len(compiling.units(os.cpu_count() or 1)) + 2  # one links the stub of torch's library, one the kernels
# Notes each call; waits as long as there is a file `slow`, fails where there is one `broken`; links an empty library.
COMPILER = """#!/bin/sh
echo "$@" >> {folder}/calls
while [ -e {folder}/slow ]; do sleep 0.05; done
if [ -e {folder}/broken ]; then echo "kernels.cpp:7: error: no such thing" >&2; exit 1; fi
for target; do :; done
case "$*" in
  *-shared*) exec c++ -shared -x c++ /dev/null -o "$target" ;;
  *) : > "$target" ;;
esac
"""


def test_all_sources_compile_as_one_unit(tmp_path) -> None:
    """As they are on a machine with one core: names that are a file's own must not meet."""
    (files,) = compiling.units(1)
    unit = tmp_path / "unit.cpp"
    unit.write_text("".join(f'#include "{file.relative_to(compiling.PACKAGE)}"\n' for file in files))
    headers = [f"-I{compiling.PACKAGE / 'common'}", f"-I{compiling.PACKAGE}"]
    headers += [f"-isystem{Path(torch.__file__).parent / 'include'}"]
    compiling.run([*compiling.compiler(), *compiling.FLAGS, *OWN.flags, *headers, "-fsyntax-only", str(unit)])


class Loading:
    """A process that loads the kernels; what it says is in files."""

    def __init__(self, name: Path, changes: dict[str, str]) -> None:
        self._out, self._err = name.with_suffix(".out"), name.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            command, environment = [sys.executable, "-c", LOAD], os.environ | changes
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)

    @property
    def reason(self) -> str:
        """What load() has returned, once the process has ended."""
        self.process.wait(timeout=120)
        return self._out.read_text().strip() or self.said

    @property
    def said(self) -> str:
        """What it has logged so far."""
        return self._err.read_text()


Start = Callable[..., Loading]


@pytest.fixture
def compiler(tmp_path) -> Iterator[Path]:
    """The folder of a stub compiler."""
    script = tmp_path / "c++"
    script.write_text(COMPILER.format(folder=tmp_path))
    script.chmod(0o755)
    yield tmp_path
    (tmp_path / "slow").unlink(missing_ok=True)  # so that no stub waits for ever


@pytest.fixture
def start(compiler, tmp_path) -> Iterator[Start]:
    """Starts processes that load the kernels; they end with the test."""
    changes = {"CXX": str(compiler / "c++"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    changes |= {"BUILT": str(tmp_path / "built")}
    started: list[Loading] = []

    def one(**others: str) -> Loading:
        started.append(Loading(tmp_path / str(len(started)), changes | others))
        return started[-1]

    yield one
    for loading in started:
        loading.process.kill()
        loading.process.wait()


def calls(compiler: Path) -> list[str]:
    file = compiler / "calls"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def libraries(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("extensions/*/kernels.so"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_after_a_build_that_was_killed_the_next_one_builds(compiler, monkeypatch, tmp_path, number) -> None:
    monkeypatch.setenv("CXX", str(compiler / "c++"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    (compiler / "slow").touch()
    first = os.fork()
    if first == 0:
        try:
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)  # commands that were tested before may have set another
            build.load.__wrapped__()
        finally:
            os._exit(0)
    wait_until(lambda: bool(calls(compiler)))
    os.kill(first, number)
    assert os.waitpid(first, 0)[1] == number, "it was killed by that"
    assert not libraries(tmp_path)
    assert list(tmp_path.glob("extensions/*/build-*")), "it was killed in the middle"
    (compiler / "slow").unlink()
    assert build.load.__wrapped__() is None
    assert len(libraries(tmp_path)) == 1
    assert not list(tmp_path.glob("extensions/*/build-*")), "what was left is gone"


@pytest.mark.slow
def test_of_two_processes_one_builds_and_the_other_says_what_it_waits_for(compiler, start) -> None:
    (compiler / "slow").touch()
    both = [start(), start()]
    for words in ("compiling the C++ kernels, once for this machine", "waiting for another process, which compiles"):
        wait_until(lambda words=words: any(words in loading.said for loading in both))
    (compiler / "slow").unlink()
    assert [loading.reason for loading in both] == [COMPILED, COMPILED]
    assert len(calls(compiler)) == CALLS


@pytest.mark.slow
def test_a_failed_build_gives_the_compilers_reason_and_the_next_one_tries_again(compiler, start, tmp_path) -> None:
    (compiler / "broken").touch()
    failed = start()
    assert failed.reason == "the C++ kernels could not be built: kernels.cpp:7: error: no such thing None"
    assert "decoding runs on torch's own operators, which is slower" in failed.said
    assert not libraries(tmp_path)
    (compiler / "broken").unlink()
    assert start().reason == COMPILED


# ---- what is built -----------------------------------------------------------------------------------------------


@pytest.fixture
def built(compiler, tmp_path, monkeypatch) -> Path:
    """An empty folder for what is built with the package, by the stub compiler."""
    folder = tmp_path / "built"
    monkeypatch.setattr(build, "BUILT", folder)
    monkeypatch.setenv("CXX", str(compiler / "c++"))
    return folder


@pytest.mark.slow
def test_what_is_built_is_loaded_and_no_compiler_runs(built, compiler, start, tmp_path) -> None:
    assert main(["build"]) == 0
    assert len(calls(compiler)) == CALLS
    assert start(CXX="no-such-compiler").reason == COMPILED
    assert not libraries(tmp_path)
    assert main(["build"]) == 0
    assert len(calls(compiler)) == CALLS, "it was there"


@pytest.mark.slow
def test_what_was_built_of_other_sources_is_not_loaded_and_goes_with_the_next_build(built, start, tmp_path) -> None:
    assert main(["build"]) == 0
    (library,) = built.glob("*.so")
    stale = library.rename(built / f"{OWN.name}-0123456789abcdef.so")
    assert start().reason == COMPILED
    assert len(libraries(tmp_path)) == 1
    assert main(["build"]) == 0
    assert library.exists()
    assert not stale.exists()


@pytest.mark.slow
@pytest.mark.skipif(len(levels.runnable()) < 2, reason="there is no lower level")
def test_a_lower_level_that_is_built_runs_where_the_own_one_cannot_be_compiled(built, start, tmp_path) -> None:
    lower = levels.runnable()[1].name
    assert main(["build", "--levels", lower]) == 0
    assert start(CXX="no-such-compiler").reason == f"None {lower}"
    assert start().reason == COMPILED


@pytest.mark.slow
def test_a_built_library_that_cannot_be_loaded_is_compiled_again(built, start, tmp_path) -> None:
    assert main(["build"]) == 0
    (library,) = built.glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    assert start().reason == COMPILED
    assert len(libraries(tmp_path)) == 1
    assert "C++ kernels" in start(CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path / "other")).reason


def test_a_package_that_cannot_be_written_to_is_built_where_the_first_use_would(built, tmp_path, monkeypatch) -> None:
    built.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert list(build.install([OWN]).values()) == libraries(tmp_path)


def test_a_level_that_does_not_compile_is_said_and_the_others_are_built(built, compiler, capsys) -> None:
    (compiler / "broken").touch()
    assert main(["build"]) == 1
    assert "error: no such thing" in capsys.readouterr().out
    assert not list(built.glob("*.so"))


def test_an_unknown_level_is_wrong_usage(built, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--levels", "avx3"])
    assert "no instruction set is called avx3; there are" in capsys.readouterr().err


# ---- what is in the way ------------------------------------------------------------------------------------------


def test_without_a_compiler_that_is_the_reason(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    reason = build.load.__wrapped__()
    assert reason is not None
    assert "there is no C++ compiler 'no-such-compiler'" in reason
    assert reason in caplog.text


def test_where_nothing_can_be_written_that_is_the_reason(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    reason = build.load.__wrapped__()
    assert reason is not None
    assert "Not a directory" in reason


def test_every_source_is_in_one_unit() -> None:
    sources = sorted(file for file in compiling.sources() if file.suffix == ".cpp")
    for count in (1, 2, 16):
        units = compiling.units(count)
        assert len(units) == min(count, len(sources))
        assert sorted(itertools.chain(*units)) == sources
