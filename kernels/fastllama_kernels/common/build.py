"""Finds and loads the C++ kernels: built with the package, or compiled on first use and kept among torch's extensions.

What is compiled is compiled in a temporary folder, and the finished library is moved to its place at once: a process
that finds it there finds all of it. Processes that come meanwhile wait for a lock that the system takes back when its
holder ends, however that ends.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastllama_kernels.common import compiling, folders, levels
from fastllama_kernels.common.levels import Level

logger = logging.getLogger(__name__)

BUILT = compiling.PACKAGE / "built"
LIBRARY, LOCK, UNFINISHED = "kernels.so", "lock", "build-"
PATIENCE = 5.0  # seconds of compiling or waiting before that is said

_loaded: Level | None = None


@functools.cache
def load() -> str | None:
    """Load the CPU kernels, compiling them first if need be.

    Returns:
        None when the kernels are there; otherwise why they are not (no compiler, failed build). The reason is also
        logged, once.

    Raises:
        ValueError: ``FASTLLAMA_CPU_LEVEL`` names no instruction set that this processor has.
    """
    global _loaded
    usable = levels.usable()
    try:
        _loaded = _load(usable)
    except (OSError, RuntimeError, ImportError) as error:
        reason = f"the C++ kernels could not be built: {str(error).strip().splitlines()[0]}"
        logger.warning("%s; decoding runs on torch's own operators, which is slower", reason)
        return reason
    return None


def level() -> str | None:
    """The instruction set of the kernels that are loaded, loading them first if need be; None where there are none."""
    load()
    return _loaded and _loaded.name


def folder(level: Level) -> Path:
    """Where the library that is compiled on first use is kept."""
    return folders.extensions() / f"fastllama_cpu_{level.name}_{compiling.fingerprint(level)}"


def install(wanted: Sequence[Level]) -> dict[Level, Path | str]:
    """Compile the libraries of some levels into the package; where it cannot be written to, where load() keeps them.

    What the package has of other sources goes.

    Returns:
        The library of each level, or why there is none.

    Raises:
        OSError: nothing can be written to at all.
        RuntimeError: there is no compiler.
    """
    try:
        with _only_one(BUILT):
            targets = {level: BUILT / compiling.file_name(level) for level in wanted}
            current = {compiling.file_name(level) for level in (*levels.known(), *wanted)}
            for left in BUILT.glob("*.so"):
                if left.name not in current:
                    left.unlink()
            failed = _build({level: file for level, file in targets.items() if not file.exists()})
    except OSError:
        targets, failed = {level: _compiled(level) for level in wanted}, {}
    return targets | failed


def _load(usable: Sequence[Level]) -> Level:
    """Load the best level's library, built or else compiled, or a lower one that is built where neither can be.

    Returns:
        The level.

    Raises:
        ImportError, OSError, RuntimeError: none can be loaded; why the best one cannot be compiled.
    """
    best = usable[0]
    with suppress(OSError):
        return _loaded_from(best, _built(best))
    try:
        return _loaded_from(best, _compiled(best))
    except (ImportError, OSError, RuntimeError) as error:
        for lower in usable[1:]:
            with suppress(OSError):
                _loaded_from(lower, _built(lower))
                logger.info("there are no C++ kernels for %s, those for %s run: %s", best.name, lower.name, error)
                return lower
        raise


def _loaded_from(level: Level, library: Path) -> Level:
    torch.ops.load_library(str(library))
    return level


def _built(level: Level) -> Path:
    """The library that was built with the package; FileNotFoundError where there is none of these sources."""
    return (BUILT / compiling.file_name(level)).resolve(strict=True)


def _compiled(level: Level) -> Path:
    """The library that was or now is compiled for this processor."""
    library = folder(level) / LIBRARY
    if not library.exists():
        with _only_one(library.parent):
            if not library.exists() and (failed := _build({level: library})):
                raise RuntimeError(failed[level])
    return library


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


def _build(libraries: Mapping[Level, Path]) -> dict[Level, str]:
    """Compile libraries of one folder, and move each to its place; why those failed that did."""
    if not libraries:
        return {}
    compiling.compiler()
    include = Path(torch.__file__).parent / "include"
    said = threading.Timer(PATIENCE, logger.warning, ("compiling the C++ kernels, once for this machine",))
    said.daemon = True
    said.start()
    try:
        parent = next(iter(libraries.values())).parent
        with tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED) as unfinished:
            made = {level: Path(unfinished, compiling.file_name(level)) for level in libraries}
            failed = compiling.compile_all(made, include, Path(unfinished))
            for level, library in libraries.items():
                if level not in failed:
                    os.replace(made[level], library)
    finally:
        said.cancel()
    return failed
