"""Rotary positions in Triton: rotate heads, alone or while writing keys and values to a static cache.

    rotate(x, p) = x · cos[p] + rotate_half(x) · sin[p]        rotate_half(x) = (-x₂, x₁), halves of the head dim

    rotary(x)        every head of every token at its position
    rotary_write     splits packed q, k, v; returns the rotated queries, writes rotated keys and values to their slots

in float32, rounded once (arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints).

Bytes moved: every head once in and once out. One program for each head of each token. A decode step of few tokens has
no use for it: there the rotation is part of the attention (:mod:`fastllama_kernels.attention.triton`).

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``n`` = (h + 2k)·d packed features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastllama_kernels.attention.op import MAX_HEAD_DIM, rotate, rotate_and_write
from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, next_power_of_2

_TABLES = "Tensor cos, Tensor sin, Tensor positions"
torch.library.define("fastllama::rotary", f"(Tensor x, {_TABLES}) -> Tensor")
torch.library.define(
    "fastllama::rotary_write", f"(Tensor qkv, {_TABLES}, Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor"
)


def rotary_ref(
    x_bthd: torch.Tensor, cos_sd: torch.Tensor, sin_sd: torch.Tensor, position_bt: torch.Tensor
) -> torch.Tensor:
    """``rotary`` in torch operators."""
    return rotate(x_bthd, cos_sd[position_bt][:, :, None], sin_sd[position_bt][:, :, None])


def rotary_write_ref(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """``rotary_write`` in torch operators."""
    args = (qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    return rotate_and_write(*args).transpose(1, 2).contiguous()


@triton.jit
def rotated(x_ptr, cos_ptr, sin_ptr, at_r, position_r, table_rows, col_d, mask_rd, HEAD_DIM: tl.constexpr):
    """Heads ``[r, d]`` that start at ``x_ptr + at_r``, each rotated to its position, in float32.

    Positions outside the tables, whose rows are ``table_rows`` at least, are rotated like the nearest inside.
    """
    is_first_d = col_d < HEAD_DIM // 2
    partner_d = tl.where(is_first_d, col_d + HEAD_DIM // 2, col_d - HEAD_DIM // 2)
    x_rd = tl.load(x_ptr + at_r[:, None] + col_d[None, :], mask=mask_rd, other=0.0).to(tl.float32)
    partner_rd = tl.load(x_ptr + at_r[:, None] + partner_d[None, :], mask=mask_rd, other=0.0).to(tl.float32)
    inside_r = tl.maximum(tl.minimum(position_r, table_rows - 1), 0)
    table_rd = inside_r[:, None] * HEAD_DIM + col_d[None, :]
    cos_rd = tl.load(cos_ptr + table_rd, mask=mask_rd, other=0.0)
    sin_rd = tl.load(sin_ptr + table_rd, mask=mask_rd, other=0.0)
    return x_rd * cos_rd + partner_rd * tl.where(is_first_d[None, :], -sin_rd, sin_rd)


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,
    key_ptr,
    value_ptr,
    tokens,
    slots,
    table_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col_d = tl.arange(0, BLOCK_D)
    mask_d = col_d < HEAD_DIM
    one_1 = tl.arange(0, 1)
    pdl.wait_for_previous(PDL)
    position = tl.load(position_ptr + token)
    at_1 = (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + one_1
    mask_1d = mask_d[None, :]
    head_1d = head + tl.zeros((1, BLOCK_D), dtype=tl.int32)  # the interpreter cannot mix masks and scalars
    y_1d = rotated(x_ptr, cos_ptr, sin_ptr, at_1, position + one_1, table_rows, col_d, mask_1d, HEAD_DIM)
    y_1d = y_1d.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * HEADS + head) * HEAD_DIM + col_d[None, :], y_1d, mask=mask_1d & (head_1d < HEADS))
    if KV_HEADS > 0:
        kv_head = (head - HEADS) % KV_HEADS
        slot_1d = ((token // tokens * KV_HEADS + kv_head) * slots + position) * HEAD_DIM + col_d[None, :]
        position_1d = position + tl.zeros((1, BLOCK_D), dtype=tl.int64)
        mask_1d = mask_1d & (position_1d >= 0) & (position_1d < slots)
        is_key_1d = (head_1d >= HEADS) & (head_1d < HEADS + KV_HEADS)
        is_value_1d = head_1d >= HEADS + KV_HEADS
        tl.store(key_ptr + slot_1d, y_1d, mask=mask_1d & is_key_1d)
        value_1d = tl.load(x_ptr + at_1[:, None] + col_d[None, :], mask=mask_1d & is_value_1d, other=0.0)
        tl.store(value_ptr + slot_1d, value_1d, mask=mask_1d & is_value_1d)


def launch(
    x: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor | None = None,
    v_cache_bksd: torch.Tensor | None = None,
    chip: tuple[int, int] | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the rotated heads ``[b, t, h, d]`` it fills.

    Args:
        x: packed projections ``[b, t, n]`` where there are caches, else heads ``[b, t, h, d]``.
        cos_sd, sin_sd: float32 tables, at least as long as the cache.
        position_bt: int64 position of each token. One outside the cache is not written.
        k_cache_bksd, v_cache_bksd: mutated; they may have more rows than x. Or None.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    check_dtype("x", x)
    check("x", x, x)
    if k_cache_bksd is None or v_cache_bksd is None:
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, tokens, heads, head_dim)")
        batch, tokens, heads, head_dim = x.shape
        sizes = Sizes(batch, tokens, heads, 0, 0, head_dim)
    else:
        sizes = check_packed(x, k_cache_bksd, v_cache_bksd)
    check_tables(x, cos_sd, sin_sd, position_bt, sizes)
    batch, tokens, heads, kv_heads, slots, head_dim = sizes
    out = x.new_empty((batch, tokens, heads, head_dim))
    with_pdl = pdl.used(x.device, chip)
    arguments = {
        "x_ptr": x, "cos_ptr": cos_sd, "sin_ptr": sin_sd, "position_ptr": position_bt, "out_ptr": out,
        "key_ptr": k_cache_bksd, "value_ptr": v_cache_bksd, "tokens": tokens, "slots": slots,
        "table_rows": cos_sd.shape[0],
    }  # fmt: skip
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_D": next_power_of_2(head_dim), "PDL": with_pdl,
    }  # fmt: skip
    name = "rotary_write" if kv_heads else "rotary"
    grid = (batch * tokens, heads + 2 * kv_heads)
    return Launch(name, _rotary_kernel, grid, arguments, constants, x.nbytes, x.nbytes, warps=1, pdl=with_pdl), out


class Sizes(NamedTuple):
    """Of an op's arguments, once they are known to fit each other; 0 KV heads and slots where there is no cache."""

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
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
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


