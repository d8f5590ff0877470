"""What a step reads and writes, as the tensors that it is called on: the same ones each time.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``d`` head dim, ``n`` output tokens, ``e`` EOS ids,
``p`` counters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastllama import ops


class Rows(NamedTuple):
    """The persistent buffers of a decode step, cut to some slots.

    ids_b1: the newest token of each row, not in the cache yet.
    position_b1: where that token goes in the cache.
    finished_b: whether the row has ended, or idles.
    step_b: how many new tokens the row has.
    output_bn: these tokens.
    limit_b, eos_be, pad_b: when the row ends, and what it gives then; unused EOS entries are -1.
    processing: what changes its logits.
    params: how it samples.
    """

    ids_b1: torch.Tensor
    position_b1: torch.Tensor
    finished_b: torch.Tensor
    step_b: torch.Tensor
    output_bn: torch.Tensor
    limit_b: torch.Tensor
    eos_be: torch.Tensor
    pad_b: torch.Tensor
    processing: ops.Processing
    params: ops.SamplingParams

    def cut(self, first: int, last: int) -> Rows:
        """Views of the slots from ``first`` to before ``last``."""
        plain, processing, params = ([static(x[first:last]) for x in part] for part in self.parts)
        return Rows(*plain, processing=ops.Processing(*processing), params=ops.SamplingParams(*params))

    @property
    def parts(self) -> tuple[tuple[torch.Tensor, ...], ops.Processing, ops.SamplingParams]:
        """The tensors of their own, and the two groups."""
        return self[:-2], self.processing, self.params

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, one after the other."""
        return [x for part in self.parts for x in part]


class Memory(NamedTuple):
    """What a step reads and writes besides its rows: rotary tables, KV caches, and what CUDA's kernels count with."""

    cos_sd: torch.Tensor
    sin_sd: torch.Tensor
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    arrived_p: torch.Tensor

    def cut(self, first: int, last: int) -> Memory:
        """The caches of the slots from ``first`` to before ``last``."""
        k_caches, v_caches = ([cache[first:last] for cache in caches] for caches in (self.k_caches, self.v_caches))
        return self._replace(k_caches=k_caches, v_caches=v_caches)


class Chunk(NamedTuple):
    """The persistent input of a prefill or verify step."""

    ids_bt: torch.Tensor
    position_bt: torch.Tensor


def static(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as one that never moves, so that replays of CUDA graphs read it in place and do not copy it."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)
    return tensor
