"""KV caches: the preallocated ``StaticCache`` and the growing ``DynamicCache`` of the eager forward.

Shape suffixes: ``b`` batch, ``t`` new tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.model.memory import promised, zeros

MEMINFO = "/proc/meminfo"


class CacheOverflowError(ValueError):
    """A write past the capacity of a StaticCache; nothing was written."""


class CacheMemoryError(MemoryError):
    """The machine has no room for a KV cache; nothing was changed."""


class StaticCache:
    """Keys and values of every layer in memory that is allocated once and never moves.

    Every row has its own length, ``length_b``; the tokens of row r sit in slots ``0 .. length_b[r] - 1``. Slots at
    or beyond a row's length may hold leftovers, which a mask or the kernel hides.

    Args:
        config: gives layers, KV heads and head_dim.
        batch_size: rows b.
        max_cache_len: slots per row s.
        device: device of the cache.
        dtype: of keys and values, the config's when None; a floating dtype, or int8 for codes of 8 bits with a scale
            for each head of each token (:mod:`fastllama_kernels.attention.codes`).

    Raises:
        CacheMemoryError: there is no room for it on the device.
        ValueError: ``batch_size`` or ``max_cache_len`` is not positive.
    """

    is_linear = (False,)  # what transformers asks: whether layers fold tokens into one state

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_cache_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or max_cache_len < 1:
            raise ValueError(
                f"StaticCache needs a positive batch_size and max_cache_len, got {batch_size} and {max_cache_len}"
            )
        self.batch_size, self.max_cache_len = batch_size, max_cache_len
        self.dtype = dtype or config.torch_dtype
        self.device = torch.device(device)
        columns = ops.kv_columns(config.head_dim, self.dtype)
        shape = (batch_size, config.num_key_value_heads, max_cache_len, columns)
        layers = range(config.num_hidden_layers)
        self._check_room(2 * len(layers) * math.prod(shape) * self.dtype.itemsize)
        # Zeros, not empty: an unwritten slot may be multiplied by a probability of zero, and 0 * NaN is NaN.
        self.key_cache, self.value_cache = ([self._zeros(shape) for _ in layers] for _ in range(2))
        self.length_b = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self._length = 0  # longest row, known to the host without a device sync

    def resize(self, batch_size: int, max_cache_len: int, keep: bool = True) -> None:
        """Move to other memory, layer by layer, so that no more than one layer has it twice.

        Args:
            batch_size, max_cache_len: at least as many as there are.
            keep: whether what the slots hold is moved too; else they are empty.

        Raises:
            CacheMemoryError: there is no room for it on the device.
        """
        b, _, s, _ = self.key_cache[0].shape
        shape = (batch_size, self.key_cache[0].shape[1], max_cache_len, self.key_cache[0].shape[3])
        layer_bytes = math.prod(shape) * self.dtype.itemsize
        self._check_room(2 * len(self.key_cache) * layer_bytes - self.nbytes + layer_bytes)
        is_lazy = self.device.type == "cpu"  # it can all be asked for before anything is changed
        new = iter([self._zeros(shape) for _ in (*self.key_cache, *self.value_cache)] if is_lazy else ())
        for caches in (self.key_cache, self.value_cache):
            for layer, old in enumerate(caches):
                caches[layer] = next(new) if is_lazy else self._zeros(shape)
                if keep:
                    caches[layer][:b, :, :s] = old
                del old
        length_b = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        length_b[:b] = self.length_b if keep else 0
        self.batch_size, self.max_cache_len, self.length_b = batch_size, max_cache_len, length_b
        self._length = self._length if keep else 0

    def copy_rows(self, source: StaticCache, rows: int, tokens: int) -> None:
        """Hold what the first rows of another cache hold, their first tokens; lengths stay."""
        for name in ("key_cache", "value_cache"):
            for to_bksd, from_bksd in zip(getattr(self, name), getattr(source, name), strict=True):
                to_bksd[:rows, :, :tokens] = from_bksd[:rows, :, :tokens]

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            return zeros(shape, self.dtype, self.device)
        except MemoryError as error:
            raise CacheMemoryError(f"the KV cache: {error}; decode fewer rows or fewer tokens at once") from error

    def _check_room(self, nbytes: int) -> None:
        free = free_memory(self.device)
        if nbytes > free:
            raise CacheMemoryError(
                f"the KV cache needs {nbytes / 1e9:.3g} GB more and {free / 1e9:.3g} GB are free: "
                "decode fewer rows or fewer tokens at once"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(cache.nbytes for cache in (*self.key_cache, *self.value_cache))

    def update(
        self,
        key_bktd: torch.Tensor,
        value_bktd: torch.Tensor,
        layer_idx: int,
        cache_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write t new tokens of one layer and return that layer's whole keys and values ``[b, k, s, d]``.

        Codes come back as what they stand for, in the dtype of the new keys: a copy.

        Args:
            key_bktd, value_bktd: the new keys and values; b may be smaller than the cache's batch.
            layer_idx: which layer.
            cache_kwargs: ``{"cache_position": [t] or [b, t] int64}``; the next free slots when absent.

        Raises:
            CacheOverflowError: a position lies outside the cache; nothing was written.
            ValueError: more rows than the cache has.
        """
        rows, _, t, _ = key_bktd.shape
        if rows > self.batch_size:
            raise ValueError(
                f"got {rows} rows for a StaticCache of batch_size {self.batch_size}; make the cache larger"
            )
        position_t = (cache_kwargs or {}).get("cache_position")
        if position_t is None:
            # All layers write the same step; the length moves on when the last one has written.
            position_t = torch.arange(self._length, self._length + t, device=self.device)
        if not torch.compiler.is_compiling():
            self.check_capacity(position_t)
        keys, values = self.key_cache[layer_idx], self.value_cache[layer_idx]
        position_bt = position_t.expand(rows, t)
        row_b1 = torch.arange(rows, device=self.device)[:, None]
        for cache_bksd, new_bktd in ((keys, key_bktd), (values, value_bktd)):
            new_btkd = new_bktd.transpose(1, 2)
            new_btkd = ops.kv_encoded(new_btkd) if self.dtype == torch.int8 else new_btkd.to(self.dtype)
            cache_bksd[row_b1, :, position_bt] = new_btkd
        if layer_idx == len(self.key_cache) - 1:
            self.length_b[:rows] = position_bt[:, -1] + 1
            if not torch.compiler.is_compiling():
                self._length = int(self.length_b.max())
        return ops.kv_decoded(keys[:rows], key_bktd.dtype), ops.kv_decoded(values[:rows], value_bktd.dtype)

    def check_capacity(self, position_t: torch.Tensor) -> None:
        """Raise CacheOverflowError unless every position is a slot of this cache."""
        low, high = (int(x) for x in position_t.aminmax()) if position_t.numel() else (0, 0)
        if low < 0 or high >= self.max_cache_len:
            raise CacheOverflowError(
                f"cache position {high if high >= self.max_cache_len else low} does not fit a StaticCache of "
                f"{self.max_cache_len} slots; allocate it with a larger max_cache_len or crop() it"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in the longest row; ``length_b`` has the length of each."""
        self._length = int(self.length_b.max())
        return self._length

    def get_max_length(self) -> int:
        """Number of slots per row."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # the name transformers uses today

    def crop(self, max_length: int) -> None:
        """Drop each row's tokens from ``max_length`` on; a negative one counts from the end of the longest row."""
        if max_length < 0:
            max_length = max(self.get_seq_length() + max_length, 0)
        self.length_b.clamp_(max=max_length)
        self._length = min(self._length, max_length)

    def reset(self) -> None:
        """Drop every token and clear the slots, in place."""
        for cache in (*self.key_cache, *self.value_cache):
            cache.zero_()
        self.length_b.zero_()
        self._length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each row r by row ``beam_idx[r]``, in place, in every layer.

        Raises:
            ValueError: ``beam_idx`` does not name one existing row for each row.
        """
        if beam_idx.shape != (self.batch_size,):
            raise ValueError(f"beam_idx must have shape ({self.batch_size},), got {tuple(beam_idx.shape)}")
        if int(beam_idx.min()) < 0 or int(beam_idx.max()) >= self.batch_size:
            raise ValueError(f"beam_idx must name rows 0 to {self.batch_size - 1}, got {beam_idx.tolist()}")
        beam_idx = beam_idx.to(self.device)
        for cache in (*self.key_cache, *self.value_cache):
            cache.copy_(cache.index_select(0, beam_idx))
        self.length_b.copy_(self.length_b.index_select(0, beam_idx))
        self._length = int(self.length_b.max())


class DynamicCache:
    """Keys and values that grow by concatenation: the cache of an eager forward that was given none."""

    is_linear = (False,)  # as in StaticCache

    def __init__(self) -> None:
        self.key_cache: list[torch.Tensor] = []
        self.value_cache: list[torch.Tensor] = []

    def update(
        self,
        key_bktd: torch.Tensor,
        value_bktd: torch.Tensor,
        layer_idx: int,
        cache_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append t tokens to one layer and return all of its keys and values ``[b, k, s, d]``."""
        if layer_idx == len(self.key_cache):
            self.key_cache.append(key_bktd)
            self.value_cache.append(value_bktd)
        else:
            self.key_cache[layer_idx] = torch.cat((self.key_cache[layer_idx], key_bktd), dim=2)
            self.value_cache[layer_idx] = torch.cat((self.value_cache[layer_idx], value_bktd), dim=2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return self.key_cache[layer_idx].shape[2] if self.key_cache else 0

    def get_max_length(self) -> None:
        """None: a growing cache has no capacity."""
        return


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a call: transformers 5.24 has renamed ``past_key_values`` to ``cache``.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("got past_key_values and cache, which are two names for the cache; give one of them")
    return past_key_values if cache is None else cache


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes still to be had on a device, without what caches will take; half of all memory where nobody says."""
    if torch.device(device).type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        with open(MEMINFO) as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return max(0, int(available.split()[1]) * 1024 - promised())
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def target_length(cache: Any, seen: int, cache_position: torch.Tensor) -> int:
    """Number of key slots that a mask spans: the capacity of a static cache, else the tokens ``seen`` with this step's.

    Raises:
        CacheOverflowError: the step does not fit the static cache.
    """
    if not isinstance(cache, StaticCache):
        return seen
    capacity = cache.get_max_length()
    if torch.compiler.is_compiling():
        return capacity
    last = int(cache_position[..., -1].max())
    if last >= capacity:
        raise CacheOverflowError(
            f"this step ends at position {last} but the static cache has {capacity} slots; "
            "allocate it with a larger max_cache_len"
        )
    return capacity
