"""The decoding engine: its steps, and the loop that prefills and replays.

Decoding a token is a fixed program over fixed memory: ids, positions, sampling parameters, finished flags and output
live in buffers that never move, and one compiled step goes from token id to next token id, updating them in place.
Prompts are prefilled in chunks.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``v`` vocabulary, ``n`` output tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastllama.engine.buffers import MAX_EOS_IDS, PREFILL_CHUNKS, Memory, Rows, State
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import Steps, call_plainly, plain_mode
from fastllama.model.cache import StaticCache
from fastllama.model.llama import Llama
from fastllama.sampling import row_seeds, sample

logger = logging.getLogger(__name__)

DEFAULT_CACHE_LEN = 4096


@dataclass(frozen=True)
class Request:
    """One batch to decode.

    prompts: int64 ``[tokens]`` for each row, at least one token each, on any device.
    max_new_tokens: steps to decode at most.
    temperature, top_k, top_p, min_p: see :class:`fastllama.sampling.SamplingParams`; temperature 0 is greedy.
    seed: of the draws.
    eos_token_ids: a row that draws one of these is finished, and gives ``pad_token_id`` from then on.
    """

    prompts: Sequence[torch.Tensor]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0


def _prefill_step(net: FusedDecoder, ids_bt: torch.Tensor, position_bt: torch.Tensor, memory: Memory) -> None:
    """Write tokens to the cache."""
    net(ids_bt, position_bt, *memory)


def _prefill_and_draw(
    net: FusedDecoder, ids_bt: torch.Tensor, position_bt: torch.Tensor, memory: Memory, rows: Rows
) -> None:
    """Write the last tokens of the rows' prompts to the cache and draw the first new ones."""
    _draw(net, net(ids_bt, position_bt, *memory), rows)


def _decode_step(net: FusedDecoder, rows: Rows, memory: Memory) -> None:
    """From the rows' tokens to their next tokens, updating every buffer in place."""
    _draw(net, net(rows.ids_b1, rows.position_b1, *memory), rows)


def _draw(net: FusedDecoder, x_bm: torch.Tensor, rows: Rows) -> None:
    """From hidden states to next tokens, and every row one token further."""
    token_b = sample(net.logits(x_bm), rows.params, rows.position_b1[:, 0] + 1)
    token_b = torch.where(rows.finished_b, rows.pad_1, token_b)
    rows.output_bn.index_copy_(1, rows.step_1, token_b[:, None])
    rows.position_b1.add_(~rows.finished_b[:, None])  # a finished row stays where it is, inside its cache
    rows.finished_b.logical_or_((token_b[:, None] == rows.eos_e).any(dim=1))
    rows.ids_b1.copy_(token_b[:, None])
    rows.step_1.add_(1)


def prefill_chunks(tokens: int, exact: bool) -> list[int]:
    """Sizes of the chunks that a prefill of ``tokens`` tokens takes; unless ``exact``, the last one is padded."""
    longest = max(PREFILL_CHUNKS)
    full, rest = divmod(tokens, longest)
    if rest and not exact:
        rest = min(size for size in PREFILL_CHUNKS if size >= rest)
    return [longest] * full + [rest] * (rest > 0)


def batch_bucket(rows: int) -> int:
    """The batch that ``rows`` rows run in: the next power of two."""
    return 1 << (rows - 1).bit_length()


