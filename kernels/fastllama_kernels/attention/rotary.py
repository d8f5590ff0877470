"""Rotary positions in Triton, and the keys and values of new tokens written to a static cache.

    rotate(x, p) = x · cos[p] + rotate_half(x) · sin[p]        rotate_half(x) = (-x₂, x₁), halves of the head dim

``rotary_write`` splits packed q, k, v; it returns the rotated queries and writes rotated keys and values to their
slots, in float32, rounded once (arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints).

Bytes moved: every head once in and once out. One program for each head of each token. For prefills of more tokens than
the attention kernel takes; a decode step has no use for it: there the rotation is part of the attention
(:mod:`fastllama_kernels.attention.triton`), which shares ``rotated`` and ``write_new``.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``n`` = (h + 2k)·d packed features.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.attention.checks import check_packed, check_tables
from fastllama_kernels.attention.op import rotate_and_write
from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, next_power_of_2

torch.library.define(
    "fastllama::rotary_write",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor",
)


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
def write_new(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    key_ptr,
    value_ptr,
    at_t,
    to_value,
    position_t,
    first,
    last,
    slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the new tokens' keys, rotated, and values to those slots of a head that this program reads."""
    col_d = tl.arange(0, BLOCK_D)
    mask_td = ((position_t >= first) & (position_t < last))[:, None] & (col_d < HEAD_DIM)[None, :]
    slot_td = position_t[:, None] * HEAD_DIM + col_d[None, :]
    k_td = rotated(qkv_ptr, cos_ptr, sin_ptr, at_t, position_t, slots, col_d, mask_td, HEAD_DIM)
    v_td = tl.load(qkv_ptr + at_t[:, None] + to_value + col_d[None, :], mask=mask_td, other=0.0)
    tl.store(key_ptr + slot_td, k_td.to(key_ptr.dtype.element_ty), mask=mask_td)
    tl.store(value_ptr + slot_td, v_td, mask=mask_td)
    tl.debug_barrier()  # every thread sees the new slots


@triton.jit
def _rotary_write_kernel(
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

    slot_1d = ((token // tokens * KV_HEADS + (head - HEADS) % KV_HEADS) * slots + position) * HEAD_DIM + col_d[None, :]
    position_1d = position + tl.zeros((1, BLOCK_D), dtype=tl.int64)
    mask_1d = mask_1d & (position_1d >= 0) & (position_1d < slots)
    is_key_1d = (head_1d >= HEADS) & (head_1d < HEADS + KV_HEADS)
    is_value_1d = head_1d >= HEADS + KV_HEADS
    tl.store(key_ptr + slot_1d, y_1d, mask=mask_1d & is_key_1d)
    value_1d = tl.load(x_ptr + at_1[:, None] + col_d[None, :], mask=mask_1d & is_value_1d, other=0.0)
    tl.store(value_ptr + slot_1d, value_1d, mask=mask_1d & is_value_1d)


def plan_launch(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    chip: tuple[int, int] | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the rotated queries ``[b, t, h, d]`` it fills.

    Args:
        qkv_btn: packed projections.
        cos_sd, sin_sd: float32 tables, at least as long as the cache.
        position_bt: int64 position of each token. One outside the cache is not written.
        k_cache_bksd, v_cache_bksd: mutated; they may have more rows than qkv.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    check_dtype("qkv", qkv_btn)
    check("qkv", qkv_btn, qkv_btn)
    sizes = check_packed(qkv_btn, k_cache_bksd, v_cache_bksd)
    check_tables(qkv_btn, cos_sd, sin_sd, position_bt, sizes)
    batch, tokens, heads, kv_heads, slots, head_dim = sizes
    out = qkv_btn.new_empty((batch, tokens, heads, head_dim))
    with_pdl = pdl.used(qkv_btn.device, chip)
    arguments = {
        "x_ptr": qkv_btn, "cos_ptr": cos_sd, "sin_ptr": sin_sd, "position_ptr": position_bt, "out_ptr": out,
        "key_ptr": k_cache_bksd, "value_ptr": v_cache_bksd, "tokens": tokens, "slots": slots,
        "table_rows": cos_sd.shape[0],
    }  # fmt: skip
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_D": next_power_of_2(head_dim), "PDL": with_pdl,
    }  # fmt: skip
    launch = Launch(
        "rotary_write",
        _rotary_write_kernel,
        (batch * tokens, heads + 2 * kv_heads),
        arguments,
        constants,
        reads=qkv_btn.nbytes,
        writes=qkv_btn.nbytes,
        warps=1,
        pdl=with_pdl,
    )
    return launch, out


def rotary_write(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """Rotated queries ``[b, t, h, d]``; keys and values go to the caches; see :func:`plan_launch`."""
    launch, out = plan_launch(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    launch.run()
    return out


@torch.library.register_fake("fastllama::rotary_write")
def _rotary_write_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    b, t, n = qkv_btn.shape
    _, kv_heads, _, d = k_cache_bksd.shape
    return qkv_btn.new_empty((b, t, n // d - 2 * kv_heads, d))


torch.library.impl("fastllama::rotary_write", "CUDA", rotary_write)
