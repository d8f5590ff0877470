"""Attention of a few query tokens over the live slots of a static cache, in Triton: split-KV, grouped queries.

    out[b, t, h] = softmax_s(q[b, t, h] · K[b, h/g, s] / sqrt(d)) · V[b, h/g, s]      start[b] ≤ s ≤ position[b, t]

    decode_attention     q as it is; the cache holds every key and value
    rotary_attention     of packed q, k, v: rotates queries and keys and writes keys and values to the cache as well
                         (the formula of :mod:`fastllama_kernels.attention.op`; the op ``rotary_attention_split``)

The queries that share a KV head are multiplied together, and the live slots of a row are split between programs: as
many as fill the chip, none shorter than a tile. Lengths are read from device memory, so one launch serves all of them;
what it costs follows the live length. Each program leaves a softmax of its own slots, and the last one of a head to
arrive joins them (arXiv 2205.14135, 2311.01282): no second launch. The program that owns a new token's slot writes it
before it reads its slots, and no other one reads that slot.

Bytes moved: the live keys and values once, 2 · Σ_b (p_b + 1) · k · d · itemsize. Needs compute capability 8.0, or the
interpreter. Head dims that are multiples of 8, up to 256; at most 8 query tokens.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``g`` query heads
for each KV head, ``d`` head dim, ``m`` queries of a KV head, t·g in all, ``p`` splits, ``n`` packed features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastllama_kernels.attention.checks import Sizes, check_arguments
from fastllama_kernels.attention.op import attention_fake, masked_attention
from fastllama_kernels.attention.rotary import rotated, write_new
from fastllama_kernels.attention.split import attend, join, leave_part, slots_of
from fastllama_kernels.common import pdl, tiles
from fastllama_kernels.common.checks import check
from fastllama_kernels.common.launch import Launch, cdiv, next_power_of_2

MAX_SPLITS = 64
PROGRAMS = 2  # that a multiprocessor is to run at once: enough to fill it, and few enough for long splits
MAX_REGISTERS = 255  # said, for else the compiler spills some to run more programs than there are
MAX_BLOCK_M = {2: 64, 4: 16}  # queries a program takes, by bytes of a number: more would not fit into registers
JOINED = 8192  # numbers of the splits' results that are joined at once

torch.library.define(
    "fastllama::decode_attention",
    "(Tensor q, Tensor positions, Tensor key_cache, Tensor value_cache, Tensor? start=None) -> Tensor",
)
torch.library.define(  # the counters are scratch of this kernel alone: the op of a CPU has none
    "fastllama::rotary_attention_split",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!) arrived) -> Tensor",
)


def decode_attention_ref(
    q_bthd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """``decode_attention`` in torch operators, over the cache's whole capacity under a mask."""
    out_bhtd = masked_attention(q_bthd.transpose(1, 2), position_bt, k_cache_bksd, v_cache_bksd, start_b)
    return out_bhtd.transpose(1, 2).contiguous()


