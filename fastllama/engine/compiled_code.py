"""Compiled steps that outlive the process: what torch.compile has made of an engine's steps, in a file.

torch keeps what it compiles among the temporary files, which do not survive a restart or a new container, and Triton
its kernels in the home folder. A bundle (``torch.compiler.save_cache_artifacts``) holds the former for one engine, in
``FASTLLAMA_CACHE_DIR``, or ``fastllama`` in the user's cache folder. torch compares what is in it with the code that
is to be compiled, versions and options; and the first step that a bundle has given is compared with the step as it is
written before anybody gets a token of it.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``v`` vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from fastllama.engine.buffers import Buffers
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import StepKey

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "FASTLLAMA_CACHE_DIR"
MOST_BYTES = 1 << 30  # of all bundles together; the oldest go first
DIGEST = hashlib.sha256().digest_size
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit
ONE = torch.ones(())


class CompiledCode:
    """The bundle of one engine. Files that cannot be read or written are as if they were not there.

    Args:
        decides: what the code depends on; any values whose ``repr`` differs where it does.

    Attributes:
        is_trusted: whether compiled code may come from anywhere but a compiler that runs now.
        is_loaded: whether there was a bundle, which torch knows now.
    """

    def __init__(self, *decides: Any) -> None:
        name = hashlib.sha256(repr((torch.__version__, *decides)).encode()).hexdigest()[:32]
        self._file = cache_folder() / "steps" / f"{name}.bundle"
        self.is_trusted, self.is_loaded = True, False
        self._was_looked_for = self._has_new = False

    def compiled(self, compile_: Callable[[], None]) -> None:
        """Call what compiles steps, with what the bundle holds at hand."""
        if not self.is_trusted:
            with cast(Any, torch.compiler.config).patch(force_disable_caches=True):
                compile_()
            return
        if not self._was_looked_for:
            self._was_looked_for, self.is_loaded = True, self._load()
        before = _compiler_runs()
        compile_()
        self._has_new = self._has_new or _compiler_runs() > before

    def distrust(self) -> None:
        """Delete the bundle, and compile everything from now on."""
        logger.warning(
            "compiled code that was stored (%s) gives other logits than the step it was made of: deleted, and compiled "
            "again",
            self._file,
        )
        self.is_trusted = self._has_new = False
        with contextlib.suppress(OSError):  # of somebody else's: it is not asked again in this process
            self._file.unlink(missing_ok=True)

    def save(self) -> None:
        """Write what was compiled since, if anything, together with what was there."""
        if not self._has_new:
            return
        self._has_new = False
        artifacts = torch.compiler.save_cache_artifacts()
        if artifacts is None or len(artifacts[0]) > MOST_BYTES:
            return
        partial = self._file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(hashlib.sha256(artifacts[0]).digest() + artifacts[0])
            partial.replace(self._file)  # whole, or not at all
            self._remove_old()
        except OSError as error:
            logger.info("compiled code is not stored: %s", error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _load(self) -> bool:
        try:
            content = self._file.read_bytes()
            os.utime(self._file)  # it is used
        except OSError:
            return False
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            logger.warning("%s is damaged, its steps are compiled again", self._file)
            return False
        try:
            return torch.compiler.load_cache_artifacts(content[DIGEST:]) is not None
        except OSError as error:  # torch writes it to its own cache
            logger.info("%s is not used: %s", self._file, error)
            return False

    def _remove_old(self) -> None:
        bundles = sorted(self._file.parent.glob("*.bundle"), key=lambda file: file.stat().st_mtime, reverse=True)
        held = 0
        for bundle in bundles:
            held += bundle.stat().st_size
            if held > MOST_BYTES:
                bundle.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where fastllama keeps files that it can make again."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastllama")
    return Path(os.environ.get(CACHE_VARIABLE) or default).expanduser()


def agrees(net: FusedDecoder, buffers: Buffers, key: StepKey, compiled: Callable[[], None]) -> bool:
    """Whether a compiled step does what the network does as it is written.

    Every row takes one step from its newest token. Logits are held against those that the network gives without being
    compiled, where the step samples those of its token; so are keys and values. Rows and cache stay as they were.
    """
    with torch.no_grad(), buffers.trial(key.batch) as rows:
        ids_b1, position_b1 = rows.ids_b1.clone(), rows.position_b1.clone()
        last, first = buffers.cache.max_cache_len - 1, position_b1[:, 0].tolist()
        places = [[min(place + ahead, last) for place in first] for ahead in range(key.tokens)]  # that may be written
        kept = [buffers.written_at(each) for each in places]
        try:
            buffers.write_at(first, torch.zeros(len(kept[0])))  # what is there already would pass for written
            if key.kind in ("prefill", "verify"):
                buffers.repeat_newest(buffers.chunk(key.batch, key.tokens))
            if key.kind == "verify":
                buffers.logits(*key[1:]).zero_()
            compiled()
            written = buffers.written_at(first)
            wanted_bv = net.logits(net(ids_b1, position_b1, *buffers.memory)[:, -1]).float()
            wanted = buffers.written_at(first)
        finally:
            for each, values in zip(reversed(places), reversed(kept), strict=True):
                buffers.write_at(each, values)
        largest = wanted_bv.abs().amax()
        errors = [_error(written - wanted, wanted.abs().amax())]
        if key.kind == "verify":
            errors += [_error(buffers.logits(*key[1:]) - wanted_bv[:, None], largest)]
        elif key.kind != "prefill":
            first_b1, moved_b1 = rows.output_bn[:, :1], rows.position_b1 - position_b1
            errors += [_error(wanted_bv.amax(dim=1, keepdim=True) - wanted_bv.gather(1, first_b1), largest)]
            errors += [_error(moved_b1.clamp(1, key.tokens) - moved_b1, ONE)]
            newest_b1 = rows.output_bn.gather(1, (rows.step_b[:, None] - 1).clamp(min=0))
            errors += [_error(newest_b1 - rows.ids_b1, ONE), _error(moved_b1[:, 0] - rows.step_b, ONE)]
    return all(error <= TOLERANCE[buffers.dtype] for error in errors)


def _error(difference: torch.Tensor, largest: torch.Tensor) -> float:
    return float(difference.abs().amax().cpu() / largest.cpu().clamp(min=torch.finfo(torch.float32).tiny))


def _compiler_runs() -> int:
    """How often Inductor has found nothing stored in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]
