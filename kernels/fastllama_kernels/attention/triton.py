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

import torch
import triton
import triton.language as tl

from fastllama_kernels.attention.op import MAX_TOKENS, attention_fake, masked_attention
from fastllama_kernels.attention.rotary import Sizes, check_head_dim, check_packed, check_tables, rotated
from fastllama_kernels.common import pdl, tiles
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, cdiv, next_power_of_2
from fastllama_kernels.common.products import dot

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
    first, last, used = _slots_of(split, splits, position_t, start_ptr, row, slots, BLOCK_S)

    if split < used:
        at_m = (row * TOKENS + token_m).to(tl.int64) * stride_t + head_m * HEAD_DIM
        mask_md = mask_m[:, None] & mask_d[None, :]
        if ROTARY:
            q_md = rotated(q_ptr, cos_ptr, sin_ptr, at_m, position_m, slots, col_d, mask_md, HEAD_DIM)
            q_md = q_md.to(key_ptr.dtype.element_ty)
            at_t = (row * TOKENS + token_t).to(tl.int64) * stride_t + (heads + kv_head) * HEAD_DIM
            mask_td = ((position_t >= first) & (position_t < last))[:, None] & mask_d[None, :]
            slot_td = cache + position_t[:, None] * HEAD_DIM + col_d[None, :]
            k_td = rotated(q_ptr, cos_ptr, sin_ptr, at_t, position_t, slots, col_d, mask_td, HEAD_DIM)
            v_td = tl.load(q_ptr + at_t[:, None] + kv_heads * HEAD_DIM + col_d[None, :], mask=mask_td, other=0.0)
            tl.store(key_ptr + slot_td, k_td.to(key_ptr.dtype.element_ty), mask=mask_td)
            tl.store(value_ptr + slot_td, v_td, mask=mask_td)
            tl.debug_barrier()  # every thread sees the new slots
        else:
            q_md = tl.load(q_ptr + at_m[:, None] + col_d[None, :], mask=mask_md, other=0.0)

        top_m, sum_m, acc_md = _attend(
            q_md,
            key_ptr + cache,
            value_ptr + cache,
            first,
            last,
            position_m,
            scale,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_S,
            BLOCK_D,
        )
        if used == 1:
            out_m = (row * TOKENS + token_m).to(tl.int64) * (heads * HEAD_DIM) + head_m * HEAD_DIM
            out_md = acc_md / tl.where(sum_m > 0, sum_m, 1.0)[:, None]
            tl.store(out_ptr + out_m[:, None] + col_d[None, :], out_md.to(out_ptr.dtype.element_ty), mask=mask_md)
        else:
            here = row * kv_heads + kv_head
            part_m = (here * splits + split) * QUERIES + index_m
            tl.store(top_ptr + part_m, top_m, mask=mask_m)
            tl.store(sum_ptr + part_m, sum_m, mask=mask_m)
            tl.store(acc_ptr + part_m.to(tl.int64)[:, None] * HEAD_DIM + col_d[None, :], acc_md, mask=mask_md)
            tl.debug_barrier()  # every thread's part is written before this program is counted
            counter = arrived_ptr + here * TILES_M + tile
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                for begin_m in range(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, QUERIES), JOIN_M):
                    _join(
                        top_ptr, sum_ptr, acc_ptr, out_ptr, here * splits, used, begin_m, row * TOKENS, kv_head,
                        heads, GROUPS, HEAD_DIM, QUERIES, JOIN_M, JOIN_P, BLOCK_D,
                    )  # fmt: skip
                tl.store(counter, 0)  # as the next launch expects it


