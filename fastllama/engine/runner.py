"""The engine: rows in fixed memory, moved on by compiled steps.

Decoding a token is a fixed program over fixed memory: ids, positions, settings, finished flags and output of every row
live in buffers that never move, and one step goes from token id to next token id, updating them in place: one operation
on a CPU, a compiled and recorded graph on CUDA.
The runner knows rows and no policy: which rows decode, and until when, is decided by who calls it.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``v`` vocabulary, ``n`` output tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastllama.engine import steps
from fastllama.engine.buffers import Buffers, Row, Snapshot
from fastllama.engine.callers import Callers
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import StepKey, Steps, plain_mode
from fastllama.engine.prefill import PREFILL_CHUNKS, fill_compiled, fill_eagerly, prefill_chunks
from fastllama.engine.prefixes import LEAST_REUSED, Prefixes, WeightsWatch
from fastllama.engine.steps import VERIFY_TOKENS, batch_bucket
from fastllama.model.cache import CacheMemoryError, StaticCache
from fastllama.model.llama import Llama
from fastllama.model.rope import static_length

logger = logging.getLogger(__name__)

DEFAULT_CACHE_LEN = 4096
CHUNK_SIZES = sorted({*PREFILL_CHUNKS, *VERIFY_TOKENS})


class Runner:
    """Decodes rows of one model, through steps that are compiled once per batch bucket.

    One caller at a time, in a :meth:`session`; others wait, from any thread. A session that is interrupted leaves
    nothing behind: the next one begins with every slot idle. What slots have computed stays in the cache, and a prompt
    that begins like it is computed from where it differs.

    Args:
        model: shares its weights with the engine; its q/k/v and gate/up parameters become views of fused matrices.
        cache_dtype: of keys and values; the weights' when None. See :class:`StaticCache`.

    Attributes:
        reuses_prefixes: whether that is done. Never where rotary frequencies depend on a sequence's length.

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
        self._buffers: Buffers | None = None
        self._lengths: dict[int, int] = {}  # of the loaded slots, in tokens; followed where rotary tables depend on it
        self._rope_follows_length = static_length(model.config) is not None
        self._prefixes = Prefixes(WeightsWatch(model.parameters(), self._net.tensors()))
        self._prompts: dict[int, torch.Tensor] = {}  # of the slots that have been prefilled
        self.reuses_prefixes = True
        self._batch = 1  # the bucket that holds every loaded slot
        self._decode: Callable[[], None] = _nothing_is_loaded
        self._callers = Callers(self.device)

    # ---- memory and compilation ------------------------------------------------------------------------------------

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
                    self._idle()
                yield session
            finally:
                self._prefixes.note_weights()

    def hold(self, session: object) -> None:
        """Hold the engine in this thread from now on, see :meth:`Callers.hold`."""
        self._callers.hold(session)

    def _idle(self) -> None:
        """Let every slot idle, and note what the last session has left in them."""
        self._lengths.clear()
        self._bind()
        prompts, self._prompts = self._prompts, {}
        if self._buffers is None:
            return
        if prompts and not self._rope_follows_length:
            self._prefixes.hold(self._buffers.written(prompts))
        self._prefixes.follow_weights()
        self._buffers.idle()
        self._buffers.keep(self._prefixes.first_tokens)

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
                self._prefixes.clear()
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
            buffers.resize(rows, slots, keep=bool(self._lengths or self._prefixes))
        except CacheMemoryError:  # nothing was changed
            self._buffers = buffers
            raise
        self._buffers = buffers

    def warmup(self, max_batch_size: int = 1, max_cache_len: int | None = None, verify: bool = False) -> None:
        """Allocate for that many rows and slots, and compile every step that calls within them can need.

        Args:
            max_batch_size: rows of the largest batch.
            max_cache_len: tokens of the longest row, prompt and new together; the default when None.
            verify: compile the steps of :meth:`verify` too.

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
                self._compile_bucket(bucket, verify)
                bucket //= 2

    def release(self) -> None:
        """Give back buffers, cache and compiled steps. The next call makes them again."""
        with self.session():
            self._drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop(self) -> None:
        self._steps.clear()
        self._lengths.clear()
        self._prefixes.clear()
        self._bind()
        self._buffers = None

    def _compile_bucket(self, b: int, verify: bool) -> None:
        """Compile every step of one batch bucket."""
        assert self._buffers is not None
        longest = max(prefill_chunks(self._buffers.cache.max_cache_len, exact=False))
        sizes = [t for t in PREFILL_CHUNKS if t <= longest] if self._compiles_prefill else []
        for t in reversed(sizes):
            self._compiled("prefill", b, t)
        for t in reversed(VERIFY_TOKENS if verify else ()):
            self._compiled("verify", b, t)
        self._compiled("decode", b, 1)

    def _compiled(self, kind: str, b: int, t: int) -> Callable[[], None]:
        """One run of a step. Where it is new and not one operation it is compiled, which changes nothing of rows."""
        key, buffers, net = StepKey(kind, b, t), self._ready, self._net
        at_once = kind != "prefill" and self._steps.is_one_operation(self.dtype, b, t)
        is_new = not at_once and key not in self._steps.keys
        if kind == "decode":
            rows = (net, buffers.rows(b), buffers.memory)
            call = steps.decode_at_once(*rows) if at_once else self._steps.bound(key, steps.decode, *rows)
        elif kind == "prefill":
            call = self._steps.bound(key, steps.prefill, net, buffers.chunk(b, t), buffers.memory)
        else:
            chunk = (net, buffers.chunk(b, t), buffers.memory, buffers.logits(b, t))
            call = steps.verify_at_once(*chunk) if at_once else self._steps.bound(key, steps.verify, *chunk)
        if is_new:
            logger.info("compiling %s step: batch %d, tokens %d", *key)
            buffers.mark_dynamic(b)
            with buffers.frozen():
                if kind != "decode":
                    buffers.repeat_newest(buffers.chunk(b, t))
                for _ in range(self._steps.runs_to_warm_up):
                    call()
        return call

    # ---- rows ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, rows: Mapping[int, Row]) -> int:
        """Load rows into slots and fill the cache with their prompts; what other rows have is not changed.

        Where the prefill is compiled it stops short of each prompt's last token, which takes the decode step: so there
        are no graphs that prefill and sample. Elsewhere the last chunk samples the first new token.

        A row that is shorter than a chunk is padded with copies of its last prefilled token, at that token's
        position: they write what is there already. So nothing is written past a row's end and no mask is needed.

        Args:
            rows: by slot; the cache has room for them.

        Returns:
            How many new tokens that has given each of the rows, 0 or 1.
        """
        samples, held = not self._compiles_prefill, self._ready.cache.batch_size
        assert max(rows) < held, f"slot {max(rows)} of {held}: reserve() comes first"
        with self._callers.launching():
            prompts = {slot: row.prompt for slot, row in rows.items()}
            self._lengths |= {slot: len(prompt) for slot, prompt in prompts.items()}
            self._bind()  # compiles before the first token, not after it
            starts = self._reuse(prompts, LEAST_REUSED if self.reuses_prefixes else None)
            self._ready.load(rows)
            self._set_rope()
            self._fill(prompts, starts, samples)
            self._prompts |= prompts
        self._lengths |= {slot: self._lengths[slot] + samples for slot in rows}
        return int(samples)

    def step(self) -> None:
        """Every loaded row that has not ended is one token further."""
        with self._callers.launching():
            if self._rope_follows_length:
                self._set_rope()
                self._lengths = {slot: length + 1 for slot, length in self._lengths.items()}
            self._decode()

    @torch.no_grad()
    def verify(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Write tokens to the cache at the rows' positions and after them; the rows themselves stay where they are.

        Args:
            ids_bt: int64 ``[b, t]`` for the slots from 0 on: each row's newest token, then those to verify; t is at
                most 8, and the cache has room for them.

        Returns:
            Logits ``[b, t, v]`` of what follows each of them, in the weights' dtype; the next call overwrites them.
        """
        (count, t), b, buffers = ids_bt.shape, self._batch, self._ready
        bucket = min(size for size in VERIFY_TOKENS if size >= t)
        with self._callers.launching():
            self._set_rope(ahead=t - 1)
            call, chunk = self._compiled("verify", b, bucket), buffers.chunk(b, bucket)
            buffers.repeat_newest(chunk)
            ahead_t = torch.arange(bucket, device=self.device).clamp(max=t - 1)  # the last token fills up the bucket
            chunk.ids_bt[:count] = ids_bt.to(self.device)[:, ahead_t]
            chunk.position_bt[:count] += ahead_t
            call()
        return buffers.logits(b, bucket)[:count, :t]

    @torch.no_grad()
    def logits_after(self, sequences: Sequence[torch.Tensor], least: int | None = 1) -> torch.Tensor:
        """Logits ``[b, v]`` of what follows some sequences, in the weights' dtype; the next call overwrites them.

        What slots hold of them is not computed again, whatever order they come in: beams may change places. Sequences
        that are equal are computed once.

        Args:
            sequences: of slots from 0 on, none of which is loaded: int64 ``[tokens]`` on the CPU, at least one token.
            least: number of tokens below which what a slot holds does not count; None where nothing does.
        """
        count, buffers = len(sequences), self._ready
        prompts, self._batch = dict(enumerate(sequences)), batch_bucket(count)
        with self._callers.launching():
            starts = self._reuse(prompts, least)
            buffers.keep({slot: int(prompt[0]) for slot, prompt in prompts.items()})
            buffers.set_rope(1)
            if any(len(prompt) - starts[slot] > 1 for slot, prompt in prompts.items()):
                texts = [prompt.tolist() for prompt in sequences]
                firsts = [texts.index(text) for text in texts]
                self._fill({slot: prompts[slot] for slot in sorted({*firsts})}, starts, samples=False)
                moved = {slot: first for slot, first in enumerate(firsts) if first != slot}
                buffers.copy(moved, max((len(prompts[slot]) for slot in moved), default=0))
            call, chunk = self._compiled("verify", self._batch, 1), buffers.chunk(self._batch, 1)
            buffers.repeat_newest(chunk)
            chunk.ids_bt[:count] = torch.stack([prompt[-1:] for prompt in sequences]).to(self.device)
            chunk.position_bt[:count] = torch.tensor([[len(prompt) - 1] for prompt in sequences], device=self.device)
            call()
        self._prefixes.hold(prompts)
        return buffers.logits(self._batch, 1)[:count, 0]

    def why_no_logits(self, rows: int) -> str | None:
        """Why :meth:`logits_after` does not take that many sequences; None where it does."""
        if self._rope_follows_length:
            return "rotary frequencies depend on the length"
        if self.device.type == "cpu" and not self._steps.is_one_operation(self.dtype, batch_bucket(rows), 1):
            return f"{rows} rows at once are no single operation of the CPU's kernels"
        return None

    def free(self, slot: int) -> None:
        """Let a slot idle, so that it can be loaded again."""
        with self._callers.launching():
            prompt = {slot: self._prompts.pop(slot)}
            if not self._rope_follows_length:
                self._prefixes.note_weights()
                self._prefixes.hold(self._ready.written(prompt))
            self._ready.free(slot)
            self._ready.keep({slot: int(prompt[slot][0])})
        del self._lengths[slot]
        self._bind()

    def newest(self) -> Snapshot:
        """A copy of the newest token of every slot up to the last loaded one, ``[b, 1]``."""
        with self._callers.launching():
            return Snapshot(self._ready.rows(self._batch).ids_b1)

    def output(self, first: int, last: int) -> Snapshot:
        """A copy of the new tokens from ``first`` to before ``last`` of the same slots, ``[b, last - first]``."""
        with self._callers.launching():
            return Snapshot(self._ready.rows(self._batch).output_bn[:, first:last])

    # ---- the parts of a call ---------------------------------------------------------------------------------------

    @property
    def _ready(self) -> Buffers:
        assert self._buffers is not None, "reserve() comes first"
        return self._buffers

    def _bind(self) -> None:
        """Take the decode step of the bucket that holds every loaded slot."""
        if not self._lengths:
            self._batch, self._decode = 1, _nothing_is_loaded
            return
        self._batch = batch_bucket(max(self._lengths) + 1)
        self._decode = self._compiled("decode", self._batch, 1)

    @property
    def _compiles_prefill(self) -> bool:
        """Not on a CPU: compiling saves it a tenth, but each chunk size compiles and padding costs like tokens."""
        return self.device.type != "cpu"

    def _set_rope(self, ahead: int = 0) -> None:
        """Where frequencies depend on the length, the longest loaded row decides, as in transformers."""
        self._ready.set_rope(max(self._lengths.values()) + ahead)

    def _reuse(self, prompts: Mapping[int, torch.Tensor], least: int | None) -> dict[int, int]:
        """How many tokens of each prompt are in its slot, moved there where another slot holds them."""
        found = {} if least is None else self._prefixes.find(prompts, least)
        self._prefixes.drop(prompts)
        moved = {slot: at.slot for slot, at in found.items() if at.slot != slot}
        self._ready.copy(moved, max((found[slot].tokens for slot in moved), default=0))
        return {slot: found[slot].tokens if slot in found else 0 for slot in prompts}

    def _fill(self, prompts: Mapping[int, torch.Tensor], starts: Mapping[int, int], samples: bool) -> None:
        """Compute prompts from where each starts, and their first new tokens; or short of each prompt's last token."""
        if self._compiles_prefill:
            step_of = functools.partial(self._compiled, "prefill", self._batch)
            fill_compiled(step_of, self._ready, self._batch, prompts, starts)
        else:
            fill_eagerly(self._net, self._ready, prompts, starts, samples)


def _nothing_is_loaded() -> None:
    raise RuntimeError("no row is loaded: prefill() comes before step()")


def weights_fingerprint(model: Llama) -> tuple[Any, ...]:
    """Changes when a model's parameters are replaced or moved (in-place updates reach the engine anyway)."""
    return tuple((p.data_ptr(), p.dtype, p.shape) for p in [*model.parameters(), *model.buffers()])
