"""Builds and loads the C++ kernels on first use; the compiled library is cached by torch."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020b000000000000")


@functools.cache
def load() -> str | None:
    """Load the CPU kernels, compiling them first if need be.

    Returns:
        None when the kernels are there; otherwise why they are not (no compiler, no ninja, failed build). The reason is
        also logged, once.
    """
    from torch.utils import cpp_extension

    files = sorted(file for suffix in ("cpp", "h") for file in PACKAGE.glob(f"*/*.{suffix}"))
    name = f"fastllama_cpu_{_fingerprint(files)}"
    logger.info("loading %s; a build that hangs here may wait for a stale lock in torch's extensions folder", name)
    try:
        with _scripts_on_path():
            cpp_extension.load(
                name=name,
                sources=[
                    str(file) for file in _by_other_names(files, Path(cpp_extension._get_build_directory(name, False)))
                ],
                extra_cflags=list(FLAGS),
                extra_include_paths=[str(PACKAGE / "common")],
                is_python_module=False,
            )
    except (OSError, RuntimeError, ImportError) as error:
        reason = f"the C++ kernels could not be built: {str(error).strip().splitlines()[0]}"
        logger.warning("%s; decoding runs on torch's own operators, which is slower", reason)
        return reason
    return None


def _by_other_names(files: list[Path], folder: Path) -> Iterator[Path]:
    """The C++ sources, each included by a file that is named after its folder: torch tells objects apart by names."""
    for file in files:
        if file.suffix == ".cpp":
            named = folder / f"{file.parent.name}.cpp"
            named.write_text(f'#include "{file}"\n')
            yield named


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Lets torch find the ninja of this environment also where the environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fingerprint(files: list[Path]) -> str:
    """Names a build after everything that decides its machine code, the processor included."""
    parts = [torch.__version__, platform.machine(), *FLAGS, torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The instruction sets of the processor, for -march=native builds in a home directory that machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
