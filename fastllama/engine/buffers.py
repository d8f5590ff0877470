"""The memory of an engine: every tensor that changes from token to token, allocated once.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``d`` head dim, ``n`` output tokens, ``e`` EOS ids,
``p`` counters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastllama.config import LlamaConfig
from fastllama.model.cache import StaticCache
from fastllama.model.rope import rotary_cos_sin, static_length
from fastllama.sampling import SamplingParams

PREFILL_CHUNKS = (8, 32, 128, 512)
MAX_EOS_IDS = 16


class Rows(NamedTuple):
    """The persistent buffers of a decode step, cut to its batch."""

    ids_b1: torch.Tensor
    position_b1: torch.Tensor
    finished_b: torch.Tensor
    output_bn: torch.Tensor
    step_1: torch.Tensor
    params: SamplingParams
    eos_e: torch.Tensor
    pad_1: torch.Tensor


class Memory(NamedTuple):
    """What both steps read and write besides their rows: rotary tables, KV caches, and what kernels count with."""

    cos_sd: torch.Tensor
    sin_sd: torch.Tensor
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    arrived_p: torch.Tensor


class State:
    """Every buffer of an engine, allocated once for ``batch_size`` rows of ``max_cache_len`` slots."""

    def __init__(
        self, config: LlamaConfig, batch_size: int, max_cache_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        b, s = batch_size, max_cache_len
        self.config = config
        self.cache = StaticCache(config, b, s, device, dtype)
        self.rope_key: int | None = None
        self._rope_limit = static_length(config)

        def buffer(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return _static(torch.zeros(shape, dtype=dtype, device=device))

        table = (s, config.head_dim)
        self.memory = Memory(
            buffer(*table, dtype=torch.float32),
            buffer(*table, dtype=torch.float32),
            [_static(x) for x in self.cache.key_cache],
            [_static(x) for x in self.cache.value_cache],
            buffer(b * config.num_attention_heads, dtype=torch.int32),
        )
        params = SamplingParams(
            temperature=buffer(b, dtype=torch.float32),
            top_k=buffer(b),
            top_p=buffer(b, dtype=torch.float32),
            min_p=buffer(b, dtype=torch.float32),
            seed=buffer(b),
        )
        self._all_rows = Rows(
            ids_b1=buffer(b, 1),
            position_b1=buffer(b, 1),
            finished_b=buffer(b, dtype=torch.bool),
            output_bn=buffer(b, s),
            step_1=buffer(1),
            params=params,
            eos_e=buffer(MAX_EOS_IDS),
            pad_1=buffer(1),
        )
        self._rows: dict[int, Rows] = {}
        self._all_chunks = {t: (buffer(b, t), buffer(b, t)) for t in PREFILL_CHUNKS}
        self._chunks: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(self, b: int) -> Rows:
        """The first b rows of every buffer: the same views each time."""
        if b not in self._rows:
            whole = self._all_rows
            cut = {name: _static(getattr(whole, name)[:b]) for name in ("ids_b1", "position_b1", "finished_b")}
            params = SamplingParams(*(_static(x[:b]) for x in whole.params))
            self._rows[b] = whole._replace(**cut, output_bn=_static(whole.output_bn[:b]), params=params)
        return self._rows[b]

    def chunk(self, b: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and positions ``[b, t]`` of a prefill chunk: the same views each time."""
        if (b, t) not in self._chunks:
            ids_bt, position_bt = self._all_chunks[t]
            self._chunks[b, t] = _static(ids_bt[:b]), _static(position_bt[:b])
        return self._chunks[b, t]

    def set_rope(self, seq_len: int) -> None:
        """Fill the rotary tables as they are for a sequence of ``seq_len`` tokens; most rope types have but one."""
        key = 0  # one set of frequencies for all lengths up to the limit
        if self._rope_limit is not None and seq_len > self._rope_limit:
            key = seq_len if self.config.rope.rope_type == "dynamic" else 1
        if key == self.rope_key:
            return
        slots_1s = torch.arange(self.cache.max_cache_len, device=self.memory.cos_sd.device)[None]
        cos_1sd, sin_1sd = rotary_cos_sin(self.config, slots_1s, seq_len)
        self.memory.cos_sd.copy_(cos_1sd[0])
        self.memory.sin_sd.copy_(sin_1sd[0])
        self.rope_key = key


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """Tell CUDA graphs that this tensor never moves, so that replays read it in place instead of copying it in."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)
    return tensor
