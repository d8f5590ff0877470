"""Compiles the C++ kernels: one library for each level of instructions, for any Python and any torch from 2.11 on.

The sources use torch's stable ABI, of which torch keeps what it had at ``TORCH_TARGET_VERSION``. So a library is named
after its sources and flags, not after a torch. All that a build needs is a compiler and torch's headers: what it is
linked with is a stub that has the name of torch's library, which is in the process when the kernels are loaded.
Imports the standard library alone, for the build of the package does not have torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fastllama_kernels.common import levels
from fastllama_kernels.common.levels import Level

PACKAGE = Path(__file__).parent.parent
FLAGS = ("-O3", "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-std=c++20", "-fPIC")
TORCH = "torch_cpu"


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"there is no C++ compiler {command[0]!r}; install g++ or clang++, or name one with CXX")
    return command


def compile_all(targets: Mapping[Level, Path], include: Path, workspace: Path) -> dict[Level, str]:
    """Compile libraries, as many files at once as there are cores.

    Args:
        targets: the file of each level's library.
        include: torch's folder of headers.
        workspace: an empty folder for what is left over.

    Returns:
        Why those failed that did, by level: the compiler's first error.
    """
    command = compiler()
    failed = {}
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        objects = {level: _submit_units(pool, command, level, include, workspace) for level in targets}
        for level, target in targets.items():
            try:
                _link(command, [each.result() for each in objects[level]], workspace, target)
            except RuntimeError as error:
                failed[level] = str(error)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: no further compiler is started
    return failed


def file_name(level: Level) -> str:
    """What a level's library of these sources is called."""
    return f"{level.name}-{fingerprint(level)}.so"


@functools.cache
def fingerprint(level: Level) -> str:
    """Names a library after everything that decides its machine code."""
    parts = [platform.machine(), *FLAGS, *level.flags, "" if level.needs else levels.features() or platform.processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def sources() -> list[Path]:
    """The C++ files and their headers."""
    return sorted(file for suffix in ("cpp", "h") for file in PACKAGE.glob(f"*/*.{suffix}"))


def units(count: int) -> list[list[Path]]:
    """The sources in at most ``count`` units of about one size: torch's headers take half of the time of each."""
    found: list[list[Path]] = [[] for _ in range(count)]
    files = [file for file in sources() if file.suffix == ".cpp"]
    for file in sorted(files, key=lambda file: file.stat().st_size, reverse=True):
        min(found, key=lambda unit: sum(other.stat().st_size for other in unit)).append(file)
    return [unit for unit in found if unit]


def _submit_units(
    pool: ThreadPoolExecutor, command: Sequence[str], level: Level, include: Path, workspace: Path
) -> list[Future[str]]:
    """The object files of a level, as they come."""
    flags = [*FLAGS, *level.flags, f"-isystem{include}", f"-I{PACKAGE / 'common'}", f"-I{PACKAGE}"]
    flags += [f"-ffile-prefix-map={PACKAGE}={PACKAGE.name}"]  # errors name the file, not where it was compiled

    def compile_one(number: int, files: Sequence[Path]) -> str:
        source, target = (workspace / f"{level.name}{number}.{suffix}" for suffix in ("cpp", "o"))
        source.write_text("".join(f'#include "{file.relative_to(PACKAGE)}"\n' for file in files))
        run([*command, *flags, "-c", str(source), "-o", str(target)])
        return str(target)

    return [pool.submit(compile_one, *each) for each in enumerate(units(os.cpu_count() or 1))]


def _link(command: Sequence[str], objects: Sequence[str], workspace: Path, library: Path) -> None:
    """Link a library that needs torch's; at the place of that one there is a stub."""
    stub = workspace / f"lib{TORCH}.so"
    if not stub.exists():
        run([*command, "-shared", f"-Wl,-soname,{stub.name}", "-x", "c++", os.devnull, "-o", str(stub)])
    needed = [f"-L{workspace}", "-Wl,--no-as-needed", f"-l{TORCH}"]
    run([*command, "-shared", *objects, *needed, "-o", str(library)])


def run(command: Sequence[str]) -> None:
    """Run a compiler; RuntimeError with its first error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[-1]))
