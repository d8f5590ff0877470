"""The engine: rows in fixed memory, moved on by compiled steps.

Decoding a token is a fixed program over fixed memory: ids, positions, settings, finished flags and output of every row
live in buffers that never move, and one step goes from token id to next token id, updating them in place: one operation
on a CPU, a compiled and recorded graph on CUDA.
The runner knows rows and no policy: which rows decode, and until when, is decided by who calls it.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``v`` vocabulary, ``n`` output tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastllama.engine.buffers import Snapshot
from fastllama.engine.machine import Machine
from fastllama.engine.prefill import fill_compiled, fill_eagerly
from fastllama.engine.prefixes import LEAST_REUSED, Prefixes, WeightsWatch, first_of_equals
from fastllama.engine.processing import changes_logits
from fastllama.engine.row import Row
from fastllama.engine.steps import VERIFY_TOKENS, batch_bucket
from fastllama.model.cache import StaticCache
from fastllama.model.llama import Llama
from fastllama.model.rope import static_length


class Runner(Machine):
    """Decodes rows of one model, through steps that are compiled once per batch bucket.

    One caller at a time, in a :meth:`session`; others wait, from any thread. A session that is interrupted leaves
    nothing behind: the next one begins with every slot idle. What slots have computed stays in the cache, and a prompt
    that begins like it is computed from where it differs.

    Args:
        model: shares its weights with the engine; its q/k/v and gate/up parameters become views of fused matrices.
        cache_dtype: of keys and values; the weights' when None. See :class:`StaticCache`.

    Attributes:
        reuses_prefixes: whether that is done. Never where rotary frequencies depend on a sequence's length.
        speculation: what speculative decoding knows of this engine; None before the first call that asks for it.

    Raises:
        NotImplementedError: a cache in 8 bits on a GPU.
    """

    def __init__(self, model: Llama, cache_dtype: torch.dtype | None = None) -> None:
        super().__init__(model, cache_dtype)
        self._lengths: dict[int, int] = {}  # of the loaded slots, in tokens; followed where rotary tables depend on it
        self._rope_follows_length = static_length(model.config) is not None
        self._prefixes = Prefixes(WeightsWatch([*model.parameters()], [*model.parameters(), *model.buffers()]))
        self._prompts: dict[int, torch.Tensor] = {}  # of the slots that have been prefilled
        self._processed: set[int] = set()  # loaded slots whose logits are changed
        self.reuses_prefixes = True
        self.speculation: Any = None
        self._batch = 1  # the bucket that holds every loaded slot
        self._decode: Callable[[], None] = _nothing_is_loaded

    def _begin(self) -> None:
        """Let every slot idle, and note what the last session has left in them."""
        self._lengths.clear()
        self._processed.clear()
        self._bind()
        prompts, self._prompts = self._prompts, {}
        if prompts and self._buffers is not None and not self._rope_follows_length:
            self._prefixes.hold(self._buffers.written(prompts))
        self._prefixes.follow_weights()
        if self._buffers is None:
            return
        self._buffers.idle()
        self._buffers.keep(self._prefixes.first_tokens)

    def _end(self) -> None:
        """Forget what was computed if weights were edited meanwhile."""
        if not self._prefixes.weights_stayed():
            self._prefixes.clear()
            self._prompts.clear()

    def _forget(self) -> None:
        self._lengths.clear()
        self._processed.clear()
        self._prompts.clear()
        self._prefixes.clear()
        self._bind()

    @property
    def _holds_something(self) -> bool:
        return bool(self._lengths or self._prefixes)

    # ---- rows ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, cache: StaticCache, prompts: Sequence[torch.Tensor]) -> None:
        """Let slots from 0 on hold what a cache of the caller's holds, for a prefill of these prompts.

        Args:
            cache: of the engine's dtype and device; row r holds the first tokens of prompt r.
            prompts: int64 ``[tokens]`` on the CPU.
        """
        count, lengths = len(prompts), cache.length_b.tolist()
        with self._callers.launching():
            last = min(max(lengths[:count]), max(map(len, prompts)))  # it may hold more than is asked for
            self._ready.cache.copy_rows(cache, count, last)
        self._prefixes.drop(range(count))
        if not self.reuses_prefixes:
            self._prefixes.clear()
        self._prefixes.hold({slot: prompt[: lengths[slot]] for slot, prompt in enumerate(prompts)})

    @torch.no_grad()
    def give(self, cache: StaticCache) -> None:
        """Write what its rows have computed to a cache of the caller's, and forget it: that may be of other weights."""
        prompts, self._prompts = self._prompts, {}
        self._prefixes.drop(range(cache.batch_size))
        if self._buffers is None or not prompts:  # interrupted before anything was computed
            return
        written = self._ready.written(prompts)
        count, lengths = len(written), torch.tensor([len(written[slot]) for slot in sorted(written)], device="cpu")
        with self._callers.launching():
            cache.copy_rows(self._ready.cache, count, int(lengths.max()))
            cache.length_b[:count] = lengths.to(cache.device)
            cache.get_seq_length()  # which it keeps for the host

    @torch.no_grad()
    def prefill(self, rows: Mapping[int, Row], least: int | None = None) -> int:
        """Load rows into slots and fill the cache with their prompts; what other rows have is not changed.

        Where the prefill is compiled it stops short of each prompt's last token, which takes the decode step: so there
        are no graphs that prefill and sample. Elsewhere the last chunk samples the first new token.

        A row that is shorter than a chunk is padded with copies of its last prefilled token, at that token's
        position: they write what is there already. So nothing is written past a row's end and no mask is needed.

        Args:
            rows: by slot; the cache has room for them.
            least: number of first tokens below which what slots hold does not count; a default when None.

        Returns:
            How many new tokens that has given each of the rows, 0 or 1.
        """
        samples, held = not self._compiles_prefill, self._ready.cache.batch_size
        assert max(rows) < held, f"slot {max(rows)} of {held}: reserve() comes first"
        with self._callers.launching():
            prompts = {slot: row.prompt for slot, row in rows.items()}
            self._lengths |= {slot: len(prompt) for slot, prompt in prompts.items()}
            self._processed |= {slot for slot, row in rows.items() if changes_logits(row)}
            self._bind()  # compiles before the first token, not after it
            starts = self._reuse(prompts, least or (LEAST_REUSED if self.reuses_prefixes else None))
            self._set_rope()
            starts = self._share(prompts, starts)
            self._ready.load(rows)
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

    def draft_sizes(self, rows: int) -> tuple[int, ...]:
        """How many tokens a row :meth:`step_with` takes at once, drafts and the one after them, besides one.

        On a CPU those that its kernels compute as if each were alone, so that tokens are those that :meth:`step` would
        give; on CUDA they are but for near ties. None where rotary frequencies depend on the length.
        """
        batch, fits = batch_bucket(rows), self._steps.is_one_operation
        may = not self._rope_follows_length
        return tuple(t for t in VERIFY_TOKENS[1:] if may and (self.runs_ahead or fits(self.dtype, batch, t)))

    def step_with(self, draft_bt: torch.Tensor) -> list[list[int]]:
        """Every loaded row that has not ended goes on while its tokens are the drafted ones, and one token further.

        Args:
            draft_bt: int64 ``[b, t]`` on the CPU, of the slots from 0 on, for each the ids that may come next; t + 1 is
                one of :meth:`draft_sizes`, and the cache has room for them.

        Returns:
            The new tokens of each of these rows.
        """
        (count, t), b, buffers, rows = draft_bt.shape, self._batch, self._ready, self._ready.rows(self._batch)
        with self._callers.launching():
            call = self._compiled("draft", b, t + 1)
            buffers.draft(b, t)[:count] = draft_bt.to(self.device)
            before_b1 = rows.step_b[:count, None].clone()
            call()
            at_bt = before_b1 + torch.arange(t + 1, device=self.device)
            new_bt = rows.output_bn[:count].gather(1, at_bt.clamp(max=rows.output_bn.shape[1] - 1))
            found = torch.cat((rows.step_b[:count, None] - before_b1, new_bt), dim=1).tolist()  # one look at the device
        return [new[:moved] for moved, *new in found]

    def allow(self, masks: Mapping[int, torch.Tensor]) -> None:
        """Set what the next tokens of some rows may be, which were loaded with a token mask.

        Args:
            masks: by slot, int32 ``[words]`` on the CPU; see :mod:`fastllama_kernels.sampling.processing`.
        """
        with self._callers.launching():
            self._ready.allow(masks)

    @torch.no_grad()
    def write(self, ids_bt: torch.Tensor, position_bt: torch.Tensor) -> torch.Tensor:
        """Write tokens to slots from 0 on, after what they hold; rows that are loaded stay where they are.

        Args:
            ids_bt, position_bt: int64 ``[b, t]``: tokens and their places, t at most 8; the cache has room for them.

        Returns:
            Logits ``[b, t, v]`` of what follows each of them, in the weights' dtype; the next call overwrites them.
        """
        self._batch = self._batch if self._lengths else batch_bucket(len(ids_bt))
        with self._callers.launching():
            self._ready.set_rope(int(position_bt[:, -1].max()) + 1 if self._rope_follows_length else 1)
            return self._logits(ids_bt, position_bt)

    @torch.no_grad()
    def logits_after(self, sequences: Sequence[torch.Tensor], goes_on: bool = False) -> torch.Tensor:
        """Logits ``[b, v]`` of what follows some sequences, in the weights' dtype; the next call overwrites them.

        What slots hold of them is not computed again, whatever order they come in: beams may change places. Sequences
        that are equal are computed once.

        Args:
            sequences: of slots from 0 on, none of which is loaded: int64 ``[tokens]`` on the CPU, at least one token.
            goes_on: whether this is a further step of a call, in which weights are not edited: all that slots hold
                counts, from one token on.
        """
        buffers = self._ready
        prompts, self._batch = dict(enumerate(sequences)), batch_bucket(len(sequences))
        with self._callers.launching():
            least = 1 if goes_on else LEAST_REUSED if self.reuses_prefixes else None
            starts = self._reuse(prompts, least, thoroughly=not goes_on)
            buffers.keep({slot: int(prompt[0]) for slot, prompt in prompts.items()})
            buffers.set_rope(1)
            starts = self._share(prompts, starts)
            if any(len(prompt) - starts[slot] > 1 for slot, prompt in prompts.items()):
                self._fill(prompts, starts, samples=False)
            last_b1 = torch.tensor([[len(prompt) - 1] for prompt in sequences], device="cpu")
            logits_b1v = self._logits(torch.stack([prompt[-1:] for prompt in sequences]), last_b1)
        self._prefixes.hold(prompts)
        return logits_b1v[:, 0]

    def hold_texts(self, sequences: Sequence[torch.Tensor]) -> None:
        """Note what slots from 0 on hold, after :meth:`write`: int64 ``[tokens]`` on the CPU for each."""
        self._prefixes.hold({slot: tokens for slot, tokens in enumerate(sequences) if len(tokens)})

    def takes(self, cache: Any) -> bool:
        """Whether :meth:`take` does with a cache of the caller's."""
        return (
            isinstance(cache, StaticCache)
            and (cache.dtype, cache.device) == (self.cache_dtype or self.dtype, self.device)
            and not self._rope_follows_length
        )

    def why_no_logits(self, rows: int) -> str | None:
        """Why :meth:`logits_after` does not take that many sequences; None where it does."""
        if self._rope_follows_length:
            return "rotary frequencies depend on the length"
        if self.device.type == "cpu" and not self._steps.is_one_operation(self.dtype, batch_bucket(rows), 1):
            return f"a step of {rows} rows is not one operation of the CPU's kernels"
        return None

    def free(self, slot: int) -> None:
        """Let a slot idle, so that it can be loaded again."""
        with self._callers.launching():
            prompt = {slot: self._prompts.pop(slot)}
            if not self._rope_follows_length:
                self._prefixes.hold(self._ready.written(prompt))
            self._ready.free(slot)
            self._ready.keep({slot: int(prompt[slot][0])})
        del self._lengths[slot]
        self._processed.discard(slot)
        self._bind()

    def end(self, slots: Sequence[int]) -> None:
        """Let rows give their pad ids from now on, as after an EOS id."""
        with self.launching():
            self._ready.end(slots)

    def newest(self) -> Snapshot:
        """A copy of the newest token of every slot up to the last loaded one, ``[b, 1]``."""
        with self._callers.launching():
            return Snapshot(self._ready.rows(self._batch).ids_b1)

    def output(self, first: int, last: int) -> Snapshot:
        """A copy of the new tokens from ``first`` to before ``last`` of the same slots, ``[b, last - first]``."""
        with self._callers.launching():
            return Snapshot(self._ready.rows(self._batch).output_bn[:, first:last])

    # ---- the parts of a call ---------------------------------------------------------------------------------------

    def _logits(self, ids_bt: torch.Tensor, position_bt: torch.Tensor) -> torch.Tensor:
        """Write tokens of the slots from 0 on to the cache; logits ``[b, t, v]`` of what follows each."""
        (count, t), b, buffers = ids_bt.shape, self._batch, self._ready
        bucket = min(size for size in VERIFY_TOKENS if size >= t)
        call, chunk = self._compiled("verify", b, bucket), buffers.chunk(b, bucket)
        buffers.repeat_newest(chunk)
        for buffer_bt, value_bt in ((chunk.ids_bt, ids_bt), (chunk.position_bt, position_bt)):
            buffer_bt[:count, :t] = value_bt.to(self.device)
            buffer_bt[:count, t:] = buffer_bt[:count, t - 1 : t]  # the last token fills up the bucket
        call()
        return buffers.logits(b, bucket)[:count, :t]

    def _bind(self) -> None:
        """Take the decode step of the bucket that holds every loaded slot."""
        if not self._lengths:
            self._batch, self._decode = 1, _nothing_is_loaded
            return
        self._batch = batch_bucket(max(self._lengths) + 1)
        self._decode = self._compiled("decode_processed" if self._processed else "decode", self._batch, 1)

    def _set_rope(self) -> None:
        """Where frequencies depend on the length, the longest loaded row decides, as in transformers."""
        self._ready.set_rope(max(self._lengths.values()))

    def _reuse(self, prompts: Mapping[int, torch.Tensor], least: int | None, thoroughly: bool = True) -> dict[int, int]:
        """How many tokens of each prompt are in its slot, moved there where another slot holds them."""
        found = {} if least is None else self._prefixes.find(prompts, least, thoroughly)
        self._prefixes.drop(prompts)
        moved = {slot: at.slot for slot, at in found.items() if at.slot != slot}
        self._ready.copy(moved, max((found[slot].tokens for slot in moved), default=0))
        return {slot: found[slot].tokens if slot in found else 0 for slot in prompts}

    def _share(self, prompts: Mapping[int, torch.Tensor], starts: dict[int, int]) -> dict[int, int]:
        """Compute prompts that several slots have once, all but their last tokens; where each starts from then on."""
        moved = first_of_equals({slot: prompt for slot, prompt in prompts.items() if len(prompt) - starts[slot] > 1})
        if moved:
            firsts = sorted({*moved.values()})
            self._ready.keep({slot: int(prompts[slot][0]) for slot in firsts})
            self._fill({slot: prompts[slot] for slot in firsts}, starts, samples=False)
            self._ready.copy(moved, max(len(prompts[slot]) for slot in firsts))
        return starts | {slot: len(prompts[slot]) - 1 for slot in (*moved, *moved.values())}

    def _fill(self, prompts: Mapping[int, torch.Tensor], starts: Mapping[int, int], samples: bool) -> None:
        """Compute prompts from where each starts, and their first new tokens; or short of each prompt's last token."""
        if self._compiles_prefill:
            step_of = functools.partial(self._compiled, "prefill", self._batch)
            fill_compiled(step_of, self._ready, self._batch, prompts, starts)
        else:
            fill_eagerly(self._net, self._ready, prompts, starts, samples)


def _nothing_is_loaded() -> None:
    raise RuntimeError("no row is loaded: prefill() comes before step()")
