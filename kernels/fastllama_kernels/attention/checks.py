"""What the attention kernels' arguments must be: sizes that fit each other, tables and positions for all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastllama_kernels.attention.op import MAX_HEAD_DIM, MAX_TOKENS, takes
from fastllama_kernels.common.checks import check, check_dtype


class Sizes(NamedTuple):
    """The sizes of an op's arguments, once they are known to fit each other."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int


def check_packed(qkv_btn: torch.Tensor, k_cache_bksd: torch.Tensor, v_cache_bksd: torch.Tensor) -> Sizes:
    """The sizes; raises ValueError where they do not fit each other."""
    if qkv_btn.dim() != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv_btn.shape)}, expected (batch, tokens, (heads + 2 kv_heads) head_dim)"
        )
    check("key_cache", k_cache_bksd, qkv_btn, (None, None, None, None))
    check("value_cache", v_cache_bksd, qkv_btn, k_cache_bksd.shape)
    (batch, tokens, packed), (rows, kv_heads, slots, head_dim) = qkv_btn.shape, k_cache_bksd.shape
    heads = packed // head_dim - 2 * kv_heads
    if heads < 1 or packed % head_dim or heads % kv_heads:
        raise ValueError(
            f"qkv has {packed} features, expected (heads + 2·{kv_heads})·{head_dim} with heads a multiple of {kv_heads}"
        )
    if batch > rows:
        raise ValueError(f"qkv has {batch} rows, the cache holds {rows}")
    return Sizes(batch, tokens, heads, kv_heads, slots, head_dim)


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for heads of a size that the kernels do not take."""
    if not takes(head_dim):
        raise ValueError(f"head_dim is {head_dim}, the kernel takes multiples of 8 up to {MAX_HEAD_DIM}")


def check_tables(
    x: torch.Tensor, cos_sd: torch.Tensor, sin_sd: torch.Tensor, position_bt: torch.Tensor, sizes: Sizes
) -> None:
    """Raise ValueError for rotary tables or positions that the kernel would misread."""
    check_head_dim(sizes.head_dim)
    check("cos", cos_sd, x, (None, sizes.head_dim), torch.float32)
    check("sin", sin_sd, x, cos_sd.shape, torch.float32)
    if cos_sd.shape[0] < sizes.slots:
        raise ValueError(f"cos has {cos_sd.shape[0]} rows, the cache {sizes.slots} slots; there must be a row for each")
    check("positions", position_bt, x, (sizes.batch, sizes.tokens), torch.int64)


def check_arguments(
    q: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
) -> Sizes:
    """The sizes; raises ValueError for what the kernel would misread."""
    check_dtype("q", q)
    check("q", q, q)
    if tables is None:
        sizes = _check_plain(q, k_cache_bksd, v_cache_bksd)
        check("positions", position_bt, q, (sizes.batch, sizes.tokens), torch.int64)
    else:
        sizes = check_packed(q, k_cache_bksd, v_cache_bksd)
        check_tables(q, *tables, position_bt, sizes)
    if not 1 <= sizes.tokens <= MAX_TOKENS:
        raise ValueError(f"there are {sizes.tokens} query tokens a row, the kernel takes 1 to {MAX_TOKENS}")
    if sizes.tokens > sizes.slots:
        raise ValueError(f"there are {sizes.tokens} query tokens a row, the cache has {sizes.slots} slots")
    if start_b is not None:
        check("start", start_b, q, (sizes.batch,), torch.int64)
    return sizes


def _check_plain(q_bthd: torch.Tensor, k_cache_bksd: torch.Tensor, v_cache_bksd: torch.Tensor) -> Sizes:
    """The sizes; raises ValueError where they do not fit each other."""
    check("key_cache", k_cache_bksd, q_bthd, (None, None, None, None))
    check("value_cache", v_cache_bksd, q_bthd, k_cache_bksd.shape)
    rows, kv_heads, slots, head_dim = k_cache_bksd.shape
    if q_bthd.dim() != 4 or q_bthd.shape[3] != head_dim or q_bthd.shape[2] % kv_heads or q_bthd.shape[2] < 1:
        raise ValueError(
            f"q has shape {tuple(q_bthd.shape)}, expected (batch, tokens, a multiple of {kv_heads} heads, {head_dim})"
        )
    check_head_dim(head_dim)
    batch, tokens, heads, _ = q_bthd.shape
    if batch > rows:
        raise ValueError(f"q has {batch} rows, the cache holds {rows}")
    return Sizes(batch, tokens, heads, kv_heads, slots, head_dim)
