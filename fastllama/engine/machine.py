"""What an engine is made of: network, memory, compiled steps, and who holds it.

Shape suffixes: ``b`` batch, ``t`` query tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fastllama.engine import steps
from fastllama.engine.buffers import Buffers
from fastllama.engine.callers import Callers
from fastllama.engine.compiled_code import CompiledCode
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import StepKey, Steps, plain_mode
from fastllama.engine.prefill import PREFILL_CHUNKS, prefill_chunks
from fastllama.engine.steps import VERIFY_TOKENS, batch_bucket
from fastllama.engine.trial import agrees
from fastllama.model.cache import CacheMemoryError, StaticCache
from fastllama.model.llama import Llama

logger = logging.getLogger(__name__)

DEFAULT_CACHE_LEN = 4096
CHUNK_SIZES = sorted({*PREFILL_CHUNKS, *VERIFY_TOKENS})
DECODE = {"decode": steps.decode, "decode_processed": steps.decode_processed}


class Machine:
    """Memory for rows, and steps over it that are compiled once per batch bucket.

    Args:
        model: shares its weights with the engine; its q/k/v and gate/up parameters become views of fused matrices.
        cache_dtype: of keys and values; the weights' when None. See :class:`StaticCache`.

    Raises:
        NotImplementedError: a cache in 8 bits on a GPU.
    """

    def __init__(self, model: Llama, cache_dtype: torch.dtype | None = None) -> None:
        if cache_dtype == torch.int8 and model.device.type != "cpu":
            raise NotImplementedError(
                f"kv_cache_dtype is int8, which the CPU's kernels read, and the model is on {model.device}: "
                "set model.kv_cache_dtype to None"
            )
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.cache_dtype = cache_dtype
        with plain_mode():
            self._net = FusedDecoder(model)
        self._weights = weights_fingerprint(model)
        self._steps = Steps(self.device)
        self._code = CompiledCode(model.config.to_dict(), self.dtype, cache_dtype, kind_of(self.device))
        self._buffers: Buffers | None = None
        self._callers = Callers(self.device)

    # ---- what whoever knows rows has to do ---------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin a session, whatever the last one has left."""
        raise NotImplementedError

    def _end(self) -> None:
        """End a session, whatever ends it."""
        raise NotImplementedError

    def _bind(self) -> None:
        """Take the decode step for the rows there are."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Have no rows, and nothing of former ones: the memory goes."""
        raise NotImplementedError

    @property
    def _holds_something(self) -> bool:
        """Whether what is in the memory has to move along."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are launched, not waited for."""
        return self.device.type == "cuda"

    @property
    def cache(self) -> StaticCache | None:
        """The KV cache, once there is one."""
        return self._buffers.cache if self._buffers else None

    @property
    def default_cache_len(self) -> int:
        """Tokens a row has room for where nobody asks for more."""
        return min(self.config.max_position_embeddings, DEFAULT_CACHE_LEN)

    @property
    def compiled_steps(self) -> tuple[StepKey, ...]:
        """What has been compiled; on a CPU nothing is, where its kernels take a whole step."""
        return self._steps.keys

    def serves(self, model: Llama) -> bool:
        """Whether the model's weights are still the ones this engine was made from."""
        return self._weights == weights_fingerprint(model)

    @contextmanager
    def session(self) -> Iterator[object]:
        """Hold the engine: every other method but ``warmup`` and ``release`` is called inside.

        Yields what :meth:`hold` takes.

        Raises:
            RuntimeError: this thread holds it already, in an unfinished iteration.
        """
        with self._callers.session() as session:
            try:
                with self._callers.launching():
                    self._begin()
                yield session
            finally:
                self._end()
                self._code.save()  # however it ends

    def hold(self, session: object) -> None:
        """Hold the engine in this thread from now on, see :meth:`Callers.hold`."""
        self._callers.hold(session)

    def launching(self) -> AbstractContextManager[Any]:
        """What is computed inside from what the engine gives is in order with its steps, on whatever CUDA stream."""
        return self._callers.launching()

    def reserve(self, rows: int, slots: int) -> None:
        """Have memory for this number of rows, and of tokens in each, prompt and new together.

        Where there is less, it grows, to twice as many slots at least; rows that are loaded keep what they have. Steps
        that are compiled run on more slots too, but where they are recorded.

        Raises:
            CacheMemoryError: the device has no room for it; nothing was changed.
        """
        rows, held = batch_bucket(rows), self.cache
        if held and held.batch_size >= rows and held.max_cache_len >= slots:
            return
        with plain_mode(), self._callers.launching():
            if held is None or self._buffers is None:
                self._forget()
                dtypes = (self.dtype, self.cache_dtype)
                self._buffers = Buffers(self.config, rows, slots, CHUNK_SIZES, self.device, *dtypes)
                return
            more_rows = max(rows, held.batch_size)
            slots = held.max_cache_len if held.max_cache_len >= slots else max(slots, 2 * held.max_cache_len)
            logger.info("the KV cache grows to %d rows of %d slots; warmup() reserves it beforehand", more_rows, slots)
            if self.runs_ahead or more_rows > held.batch_size:
                self._steps.clear()
            self._grow(more_rows, slots)
        self._bind()

    def _grow(self, rows: int, slots: int) -> None:
        """Move to more memory. Interrupted halfway the memory is given up: the next call makes its own."""
        buffers, self._buffers = self._ready, None
        try:
            buffers.resize(rows, slots, keep=self._holds_something)
        except CacheMemoryError:  # nothing was changed
            self._buffers = buffers
            raise
        self._buffers = buffers

    def warmup(self, max_batch_size: int = 1, max_cache_len: int | None = None, speculate: bool = False) -> None:
        """Allocate for that many rows and slots, and compile every step that calls within them can need.

        Args:
            max_batch_size: rows of the largest batch.
            max_cache_len: tokens of the longest row, prompt and new together; the default when None.
            speculate: compile the steps of speculative decoding too, of a model that decodes and of one that drafts.

        Raises:
            ValueError: ``max_batch_size`` or ``max_cache_len`` is too small to hold anything.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if max_cache_len is not None and max_cache_len < 2:
            raise ValueError(f"max_cache_len must hold a prompt and a new token, so at least 2; got {max_cache_len}")
        with self.session():
            self.reserve(max_batch_size, max_cache_len or self.default_cache_len)
            bucket = batch_bucket(max_batch_size)
            while bucket:  # the largest first: the graphs after it fit into its memory
                self._compile_bucket(bucket, speculate)
                bucket //= 2

    def release(self) -> None:
        """Give back buffers, cache and compiled steps. The next call makes them again."""
        with self.session():
            self._forget()
            self._steps.clear()
            self._buffers = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile_bucket(self, b: int, speculate: bool) -> None:
        """Compile every step of one batch bucket."""
        assert self._buffers is not None
        longest = max(prefill_chunks(self._buffers.cache.max_cache_len, exact=False))
        sizes = [t for t in PREFILL_CHUNKS if t <= longest] if self._compiles_prefill else []
        for t in reversed(sizes):
            self._compiled("prefill", b, t)
        for t in reversed(VERIFY_TOKENS if speculate else ()):
            self._compiled("verify", b, t)
            fits = 1 < t <= self._buffers.cache.max_cache_len
            if fits and (self.runs_ahead or self._steps.is_one_operation(self.dtype, b, t)):
                self._compiled("draft", b, t)
        for kind in DECODE:
            self._compiled(kind, b, 1)

    def _compiled(self, kind: str, b: int, t: int) -> Callable[[], None]:
        """One run of a step. Where it is new and not one operation it is compiled, which changes nothing of rows."""
        key, buffers, net = StepKey(kind, b, t), self._ready, self._net
        if (bound := buffers.bound.get(key)) is not None:
            return bound
        at_once = kind != "prefill" and self._steps.is_one_operation(self.dtype, b, t)
        is_new = not at_once and key not in self._steps.keys
        if kind in DECODE:
            rows = (net, buffers.rows(b), buffers.memory)
            call = steps.decode_at_once(*rows) if at_once else self._steps.bound(key, DECODE[kind], *rows)
        elif kind == "draft":
            drafting = (net, buffers.rows(b), buffers.draft(b, t - 1), buffers.memory)
            call = steps.draft_at_once(*drafting) if at_once else self._steps.bound(key, steps.draft, *drafting)
        elif kind == "prefill":
            call = self._steps.bound(key, steps.prefill, net, buffers.chunk(b, t), buffers.memory)
        else:
            chunk = (net, buffers.chunk(b, t), buffers.memory, buffers.logits(b, t))
            call = steps.verify_at_once(*chunk) if at_once else self._steps.bound(key, steps.verify, *chunk)
        if is_new:
            logger.info("compiling %s step: batch %d, tokens %d", *key)
            buffers.mark_dynamic(b)
            self._code.compiled(lambda: self._warm_up(key, call))
            if self._code.was_found and not agrees(net, buffers, key, call):
                self._code.distrust()
                self._steps.clear(key)
                return self._compiled(kind, b, t)
        if at_once:
            buffers.bound[key] = call
        return call

    def _warm_up(self, key: StepKey, call: Callable[[], None]) -> None:
        """Run a step until it only replays; the first run compiles it."""
        with self._ready.frozen():
            if key.kind not in (*DECODE, "draft"):
                self._ready.repeat_newest(self._ready.chunk(key.batch, key.tokens))
            for _ in range(self._steps.runs_to_warm_up):
                call()

    @property
    def _ready(self) -> Buffers:
        assert self._buffers is not None, "reserve() comes first"
        return self._buffers

    @property
    def _compiles_prefill(self) -> bool:
        """Not on a CPU: compiling saves it a tenth, but each chunk size compiles and padding costs like tokens."""
        return self.device.type != "cpu"


def weights_fingerprint(model: Llama) -> tuple[Any, ...]:
    """Changes when a model's parameters are replaced or moved (in-place updates reach the engine anyway)."""
    return tuple((p.data_ptr(), p.dtype, p.shape) for p in [*model.parameters(), *model.buffers()])


def kind_of(device: torch.device) -> str:
    """What of a device decides the code that is compiled for it."""
    if device.type != "cuda":
        return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