@triton.jit
def _decode_attention_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    start_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    top_ptr,
    sum_ptr,
    acc_ptr,
    arrived_ptr,
    slots,
    kv_heads,
    splits,
    scale,
    TOKENS: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    JOIN_M: tl.constexpr,
    JOIN_P: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    split, kv_head, row = tl.program_id(0), tl.program_id(1) // TILES_M, tl.program_id(2)
    tile = tl.program_id(1) % TILES_M
    heads = kv_heads * GROUPS
    stride_t = heads * HEAD_DIM
    if ROTARY:
        stride_t += 2 * kv_heads * HEAD_DIM
    col_d = tl.arange(0, BLOCK_D)
    mask_d = col_d < HEAD_DIM
    index_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_m, mask_m = index_m // GROUPS, index_m < QUERIES
    head_m = kv_head * GROUPS + index_m % GROUPS
    token_t = tl.arange(0, TOKENS_PADDED)
    cache = (row.to(tl.int64) * kv_heads + kv_head) * slots * HEAD_DIM
    pdl.wait_for_previous(PDL)

    position_t = tl.load(position_ptr + row * TOKENS + token_t, mask=token_t < TOKENS, other=-1)
    position_m = tl.load(position_ptr + row * TOKENS + token_m, mask=mask_m, other=-1)
    first, last, used = slots_of(split, splits, position_t, start_ptr, row, slots, BLOCK_S)

    if split < used:
        at_m = (row * TOKENS + token_m).to(tl.int64) * stride_t + head_m * HEAD_DIM
        mask_md = mask_m[:, None] & mask_d[None, :]
        if ROTARY:
            q_md = rotated(q_ptr, cos_ptr, sin_ptr, at_m, position_m, slots, col_d, mask_md, HEAD_DIM)
            q_md = q_md.to(key_ptr.dtype.element_ty)
            at_t = (row * TOKENS + token_t).to(tl.int64) * stride_t + (heads + kv_head) * HEAD_DIM
            write_new(
                q_ptr, cos_ptr, sin_ptr, key_ptr + cache, value_ptr + cache, at_t, kv_heads * HEAD_DIM, position_t,
                first, last, slots, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        else:
            q_md = tl.load(q_ptr + at_m[:, None] + col_d[None, :], mask=mask_md, other=0.0)

        top_m, sum_m, acc_md = attend(
            q_md, key_ptr + cache, value_ptr + cache, first, last, position_m, scale,
            HEAD_DIM, BLOCK_M, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        if used == 1:
            out_m = (row * TOKENS + token_m).to(tl.int64) * (heads * HEAD_DIM) + head_m * HEAD_DIM
            out_md = acc_md / tl.where(sum_m > 0, sum_m, 1.0)[:, None]
            tl.store(out_ptr + out_m[:, None] + col_d[None, :], out_md.to(out_ptr.dtype.element_ty), mask=mask_md)
        else:
            here = row * kv_heads + kv_head
            part_m = (here * splits + split) * QUERIES + index_m
            leave_part(top_ptr, sum_ptr, acc_ptr, part_m, top_m, sum_m, acc_md, mask_m, HEAD_DIM, BLOCK_D)
            counter = arrived_ptr + here * TILES_M + tile
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                for begin_m in range(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, QUERIES), JOIN_M):
                    join(
                        top_ptr, sum_ptr, acc_ptr, out_ptr, here * splits, used, begin_m, row * TOKENS, kv_head,
                        heads, GROUPS, HEAD_DIM, QUERIES, JOIN_M, JOIN_P, BLOCK_D,
                    )  # fmt: skip
                tl.store(counter, 0)  # as the next launch expects it


class _Work(NamedTuple):
    """How a launch's work is divided: tiles of queries of each KV head, splits of the slots."""

    queries: int
    block_m: int
    tiles_m: int
    splits: int
    tile: tiles.AttentionTile


def _divide(
    q: torch.Tensor, sizes: Sizes, chip: tuple[int, int], splits: int | None, tile: tiles.AttentionTile | None
) -> _Work:
    queries = sizes.tokens * (sizes.heads // sizes.kv_heads)
    block_m = min(MAX_BLOCK_M[q.itemsize], max(16, next_power_of_2(queries)))
    tiles_m = cdiv(queries, block_m)
    tile = tile or tiles.decode_attention(chip, sizes.head_dim, q.dtype, block_m)
    if splits is None:
        wanted = cdiv(PROGRAMS * tiles.multiprocessors(q.device, chip), sizes.batch * sizes.kv_heads * tiles_m)
        splits = max(1, min(wanted, MAX_SPLITS, cdiv(sizes.slots, tile.block_s)))
    return _Work(queries, block_m, tiles_m, splits, tile)


def _counters(q: torch.Tensor, arrived: torch.Tensor | None, programs: int) -> torch.Tensor:
    """The counters that were given, once they are known to be enough, or new ones."""
    if arrived is None:
        return torch.zeros(programs, dtype=torch.int32, device=q.device)
    check("arrived", arrived, q, (None,), torch.int32)
    if len(arrived) < programs:
        raise ValueError(f"arrived has {len(arrived)} counters, expected at least {programs}")
    return arrived


def _constants(sizes: Sizes, work: _Work, is_rotary: bool, with_pdl: bool) -> dict[str, int | bool]:
    block_d = max(16, next_power_of_2(sizes.head_dim))
    join_m = min(next_power_of_2(work.queries), work.block_m, 8)
    return {
        "TOKENS": sizes.tokens, "TOKENS_PADDED": next_power_of_2(sizes.tokens),
        "GROUPS": sizes.heads // sizes.kv_heads, "HEAD_DIM": sizes.head_dim, "ROTARY": is_rotary,
        "QUERIES": work.queries, "TILES_M": work.tiles_m,
        "BLOCK_M": work.block_m, "BLOCK_S": work.tile.block_s, "BLOCK_D": block_d,
        "JOIN_M": join_m, "JOIN_P": max(1, min(MAX_SPLITS, JOINED // (join_m * block_d))),
        "PDL": with_pdl,
    }  # fmt: skip


def plan_launch(
    q: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None = None,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    arrived: torch.Tensor | None = None,
    chip: tuple[int, int] | None = None,
    splits: int | None = None,
    tile: tiles.AttentionTile | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the tensor it fills: ``[b, t, h, d]``, with tables ``[b, t, h·d]``.

    Args:
        q: queries ``[b, t, h, d]``; with tables, packed projections ``[b, t, n]``.
        position_bt: int64 slot of each query token. One outside the cache is not written; a query past the end sees
            the whole cache.
        k_cache_bksd, v_cache_bksd: the caches, mutated with tables; they may have more rows than q.
        start_b: int64 first slot that each row sees; None: 0.
        tables: float32 cosines and sines ``[s, d]``, to rotate with and write to the cache.
        arrived: int32 zeros, one for each program group, left as zeros; None: made for this launch.
        chip: compute capability to make it for; None: that of the tensors' device.
        splits: maximum number of splits of the slots; None: what fills the chip.
        tile: to use instead of the one in :mod:`fastllama_kernels.common.tiles`.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    sizes = check_arguments(q, position_bt, k_cache_bksd, v_cache_bksd, start_b, tables)
    work = _divide(q, sizes, chip or tiles.capability(q.device), splits, tile)
    batch, tokens, heads, kv_heads, slots, head_dim = sizes
    out = q.new_empty((batch, tokens, heads, head_dim) if tables is None else (batch, tokens, heads * head_dim))
    parts = batch * kv_heads * work.splits * work.queries if work.splits > 1 else 0
    top, total, acc = (q.new_empty(parts * size, dtype=torch.float32) for size in (1, 1, head_dim))
    cos_sd, sin_sd = tables or (None, None)
    with_pdl = pdl.used(q.device, chip)
    arguments = {
        "q_ptr": q, "cos_ptr": cos_sd, "sin_ptr": sin_sd, "position_ptr": position_bt, "start_ptr": start_b,
        "key_ptr": k_cache_bksd, "value_ptr": v_cache_bksd, "out_ptr": out,
        "top_ptr": top, "sum_ptr": total, "acc_ptr": acc,
        "arrived_ptr": _counters(q, arrived, batch * kv_heads * work.tiles_m),
        "slots": slots, "kv_heads": kv_heads, "splits": work.splits, "scale": head_dim**-0.5,
    }  # fmt: skip
    launch = Launch(
        "decode_attention" if tables is None else "rotary_attention",
        _decode_attention_kernel,
        (work.splits, kv_heads * work.tiles_m, batch),
        arguments,
        _constants(sizes, work, tables is not None, with_pdl),
        reads=q.nbytes,
        writes=out.nbytes,
        warps=work.tile.warps,
        stages=work.tile.stages,
        pdl=with_pdl,
        max_registers=MAX_REGISTERS,
    )
    return launch, out


def decode_attention(
    q_bthd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention ``[b, t, h, d]`` of queries over the slots ``start ≤ s ≤ position``; see :func:`plan_launch`."""
    launch, out = plan_launch(q_bthd, position_bt, k_cache_bksd, v_cache_bksd, start_b)
    launch.run()
    return out


def rotary_attention(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    arrived_p: torch.Tensor,
) -> torch.Tensor:
    """Rotary, KV write and attention ``[b, t, h·d]`` of packed projections; see :func:`plan_launch`.

    ``arrived_p`` counts the programs that have done their part: int32 zeros, one for each query head of each row, zeros
    again afterwards. Launches that may run at the same time need counters of their own.
    """
    tables = (cos_sd, sin_sd)
    launch, out = plan_launch(qkv_btn, position_bt, k_cache_bksd, v_cache_bksd, tables=tables, arrived=arrived_p)
    launch.run()
    return out


@torch.library.register_fake("fastllama::decode_attention")
def _decode_attention_fake(q_bthd, position_bt, k_cache_bksd, v_cache_bksd, start_b=None):
    return torch.empty_like(q_bthd)


@torch.library.register_fake("fastllama::rotary_attention_split")
def _rotary_attention_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p):
    return attention_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)


torch.library.impl("fastllama::decode_attention", "CPU", decode_attention_ref)
torch.library.impl("fastllama::decode_attention", "CUDA", decode_attention)
torch.library.impl("fastllama::rotary_attention_split", "CUDA", rotary_attention)
