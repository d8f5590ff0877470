"""Compiled steps that outlive the process: what torch.compile has made of an engine's steps, in files.

torch keeps what it compiles among the temporary files, which do not survive a restart or a new container, and Triton
its kernels in the home folder. Bundles (``torch.compiler.save_cache_artifacts``) keep the former, by engine, in
``FASTLLAMA_CACHE_DIR``, or ``fastllama`` in the user's cache folder. torch compares what is in them with the code that
is to be compiled, versions and options. Whoever can write there can have the user run code, as with torch's own
folder; so it is nobody else's.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch

from fastllama.version import __version__

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "FASTLLAMA_CACHE_DIR"
MOST_BYTES = 1 << 30  # of all bundles together; the oldest go first
DIGEST = hashlib.sha256().digest_size
SUFFIX, PARTIAL = ".bundle", ".part-"
MOST_BUNDLES = 16  # of one engine
ABANDONED_S = 3600.0  # after which nobody still writes a part of a file


class CompiledCode:
    """What is stored for one engine. Files that cannot be read or written are as if they were not there.

    Each process that compiles something has a bundle of what torch has compiled or found in it, for whatever engine.

    Args:
        decides: what the code depends on; any values whose ``repr`` differs where it does.

    Attributes:
        was_found: whether something of what was compiled last was stored, by us or by torch.
    """

    def __init__(self, *decides: Any) -> None:
        name = hashlib.sha256(repr((__version__, torch.__version__, *decides)).encode()).hexdigest()[:32]
        folder = cache_folder()
        self.folder = folder and folder / "steps" / name
        self.was_found = False
        self._is_trusted = True
        self._loaded: list[Path] | None = None  # None: nobody has looked
        self._saved: Path | None = None
        self._has_new = False

    def compiled(self, compile_: Callable[[], None]) -> None:
        """Call what compiles steps, with what is stored at hand."""
        if not self._is_trusted:
            with cast(Any, torch.compiler.config).patch(force_disable_caches=True), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
                compile_()
            self.was_found = False
            return
        if self._loaded is None:
            self._loaded = [file for file in self._files() if self._load(file)]
        before = _found_and_missed()
        compile_()
        found, missed = (after - then for after, then in zip(_found_and_missed(), before, strict=True))
        self.was_found = found > 0
        self._has_new |= missed > 0 or not self._loaded  # torch's own files may not be there the next time

    def distrust(self) -> None:
        """Delete what is stored, and compile everything from now on."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        logger.warning(
            "compiled code that was stored gives other results than the step it was made of: %s is deleted and the "
            "step compiled again; torch's own files in %s are left, delete them where this comes again",
            self.folder,
            cache_dir(),
        )
        self._is_trusted = self._has_new = False
        for file in self._files():
            _delete(file)

    def save(self) -> None:
        """Store what was compiled, if that was not stored."""
        if not self._has_new or self.folder is None:
            return
        self._has_new = False
        artifacts = torch.compiler.save_cache_artifacts()
        if artifacts is None or len(artifacts[0]) > MOST_BYTES:
            return
        digest = hashlib.sha256(artifacts[0]).digest()
        file = self.folder / f"{digest.hex()[:16]}{SUFFIX}"
        partial = file.with_suffix(f"{PARTIAL}{os.getpid()}-{threading.get_ident()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(digest + artifacts[0])
            partial.replace(file)  # whole, or not at all
            if self._saved is not None and self._saved != file:
                _delete(self._saved)  # all that it held is in this one
            self._saved = file
        except OSError as error:
            logger.info("compiled code is not stored: %s", error)
            _delete(partial)
        self._remove_old()

    def _files(self) -> list[Path]:
        """The bundles that there are, the newest first."""
        return [] if self.folder is None else [file for file, _ in _newest_first(self.folder.glob(f"*{SUFFIX}"))]

    def _load(self, file: Path) -> bool:
        try:
            content = file.read_bytes()
        except OSError as error:
            logger.info("%s is not used: %s", file, error)
            return False
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            logger.warning("%s is damaged: deleted, its steps are compiled again where torch has not kept them", file)
            _delete(file)
            return False
        with contextlib.suppress(OSError):
            os.utime(file)  # it is used
        try:
            return torch.compiler.load_cache_artifacts(content[DIGEST:]) is not None
        except OSError as error:  # torch writes it to its own folder
            logger.info("%s is not used: %s", file, error)
            return False

    def _remove_old(self) -> None:
        """Delete the oldest bundles beyond what is kept, and what was left by processes that were ended in a write."""
        assert self.folder is not None
        everything, held = self.folder.parent, 0
        for number, (file, _) in enumerate(_newest_first(self.folder.glob(f"*{SUFFIX}"))):
            if number >= MOST_BUNDLES:
                _delete(file)
        for file, stat in _newest_first(everything.glob(f"*/*{SUFFIX}")):
            held += stat.st_size
            if held > MOST_BYTES:
                _delete(file)
        for file, stat in _newest_first(everything.glob(f"*/*{PARTIAL}*")):
            if time.time() - stat.st_mtime > ABANDONED_S:
                _delete(file)


def _newest_first(files: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    found = []
    for file in files:
        with contextlib.suppress(OSError):  # another process has deleted it
            found.append((file, file.stat()))
    return sorted(found, key=lambda pair: pair[1].st_mtime, reverse=True)


def _delete(file: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's, or gone
        file.unlink(missing_ok=True)


def cache_folder() -> Path | None:
    """Where fastllama keeps files that it can make again; None where the user has no home folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastllama")
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or default).expanduser()
    except RuntimeError:
        return None


def _found_and_missed() -> tuple[int, int]:
    """How often torch has found something stored in this process, and how often nothing."""
    from torch._dynamo.utils import counters

    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    found = inductor["fxgraph_cache_hit"] + autograd["autograd_cache_hit"]
    return found, inductor["fxgraph_cache_miss"]
