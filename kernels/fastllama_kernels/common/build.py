"""Builds and loads the C++ kernels on first use; the library is kept in torch's folder of compiled extensions.

Sources are compiled in a temporary folder, as many at once as there are cores, and the finished library is moved to its
place at once: a process that finds it there finds all of it. Processes that come meanwhile wait for a lock that the
system takes back when its holder ends, however that ends.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from fastllama_kernels.common import folders

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020b000000000000")
LANGUAGE = ("-std=c++20", "-fPIC")
LIBRARY, LOCK, UNFINISHED = "kernels.so", "lock", "build-"
PATIENCE = 5.0  # seconds of compiling or waiting before that is said


@functools.cache
def load() -> str | None:
    """Load the CPU kernels, compiling them first if need be.

    Returns:
        None when the kernels are there; otherwise why they are not (no compiler, failed build). The reason is also
        logged, once.
    """
    try:
        library = folder() / LIBRARY
        if not library.exists():
            with _only_one(library.parent):
                if not library.exists():
                    _build(library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, ImportError) as error:
        reason = f"the C++ kernels could not be built: {str(error).strip().splitlines()[0]}"
        logger.warning("%s; decoding runs on torch's own operators, which is slower", reason)
        return reason
    return None


def folder() -> Path:
    """Where the library of these sources, for this processor and this torch, is kept."""
    return folders.extensions() / f"fastllama_cpu_{_fingerprint()}"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let no other process build in this folder meanwhile; waits for one that does."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        logger.warning("waiting for another process, which compiles the C++ kernels (it holds %s)", lock.lock_file)
        lock.acquire()
    except NotImplementedError:
        logger.debug("no locks on the file system of %s: every process compiles for itself", folder)
    try:
        if lock.is_locked:
            for left in folder.glob(f"{UNFINISHED}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _build(library: Path) -> None:
    """Compile all sources, several at once, and move the library to its place."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no C++ compiler {compiler[0]!r}; install g++ or clang++, or name one with CXX")
    said = threading.Timer(PATIENCE, logger.warning, ("compiling the C++ kernels, once for this machine and torch",))
    said.daemon = True
    said.start()
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=UNFINISHED) as unfinished:
            _compile(compiler, Path(unfinished, LIBRARY))
            os.replace(Path(unfinished, LIBRARY), library)
    finally:
        said.cancel()


def _compile(compiler: Sequence[str], library: Path) -> None:
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    includes += [f"-I{PACKAGE / 'common'}", f"-I{PACKAGE}"]

    def compile_one(unit: tuple[int, list[Path]]) -> str:
        source, target = (library.with_name(f"unit{unit[0]}.{suffix}") for suffix in ("cpp", "o"))
        source.write_text("".join(f'#include "{file.relative_to(PACKAGE)}"\n' for file in unit[1]))
        _run([*compiler, *FLAGS, *LANGUAGE, *includes, "-c", str(source), "-o", str(target)])
        return str(target)

    units = _units(os.cpu_count() or 1)
    with ThreadPoolExecutor(len(units)) as pool:
        objects = list(pool.map(compile_one, enumerate(units)))
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    _run([*compiler, "-shared", *objects, *paths, "-lc10", "-ltorch_cpu", "-ltorch", "-o", str(library)])


def _units(count: int) -> list[list[Path]]:
    """The sources in at most ``count`` units of about one size: torch's headers take half of the time of each."""
    units: list[list[Path]] = [[] for _ in range(count)]
    sources = [file for file in _files() if file.suffix == ".cpp"]
    for file in sorted(sources, key=lambda file: file.stat().st_size, reverse=True):
        min(units, key=lambda unit: sum(other.stat().st_size for other in unit)).append(file)
    return [unit for unit in units if unit]


def _run(command: Sequence[str]) -> None:
    """Run a compiler; RuntimeError with its first error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[-1]))


def _files() -> list[Path]:
    return sorted(file for suffix in ("cpp", "h") for file in PACKAGE.glob(f"*/*.{suffix}"))


def _fingerprint() -> str:
    """Names a build after everything that decides its machine code, the processor included."""
    parts = [torch.__version__, platform.machine(), *FLAGS, *LANGUAGE]
    parts += [torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in _files():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The instruction sets of the processor, for -march=native builds in a home directory that machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
