"""Folders for compiled code: those that are asked for, or else, where they cannot be written to, a private one."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

INDUCTOR, EXTENSIONS = "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"


def use_writable_inductor_cache() -> None:
    """Let torch.compile use a folder that can be written to; torch's own import fails on one that cannot.

    To be called before anything imports ``torch._dynamo``.
    """
    named = os.environ.get(INDUCTOR)
    if named:
        os.environ[INDUCTOR] = str(writable(named, INDUCTOR))


def extensions() -> Path:
    """Where torch keeps compiled extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return writable(os.environ.get(EXTENSIONS) or os.path.join(cache, "torch_extensions"), EXTENSIONS)


@functools.cache
def writable(wanted: str, variable: str) -> Path:
    """The folder, made if need be, or a private one among the temporary files, with a warning.

    Raises:
        OSError: nothing can be written to at all.
    """
    try:
        folder = Path(wanted).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        private = Path(tempfile.gettempdir(), f"fastllama-{os.getuid()}", variable.lower())
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
        if private.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{private.parent} belongs to somebody else") from error
        logger.warning("%s cannot be written to; compiled code goes to %s: set %s", wanted, private, variable)
        return private
