"""The parts of split-KV attention: a program's share of the slots, its softmax, and how the programs' parts are joined.

Functions for :mod:`fastllama_kernels.attention.triton` (arXiv 2205.14135, 2311.01282).

Shape suffixes: ``s`` cache slots, ``d`` head dim, ``m`` queries of a KV head, ``p`` splits.
"""

import triton
import triton.language as tl

from fastllama_kernels.common.products import dot


@triton.jit
def slots_of(split, splits, position_t, start_ptr, row, slots, BLOCK_S: tl.constexpr):
    """A split's first slot and the one after its last, and how many splits have any (one, where none is seen)."""
    live = tl.max(position_t + 1, axis=0).to(tl.int32)  # pyright: ignore[reportAttributeAccessIssue]
    live = tl.minimum(live, slots)  # so that nothing outside the cache is read or written
    start = 0
    if start_ptr is not None:
        start = tl.maximum(tl.load(start_ptr + row).to(tl.int32), 0)
    seen = tl.maximum(live - start, 0)
    length = tl.cdiv(tl.cdiv(seen, splits), BLOCK_S) * BLOCK_S
    first = start + split * length
    return first, tl.minimum(first + length, live), tl.maximum(tl.cdiv(seen, tl.maximum(length, 1)), 1)


@triton.jit
def attend(
    q_md,
    key_ptr,
    value_ptr,
    first,
    last,
    position_m,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of some slots the highest scores (as powers of 2), the sums of weights, and the weighted sums of values."""
    col_d = tl.arange(0, BLOCK_D)
    top_m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_m = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_md = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for begin in range(first, last, BLOCK_S):
        slot_s = begin + tl.arange(0, BLOCK_S)
        mask_s = slot_s < last
        at_sd = slot_s.to(tl.int64)[:, None] * HEAD_DIM + col_d[None, :]
        mask_sd = mask_s[:, None] & (col_d < HEAD_DIM)[None, :]
        k_sd = tl.load(key_ptr + at_sd, mask=mask_sd, other=0.0)
        score_ms = dot(q_md, tl.trans(k_sd), tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32))
        score_ms *= scale * 1.4426950408889634
        visible_ms = mask_s[None, :] & (slot_s[None, :] <= position_m[:, None])
        score_ms = tl.where(visible_ms, score_ms, float("-inf"))
        new_m = tl.maximum(top_m, tl.max(score_ms, axis=1))
        base_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing is visible yet
        p_ms = tl.exp2(score_ms - base_m[:, None])
        decay_m = tl.exp2(top_m - base_m)
        v_sd = tl.load(value_ptr + at_sd, mask=mask_sd, other=0.0)
        acc_md = dot(p_ms.to(v_sd.dtype), v_sd, acc_md * decay_m[:, None])
        sum_m = sum_m * decay_m + tl.sum(p_ms, axis=1)
        top_m = new_m
    return top_m, sum_m, acc_md


@triton.jit
def leave_part(
    top_ptr,
    sum_ptr,
    acc_ptr,
    part_m,
    top_m,
    sum_m,
    acc_md,
    mask_m,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a split's result where the program that joins them finds it."""
    col_d = tl.arange(0, BLOCK_D)
    mask_md = mask_m[:, None] & (col_d < HEAD_DIM)[None, :]
    tl.store(top_ptr + part_m, top_m, mask=mask_m)
    tl.store(sum_ptr + part_m, sum_m, mask=mask_m)
    tl.store(acc_ptr + part_m.to(tl.int64)[:, None] * HEAD_DIM + col_d[None, :], acc_md, mask=mask_md)
    tl.debug_barrier()  # every thread's part is written before this program is counted


@triton.jit
def join(
    top_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,
    first_part,
    used,
    begin_m,
    first_token,
    kv_head,
    heads,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    JOIN_M: tl.constexpr,
    JOIN_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the splits' results of queries ``begin_m`` to ``begin_m + JOIN_M`` and write them out."""
    col_d = tl.arange(0, BLOCK_D)
    index_m = begin_m + tl.arange(0, JOIN_M)
    mask_m = index_m < QUERIES
    top_m = tl.full((JOIN_M,), float("-inf"), dtype=tl.float32)
    sum_m = tl.zeros((JOIN_M,), dtype=tl.float32)
    acc_md = tl.zeros((JOIN_M, BLOCK_D), dtype=tl.float32)
    for begin_p in range(0, used, JOIN_P):
        split_p = begin_p + tl.arange(0, JOIN_P)
        part_pm = (first_part + split_p[:, None]) * QUERIES + index_m[None, :]
        mask_pm = (split_p < used)[:, None] & mask_m[None, :]
        mask_pmd = mask_pm[:, :, None] & (col_d < HEAD_DIM)[None, None, :]
        at_pmd = part_pm.to(tl.int64)[:, :, None] * HEAD_DIM + col_d[None, None, :]
        top_pm = tl.load(top_ptr + part_pm, mask=mask_pm, other=float("-inf"), cache_modifier=".cg")
        part_sum_pm = tl.load(sum_ptr + part_pm, mask=mask_pm, other=0.0, cache_modifier=".cg")
        acc_pmd = tl.load(acc_ptr + at_pmd, mask=mask_pmd, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(top_m, tl.max(top_pm, axis=0))
        base_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        weight_pm = tl.exp2(top_pm - base_m[None, :])
        decay_m = tl.exp2(top_m - base_m)
        sum_m = sum_m * decay_m + tl.sum(part_sum_pm * weight_pm, axis=0)
        acc_md = acc_md * decay_m[:, None] + tl.sum(acc_pmd * weight_pm[:, :, None], axis=0)
        top_m = new_m
    out_md = acc_md / tl.where(sum_m > 0, sum_m, 1.0)[:, None]
    token_m = (first_token + index_m // GROUPS).to(tl.int64)
    out_m = (token_m * heads + kv_head * GROUPS + index_m % GROUPS) * HEAD_DIM
    mask_md = mask_m[:, None] & (col_d < HEAD_DIM)[None, :]
    tl.store(out_ptr + out_m[:, None] + col_d[None, :], out_md.to(out_ptr.dtype.element_ty), mask=mask_md)