def rotary(x_bthd: torch.Tensor, cos_sd: torch.Tensor, sin_sd: torch.Tensor, position_bt: torch.Tensor) -> torch.Tensor:
    """Heads ``[b, t, h, d]`` rotated to their positions; see :func:`launch` for the arguments."""
    made, out = launch(x_bthd, cos_sd, sin_sd, position_bt)
    made.run()
    return out


def rotary_write(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """Rotated queries ``[b, t, h, d]``; keys and values go to the caches; see :func:`launch` for the arguments."""
    made, out = launch(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    made.run()
    return out


@torch.library.register_fake("fastllama::rotary")
def _rotary_fake(x_bthd, cos_sd, sin_sd, position_bt):
    return torch.empty_like(x_bthd)


@torch.library.register_fake("fastllama::rotary_write")
def _rotary_write_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    b, t, n = qkv_btn.shape
    _, kv_heads, _, d = k_cache_bksd.shape
    return qkv_btn.new_empty((b, t, n // d - 2 * kv_heads, d))


torch.library.impl("fastllama::rotary", "CPU", rotary_ref)
torch.library.impl("fastllama::rotary_write", "CPU", rotary_write_ref)
torch.library.impl("fastllama::rotary", "CUDA", rotary)
torch.library.impl("fastllama::rotary_write", "CUDA", rotary_write)