@triton.jit
def _slots_of(split, splits, position_t, start_ptr, row, slots, BLOCK_S: tl.constexpr):
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
def _attend(
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
def _join(
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


def launch(
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
        splits: of the slots at most; None: what fills the chip.
        tile: to use instead of the one in :mod:`fastllama_kernels.common.tiles`.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    sizes = _check_arguments(q, position_bt, k_cache_bksd, v_cache_bksd, start_b, tables)
    batch, tokens, heads, kv_heads, slots, head_dim = sizes
    out = q.new_empty((batch, tokens, heads, head_dim) if tables is None else (batch, tokens, heads * head_dim))
    cos_sd, sin_sd = tables or (None, None)
    target = chip or tiles.capability(q.device)
    groups = heads // kv_heads
    queries = tokens * groups
    block_m = min(MAX_BLOCK_M[q.itemsize], max(16, next_power_of_2(queries)))
    tile = tile or tiles.decode_attention(target, head_dim, q.dtype, block_m)
    tiles_m = cdiv(queries, block_m)
    programs = batch * kv_heads * tiles_m
    if splits is None:
        wanted = cdiv(PROGRAMS * tiles.multiprocessors(q.device, target), programs)
        splits = max(1, min(wanted, MAX_SPLITS, cdiv(slots, tile.block_s)))
    if arrived is None:
        arrived = torch.zeros(programs, dtype=torch.int32, device=q.device)
    else:
        check("arrived", arrived, q, (None,), torch.int32)
        if len(arrived) < programs:
            raise ValueError(f"arrived has {len(arrived)} counters, expected at least {programs}")
    parts = batch * kv_heads * splits * queries if splits > 1 else 0
    top, total, acc = (q.new_empty(parts * size, dtype=torch.float32) for size in (1, 1, head_dim))
    block_d = max(16, next_power_of_2(head_dim))
    join_m = min(next_power_of_2(queries), block_m, 8)
    join_p = max(1, min(MAX_SPLITS, JOINED // (join_m * block_d)))
    with_pdl = pdl.used(q.device, chip)
    arguments = {
        "q_ptr": q, "cos_ptr": cos_sd, "sin_ptr": sin_sd, "position_ptr": position_bt,
        "start_ptr": start_b, "key_ptr": k_cache_bksd, "value_ptr": v_cache_bksd, "out_ptr": out, "top_ptr": top,
        "sum_ptr": total, "acc_ptr": acc, "arrived_ptr": arrived, "slots": slots, "kv_heads": kv_heads,
        "splits": splits, "scale": head_dim**-0.5,
    }  # fmt: skip
    constants = {
        "TOKENS": tokens, "TOKENS_PADDED": next_power_of_2(tokens), "GROUPS": groups, "HEAD_DIM": head_dim,
        "ROTARY": tables is not None, "QUERIES": queries, "TILES_M": tiles_m,
        "BLOCK_M": block_m, "BLOCK_S": tile.block_s, "BLOCK_D": block_d, "JOIN_M": join_m, "JOIN_P": join_p,
        "PDL": with_pdl,
    }  # fmt: skip
    made = Launch(
        "decode_attention" if tables is None else "rotary_attention",
        _decode_attention_kernel,
        (splits, kv_heads * tiles_m, batch),
        arguments,
        constants,
        reads=q.nbytes,
        writes=out.nbytes,
        warps=tile.warps,
        stages=tile.stages,
        pdl=with_pdl,
        max_registers=MAX_REGISTERS,
    )
    return made, out


def _check_arguments(
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


def decode_attention(
    q_bthd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention ``[b, t, h, d]`` of queries over the slots ``start ≤ s ≤ position``; see :func:`launch`."""
    made, out = launch(q_bthd, position_bt, k_cache_bksd, v_cache_bksd, start_b)
    made.run()
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
    """Rotary, KV write and attention ``[b, t, h·d]`` of packed projections; see :func:`launch`.

    ``arrived_p`` counts the programs that have done their part: int32 zeros, one for each query head of each row, zeros
    again afterwards. Launches that may run at the same time need counters of their own.
    """
    made, out = launch(qkv_btn, position_bt, k_cache_bksd, v_cache_bksd, tables=(cos_sd, sin_sd), arrived=arrived_p)
    made.run()
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