class Engine:
    """Decodes for one model, through steps that are compiled once per batch bucket.

    One caller at a time; others wait, from any thread. A call that is interrupted leaves nothing behind: the next one
    starts by setting every buffer.

    Args:
        model: shares its weights with the engine; its q/k/v and gate/up parameters become views of fused matrices.
    """

    def __init__(self, model: Llama) -> None:
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        with plain_mode():
            self._net = FusedDecoder(model)
        self._weights = weights_fingerprint(model)
        self._steps = Steps(self.device)
        self._state: State | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._runs_ahead = self.device.type == "cuda"  # steps are launched, not waited for

    # ---- what callers see ------------------------------------------------------------------------------------------

    def decode(self, request: Request, poll_every: int = 1) -> Generator[torch.Tensor, None, None]:
        """Decode a batch; yields the new tokens as they come, int64 ``[rows, n]`` on the CPU, n ≥ 1.

        Ends when every row is finished or after ``max_new_tokens``. Holds the engine until it is exhausted or closed.

        Args:
            request: what to decode.
            poll_every: on CUDA, steps launched between two looks at their tokens: 1 shows tokens soonest, more costs
                the host less. On a CPU, where nothing runs ahead, each step is looked at.

        Raises:
            ValueError: as :meth:`check`.
            RuntimeError: this thread already holds the engine in an unfinished iteration.
        """
        self.check(request)
        with self._exclusive():
            longest = max(len(prompt) for prompt in request.prompts)
            needed = longest + request.max_new_tokens
            slots = needed if self._state else max(needed, self._default_cache_len())
            state = self._reserve(len(request.prompts), slots)
            for tokens_bn in self._run(state, request, longest, poll_every if self._runs_ahead else 1):
                yield tokens_bn
                self._owner = threading.get_ident()  # an iterator may be handed to another thread

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be decoded."""
        if not request.prompts or min(len(prompt) for prompt in request.prompts) < 1:
            raise ValueError("every row needs at least one prompt token; give a BOS token to start from nothing")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if len(request.eos_token_ids) > MAX_EOS_IDS:
            raise ValueError(f"at most {MAX_EOS_IDS} EOS ids are supported, got {len(request.eos_token_ids)}")
        if not 0 <= request.pad_token_id < self.config.vocab_size:
            raise ValueError(
                f"pad_token_id is {request.pad_token_id}, outside the vocabulary of {self.config.vocab_size}"
            )
        low = min(int(prompt.min()) for prompt in request.prompts)
        high = max(int(prompt.max()) for prompt in request.prompts)
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids hold token id {low if low < 0 else high}, outside the vocabulary of "
                f"{self.config.vocab_size}: is this the model's own tokenizer?"
            )

    def warmup(self, max_batch_size: int = 1, max_cache_len: int | None = None) -> None:
        """Allocate for that many rows and slots, and compile every step that calls within them can need.

        Raises:
            ValueError: ``max_batch_size`` or ``max_cache_len`` is too small to hold anything.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if max_cache_len is not None and max_cache_len < 2:
            raise ValueError(f"max_cache_len must hold a prompt and a new token, so at least 2; got {max_cache_len}")
        with self._exclusive():
            state = self._reserve(max_batch_size, max_cache_len or self._default_cache_len())
            bucket = 1
            while bucket <= batch_bucket(max_batch_size):
                self._compile_bucket(state, bucket)
                bucket *= 2

    def reserve(self, max_batch_size: int, max_cache_len: int) -> None:
        """Allocate for that many rows and slots; what a call needs is still compiled by the first that needs it."""
        with self._exclusive():
            self._reserve(max_batch_size, max_cache_len)

    def release(self) -> None:
        """Give back buffers, cache and compiled steps. The next call makes them anew."""
        with self._exclusive():
            self._steps.clear()
            self._state = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def cache(self) -> StaticCache | None:
        """The KV cache, once there is one."""
        return self._state.cache if self._state else None

    @property
    def compiled_steps(self) -> tuple[tuple[Any, ...], ...]:
        """What has been compiled: ("prefill", batch, tokens) and ("decode", batch, 1)."""
        return self._steps.keys

    def serves(self, model: Llama) -> bool:
        """Whether the model's weights are still the ones this engine was made from."""
        return self._weights == weights_fingerprint(model)

    # ---- the parts of a call ---------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me and self._lock.locked():
            raise RuntimeError(
                "this thread is still iterating over an earlier stream of this model; exhaust it or close() it first"
            )
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def _default_cache_len(self) -> int:
        return min(self.config.max_position_embeddings, DEFAULT_CACHE_LEN)

    def _reserve(self, rows: int, slots: int) -> State:
        """The state, made or made larger so that ``rows`` rows of ``slots`` slots fit."""
        rows = batch_bucket(rows)
        state = self._state
        if state and state.cache.batch_size >= rows and state.cache.max_cache_len >= slots:
            return state
        if state:
            rows = max(rows, state.cache.batch_size)
            held = state.cache.max_cache_len
            slots = held if held >= slots else max(slots, 2 * held)
            logger.info("the KV cache grows to %d rows of %d slots; warmup() reserves it beforehand", rows, slots)
            self._steps.clear()
            self._state = state = None  # so that the old cache is gone before the new one is allocated
        with plain_mode():
            self._state = State(self.config, rows, slots, self.device, self.dtype)
        return self._state

    @torch.no_grad()
    def _start(self, state: State, request: Request) -> None:
        """Set every buffer that a call reads."""
        count = len(request.prompts)
        rows = state.rows(batch_bucket(count))
        rows.step_1.zero_()
        rows.pad_1.fill_(request.pad_token_id)
        rows.eos_e.fill_(-1)
        rows.eos_e[: len(request.eos_token_ids)] = torch.tensor(request.eos_token_ids, dtype=torch.long)
        rows.finished_b.fill_(True)  # rows beyond the request idle in slot 0
        rows.finished_b[:count] = False
        rows.position_b1.zero_()
        rows.ids_b1.zero_()
        rows.position_b1[:count, 0] = torch.tensor([len(prompt) - 1 for prompt in request.prompts])
        rows.ids_b1[:count, 0] = torch.stack([prompt[-1].cpu() for prompt in request.prompts])
        params = rows.params
        params.temperature.fill_(request.temperature)
        params.top_k.fill_(request.top_k)
        params.top_p.fill_(request.top_p)
        params.min_p.fill_(request.min_p)
        params.seed.copy_(row_seeds(request.seed, len(params.seed)))

    @torch.no_grad()
    def _prefill(self, state: State, prompts: Sequence[torch.Tensor], rows: Rows) -> int:
        """Fill the cache with the prompts; returns how many new tokens that has given, 0 or 1.

        Where the prefill is compiled it stops short of each prompt's last token, which takes the decode step: so there
        are no graphs that prefill and draw. Elsewhere the last chunk draws the first new token.

        A row that is shorter than a chunk is padded with copies of its last prefilled token, at that token's
        position: they write what is there already. So nothing is written past a row's end and no mask is needed.
        """
        b, draws = batch_bucket(len(prompts)), not self._compiles_prefill
        longest = max(len(prompt) for prompt in prompts)
        state.set_rope(longest)
        ids_bt, last_b1 = torch.zeros(b, longest, dtype=torch.long), torch.zeros(b, 1, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_bt[row, : len(prompt)] = prompt.cpu()
            last_b1[row] = len(prompt) - 1 if draws else max(len(prompt) - 2, 0)
        chunks, start = prefill_chunks(longest if draws else longest - 1, exact=draws), 0
        for number, t in enumerate(chunks, start=1):
            position_bt = torch.arange(start, start + t).minimum(last_b1)
            chunk = (self._net, ids_bt.gather(1, position_bt), position_bt, state.memory)
            if not draws:
                self._prefill_compiled(state, *chunk[1:3])
            elif number < len(chunks):
                call_plainly(_prefill_step, chunk)
            else:
                call_plainly(_prefill_and_draw, (*chunk, rows))
            start += t
        return int(draws)

    def _prefill_compiled(self, state: State, ids_bt: torch.Tensor, position_bt: torch.Tensor) -> None:
        b, t = ids_bt.shape
        static_ids_bt, static_position_bt = state.chunk(b, t)
        static_ids_bt.copy_(ids_bt)
        static_position_bt.copy_(position_bt)
        args = (self._net, static_ids_bt, static_position_bt, state.memory)
        self._call(("prefill", b, t), _prefill_step, *args)()

    def _run(self, state: State, request: Request, longest: int, burst: int) -> Iterator[torch.Tensor]:
        """Prefill, then replay the decode step, and yield the tokens.

        On CUDA a burst of steps is launched before the tokens of the burst before it are read, so that the device never
        waits for the host; what was launched past the end is dropped.
        """
        count = len(request.prompts)
        rows = state.rows(batch_bucket(count))
        step = self._decode_call(state, rows)  # compiles before the first token, not after it
        self._start(state, request)
        drawn = self._prefill(state, request.prompts, rows)
        newest_b1, ending = rows.ids_b1[:count], Ending(count, request.eos_token_ids)
        if drawn:
            yield ending.cut(newest_b1.clone())
        if ending.reached or drawn == request.max_new_tokens:
            return
        pending: Snapshot | None = None
        for first in range(drawn, request.max_new_tokens, burst):
            last = min(first + burst, request.max_new_tokens)
            for at in range(first, last):
                state.set_rope(longest + at)
                step()
            taken = Snapshot(newest_b1 if burst == 1 else rows.output_bn[:count, first:last])
            ready, pending = (pending, taken) if self._runs_ahead else (taken, None)
            if ready:
                yield ending.cut(ready.read())
                if ending.reached:
                    return
        if pending:
            yield ending.cut(pending.read())

    def _decode_call(self, state: State, rows: Rows) -> Callable[[], None]:
        """One replay of the decode step for these rows; compiled by running it on rows that idle in slot 0."""
        b = len(rows.ids_b1)
        key = ("decode", b, 1)
        is_new = key not in self._steps.keys
        call = self._call(key, _decode_step, self._net, rows, state.memory)
        for _ in range(self._steps.runs_to_warm_up * is_new):
            state.set_rope(1)
            self._start(state, Request([torch.zeros(1, dtype=torch.long)] * b, 1))
            call()
        return call

    def _call(self, key: tuple[str, int, int], step: Callable[..., None], *args: Any) -> Callable[[], None]:
        """The compiled step of this key, to be called on these arguments; its first call compiles it."""
        if key not in self._steps.keys:
            logger.info("compiling %s step: batch %d, tokens %d", *key)
        return self._steps.call(key, step, *args)

    def _compile_bucket(self, state: State, b: int) -> None:
        """Compile and run every step of one batch bucket, on rows that idle in slot 0."""
        capacity = state.cache.max_cache_len
        state.set_rope(1)
        for t in PREFILL_CHUNKS if self._compiles_prefill else ():
            if t > max(prefill_chunks(capacity, exact=False)):
                break  # no prompt that fits is that long
            zeros_bt = torch.zeros(b, t, dtype=torch.long)
            for _ in range(self._steps.runs_to_warm_up):
                self._prefill_compiled(state, zeros_bt, zeros_bt)
        self._decode_call(state, state.rows(b))

    @property
    def _compiles_prefill(self) -> bool:
        """Not on a CPU: compiling saves it a tenth, but each chunk size compiles and padding costs like tokens."""
        return self.device.type != "cpu"


class Snapshot:
    """A copy of some tokens as they are when the steps launched so far are done; on CUDA made without waiting."""

    def __init__(self, tokens_bn: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens_bn.is_cuda:
            self._tokens_bn = torch.empty(tokens_bn.shape, dtype=torch.long, pin_memory=True)
            self._tokens_bn.copy_(tokens_bn, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens_bn = tokens_bn.clone()

    def read(self) -> torch.Tensor:
        """The tokens on the host ``[b, n]``, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens_bn


class Ending:
    """Follows the tokens on the host to see when every row has drawn an EOS id."""

    def __init__(self, rows: int, eos_token_ids: tuple[int, ...]) -> None:
        self._open = set(range(rows))
        self._eos = frozenset(eos_token_ids)

    @property
    def reached(self) -> bool:
        """Whether all rows are finished."""
        return not self._open

    def cut(self, tokens_bn: torch.Tensor) -> torch.Tensor:
        """The tokens up to the step in which the last row finished."""
        for step, tokens in enumerate(tokens_bn.T.tolist()):
            self._open.difference_update([row for row in self._open if tokens[row] in self._eos])
            if not self._open:
                return tokens_bn[:, : step + 1]
        return tokens_bn


def weights_fingerprint(model: Llama) -> tuple[Any, ...]:
    """Tells whether a model's parameters have been replaced or moved (in-place updates reach the engine anyway)."""
    return tuple((p.data_ptr(), p.dtype, p.shape) for p in model.parameters())
