"""Keys and values in 8 bits: a cache of int8, in whose last dimension each head's codes are followed by their scale.

    codes[..., :d] = round(x / scale)        scale = max |x| / 127 over the head's d numbers, float32
    codes[..., d:] = the bytes of scale      so a head takes d + 4 bytes

Shape suffixes: leading dimensions ``...``, ``d`` head dim.
"""

from __future__ import annotations

import torch

SCALE_BYTES = 4


def columns(head_dim: int, dtype: torch.dtype) -> int:
    """The last dimension of a cache in this dtype."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def encoded(x: torch.Tensor) -> torch.Tensor:
    """Heads ``[..., d]`` as int8 ``[..., d + 4]``."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    codes = (x / torch.where(scale > 0, scale, 1.0)).round().nan_to_num().to(torch.int8)
    return torch.cat((codes, scale.contiguous().view(torch.int8)), dim=-1)


def decoded(cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Heads ``[..., d]`` of a cache as numbers; of a cache that holds numbers, itself."""
    if cache.dtype != torch.int8:
        return cache
    codes, scale = cache[..., :-SCALE_BYTES], cache[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes.float() * scale).to(dtype)
