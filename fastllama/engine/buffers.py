"""The memory of an engine: every tensor that changes from token to token, allocated once, row by row.

A slot is one row of the batch. It is loaded with a request, decodes, ends, and can be loaded again while others decode.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``d`` head dim, ``n`` output tokens, ``e`` EOS ids,
``p`` counters, ``v`` vocabulary, ``r`` rows that are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.engine.processing import changes_logits, load_processing, new_processing
from fastllama.engine.row import MAX_EOS_IDS, Row, Sampling, check_sampling
from fastllama.engine.state import Chunk, Memory, Rows, static
from fastllama.model.cache import StaticCache
from fastllama.model.rope import rotary_cos_sin, static_length


class Buffers:
    """Every buffer of an engine, allocated once.

    Args:
        config: of the network.
        batch_size: slots.
        max_cache_len: tokens a slot can hold.
        chunk_sizes: tokens a row of the prefill and verify steps.
        device, dtype: of the network's weights.
        cache_dtype: of keys and values; the weights' when None.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_cache_len: int,
        chunk_sizes: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._chunk_sizes = tuple(chunk_sizes)
        self._rope_limit = static_length(config)
        self._rope_key: int | None = None
        self._rope_len = 1
        self.cache = StaticCache(config, batch_size, max_cache_len, device, cache_dtype or dtype)
        self._allocate()
        self.idle()
        self.set_rope(1)

    def _allocate(self) -> None:
        """Make everything that the cache's size decides about, but for the cache."""
        b, s = self.cache.batch_size, self.cache.max_cache_len
        for layer_bksd in (*self.cache.key_cache, *self.cache.value_cache):
            static(layer_bksd)
        self.memory = Memory(
            self._new(s, self.config.head_dim, dtype=torch.float32),
            self._new(s, self.config.head_dim, dtype=torch.float32),
            self.cache.key_cache,
            self.cache.value_cache,
            self._new(b * self.config.num_attention_heads, dtype=torch.int32),
        )
        numbers = ("temperature", "top_p", "min_p", "typical_p")
        params = {name: self._new(b, dtype=torch.float32) for name in numbers}
        self._slots = Rows(
            ids_b1=self._new(b, 1),
            position_b1=self._new(b, 1),
            finished_b=self._new(b, dtype=torch.bool),
            step_b=self._new(b),
            output_bn=self._new(b, s),
            limit_b=self._new(b),
            eos_be=self._new(b, MAX_EOS_IDS),
            pad_b=self._new(b),
            processing=new_processing(self._new, b, s, self.config.vocab_size),
            params=ops.SamplingParams(**params, top_k=self._new(b), seed=self._new(b)),
        )
        self._processed: set[int] = set()  # slots whose processing changes something
        self._rows: dict[int, Rows] = {}
        self._whole_chunks = {t: Chunk(self._new(b, t), self._new(b, t)) for t in self._chunk_sizes}
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._logits: dict[tuple[int, int], torch.Tensor] = {}
        self._drafts: dict[tuple[int, int], torch.Tensor] = {}
        self.bound: dict[Any, Callable[[], None]] = {}  # steps on these tensors that are one operation

    @torch.no_grad()
    def resize(self, batch_size: int, max_cache_len: int, keep: bool) -> None:
        """Move to more memory: other tensors, which compiled steps have to be called on from then on.

        Args:
            batch_size, max_cache_len: at least as many as there are.
            keep: whether the slots keep what they hold; else they idle.

        Raises:
            CacheMemoryError: there is no room for it; nothing was changed.
        """
        old, processed = self._slots, self._processed
        self.cache.resize(batch_size, max_cache_len, keep)
        self._allocate()
        self.idle()
        if keep:
            for new, kept in zip(self._slots.tensors, old.tensors, strict=True):
                new[tuple(map(slice, kept.shape))] = kept
            self._processed = processed
        self._rope_key = None
        self.set_rope(self._rope_len)

    def _new(self, *shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        with torch.inference_mode(False):  # or they could not be updated outside of it
            return static(torch.zeros(shape, dtype=dtype, device=self.device))

    # ---- views: the same ones each time, so that a step is always called on the tensors it was compiled for --------

    def mark_dynamic(self, b: int) -> None:
        """Let what is compiled next for b rows run on any number of cache slots."""
        rows = self.rows(b)
        dims = [(self.memory.cos_sd, 0), (self.memory.sin_sd, 0), (rows.output_bn, 1), (rows.processing.tokens, 1)]
        dims += [(cache_bksd, 2) for cache_bksd in (*self.memory.k_caches, *self.memory.v_caches)]
        for tensor, dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)

    def rows(self, b: int) -> Rows:
        """The first b slots."""
        if b not in self._rows:
            self._rows[b] = self._slots.cut(0, b)
        return self._rows[b]

    def slots(self, first: int, last: int) -> Rows:
        """The slots from ``first`` to before ``last``, as views of their own."""
        return self._slots.cut(first, last)

    def chunk(self, b: int, t: int) -> Chunk:
        """Ids and positions of t tokens of the first b slots."""
        if (b, t) not in self._chunks:
            self._chunks[b, t] = Chunk(*(static(x[:b]) for x in self._whole_chunks[t]))
        return self._chunks[b, t]

    def draft(self, b: int, t: int) -> torch.Tensor:
        """The drafts ``[b, t]`` of a draft step."""
        if (b, t) not in self._drafts:
            self._drafts[b, t] = self._new(b, t)
        return self._drafts[b, t]

    def logits(self, b: int, t: int) -> torch.Tensor:
        """Logits ``[b, t, v]`` of a verify step, allocated when they are first asked for."""
        if (b, t) not in self._logits:
            self._logits[b, t] = self._new(b, t, self.config.vocab_size, dtype=self.dtype)
        return self._logits[b, t]

    # ---- what they hold --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def idle(self) -> None:
        """Let every slot idle in its first cache slot, whatever was going on, and no kernel have begun to count."""
        self._slots.finished_b.fill_(True)
        self._slots.position_b1.zero_()
        self.memory.arrived_p.zero_()

    @torch.no_grad()
    def keep(self, first_tokens: Mapping[int, int]) -> None:
        """Let idle slots keep what they hold, though every step writes the keys and values of a token there.

        Args:
            first_tokens: of each slot, the first token that it holds.
        """
        if first_tokens:
            slots, tokens = (torch.tensor(list(x), device=self.device) for x in (first_tokens, first_tokens.values()))
            self._slots.ids_b1[slots, 0] = tokens
            self._slots.pad_b[slots] = tokens

    @torch.no_grad()
    def load(self, rows: Mapping[int, Row]) -> None:
        """Set everything that belongs to these slots, each to begin with the last token of its prompt."""
        at_r, host = torch.tensor(list(rows), device=self.device), "cpu"  # whatever torch's default device is
        wanted = list(rows.values())
        check_sampling([row.sampling for row in wanted], self.device)
        eos_re = torch.full((len(rows), MAX_EOS_IDS), -1, device=host)
        for eos_e, row in zip(eos_re, wanted, strict=True):
            eos_ids = row.eos_token_ids[:MAX_EOS_IDS]
            eos_e[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.long, device=host)
        values = {
            "ids_b1": torch.stack([row.prompt[-1:] for row in wanted]),
            "position_b1": torch.tensor([[len(row.prompt) - 1] for row in wanted], device=host),
            "finished_b": torch.zeros(len(rows), dtype=torch.bool, device=host),
            "step_b": torch.zeros(len(rows), dtype=torch.long, device=host),
            "limit_b": torch.tensor([row.max_new_tokens for row in wanted], device=host),
            "eos_be": eos_re,
            # The device embeds it; whoever reads a row's tokens puts the pad id itself there.
            "pad_b": torch.tensor([min(row.pad_token_id, self.config.vocab_size - 1) for row in wanted], device=host),
        }
        for name, value in values.items():
            getattr(self._slots, name).index_copy_(0, at_r, value.to(self.device))
        for name in Sampling._fields:
            buffer_b = getattr(self._slots.params, name)
            settings = torch.tensor([getattr(row.sampling, name) for row in wanted], dtype=buffer_b.dtype, device=host)
            buffer_b.index_copy_(0, at_r, settings.to(self.device))
        for slot, row in rows.items():
            if changes_logits(row):
                self._processed.add(slot)
            if slot in self._processed:  # this row or the one before it
                load_processing(self._slots.processing, slot, row)
            if not changes_logits(row):
                self._processed.discard(slot)

    @torch.no_grad()
    def allow(self, masks: Mapping[int, torch.Tensor]) -> None:
        """Set the token masks of slots, int32 ``[words]`` on the CPU."""
        for slot, allowed in masks.items():
            self._slots.processing.allowed[slot] = allowed.to(self.device)

    @torch.no_grad()
    def written(self, prompts: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The tokens of some slots whose keys and values are in the cache, int64 ``[tokens]`` on the CPU.

        Args:
            prompts: of the slots, which have been prefilled.
        """
        slots = self._slots
        steps, positions = slots.step_b.tolist(), slots.position_b1[:, 0].tolist()
        output_bn = slots.output_bn[: max(prompts) + 1, : max(steps[slot] for slot in prompts)].cpu()
        return {
            slot: torch.cat((prompt, output_bn[slot, : steps[slot]]))[: positions[slot]]
            for slot, prompt in prompts.items()
        }

    @torch.no_grad()
    def copy(self, moved: Mapping[int, int], tokens: int) -> None:
        """Let slots hold the first tokens of others.

        Args:
            moved: for each slot the one it takes them from.
            tokens: how many.
        """
        if not moved:
            return
        to, taken = list(moved), list(moved.values())
        for cache_bksd in (*self.memory.k_caches, *self.memory.v_caches):
            cache_bksd[to, :, :tokens] = cache_bksd[taken, :, :tokens]

    @torch.no_grad()
    def end(self, slots: Sequence[int]) -> None:
        """Let rows be where they are."""
        self._slots.finished_b[torch.tensor(slots, device=self.device)] = True

    @torch.no_grad()
    def free(self, slot: int) -> None:
        """Let a slot idle."""
        self._slots.finished_b[slot] = True
        self._slots.position_b1[slot] = 0

    @torch.no_grad()
    def repeat_newest(self, chunk: Chunk) -> None:
        """Fill a chunk with each row's newest token, over and over, at its place.

        A step over such a chunk writes to the cache what the row's next step writes there anyway.
        """
        b = len(chunk.ids_bt)
        chunk.ids_bt.copy_(self._slots.ids_b1[:b].expand_as(chunk.ids_bt))
        chunk.position_bt.copy_(self._slots.position_b1[:b].expand_as(chunk.position_bt))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Steps run inside leave every row as it was, so that steps can be compiled while rows decode."""
        kept = [x.clone() for x in (self._slots.ids_b1, self._slots.finished_b)]
        try:
            self._slots.finished_b.fill_(True)
            yield
        finally:
            for buffer, value in zip((self._slots.ids_b1, self._slots.finished_b), kept, strict=True):
                buffer.copy_(value)

    @contextmanager
    def trial(self, b: int, places: int) -> Iterator[Rows]:
        """Steps run inside may do anything with the first b rows and the first ``places`` slots of their caches.

        They begin with rows that ask for nothing; afterwards all is as it was.
        """
        rows, caches = self.rows(b), (*self.memory.k_caches, *self.memory.v_caches)
        kept = [x.clone() for x in rows.tensors]
        held = [cache_bksd[:b, :, :places].clone() for cache_bksd in caches]
        try:
            neutral = new_processing(self._new, b, self.cache.max_cache_len, self.config.vocab_size)
            for buffer, value in zip(rows.processing, neutral, strict=True):
                buffer.copy_(value)
            for buffer, number in ((rows.finished_b, 0), (rows.step_b, 0), (rows.eos_be, -1)):
                buffer.fill_(number)
            for name, number in Sampling()._asdict().items():
                getattr(rows.params, name).fill_(number)
            yield rows
        finally:
            for buffer, value in zip(rows.tensors, kept, strict=True):
                buffer.copy_(value)
            for cache_bksd, value in zip(caches, held, strict=True):
                cache_bksd[:b, :, :places] = value

    def held(self, b: int, places: slice) -> torch.Tensor:
        """What all layers hold of the first b rows at some places, float32 ``[layers, b, k, n, d]``: a copy."""
        caches = (*self.memory.k_caches, *self.memory.v_caches)
        return torch.stack([ops.kv_decoded(cache_bksd[:b, :, places], torch.float32).float() for cache_bksd in caches])

    def wipe(self, b: int, places: slice) -> None:
        """Let them hold zeros."""
        for cache_bksd in (*self.memory.k_caches, *self.memory.v_caches):
            cache_bksd[:b, :, places] = 0

    @torch.no_grad()
    def set_rope(self, seq_len: int) -> None:
        """Fill the rotary tables as they are for a sequence of ``seq_len`` tokens; most rope types have but one."""
        key = 0  # one set of frequencies for all lengths up to the limit
        if self._rope_limit is not None and seq_len > self._rope_limit:
            key = seq_len if self.config.rope.rope_type == "dynamic" else 1
        if key == self._rope_key:
            return
        slots_1s = torch.arange(self.cache.max_cache_len, device=self.device)[None]
        cos_1sd, sin_1sd = rotary_cos_sin(self.config, slots_1s, seq_len)
        self._rope_key = None  # interrupted below, the tables are of no length
        self.memory.cos_sd.copy_(cos_1sd[0])
        self.memory.sin_sd.copy_(sin_1sd[0])
        self._rope_key, self._rope_len = key, seq_len


class Snapshot:
    """A copy of some tokens as they are when the steps launched so far are done; on CUDA made without waiting."""

    def __init__(self, tokens_bn: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens_bn.is_cuda:
            self._tokens_bn = torch.empty(tokens_bn.shape, dtype=torch.long, pin_memory=True, device="cpu")
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
