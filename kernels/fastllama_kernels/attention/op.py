"""Rotary positions, KV write and attention over the live slots of a static cache.

    q, k, v = split(qkv)                         one token's heads side by side: h query, k key, k value heads
    cache[r, :, p] = rotary(k, p), v             for each new token of row r, at its position p
    out = softmax(rotary(q, p) · K[r, :, ≤ p] / sqrt(d)) · V[r, :, ≤ p]

A query at position p sees the slots 0 .. p of its row, so no mask is needed. Tokens of one row may share a position:
then they are copies of one token, written twice.

The arguments: ``qkv`` ``[b, t, n]``; float32 rotary tables ``cos`` and ``sin`` ``[s, d]``, at least as long as the
cache; ``positions`` int64 ``[b, t]``, the slot of each token; caches ``[≥ b, k, s, d]``, mutated, in qkv's dtype or as
int8 ``[≥ b, k, s, d + 4]`` (:mod:`.codes`; not on a GPU). All are contiguous. The result is ``[b, t, h·d]``, in qkv's
dtype.

Bytes moved per layer: the live keys and values once, 2 · Σ_r (p_r + 1) · k · d · itemsize. The cost follows the live
length, never the capacity. The decode kernels take up to MAX_TOKENS query tokens a row: ``rotary_attention`` on a CPU
(``cpu.cpp``), ``rotary_attention_split`` on a GPU, whose programs share counters
(:mod:`fastllama_kernels.attention.triton`). For longer prefills there is ``prefill_attention`` on a CPU
(``prefill.cpp``); on a GPU ``rotary_attention_wide`` runs torch's masked attention.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``n`` = (h + 2k)·d packed features, ``p`` counters.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastllama_kernels.attention.codes import decoded, encoded

MAX_TOKENS = 8  # query tokens a row up to which the decode kernel is faster
MAX_HEAD_DIM = 256  # of the kernels on a GPU

_ARGS = "Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache"
torch.library.define("fastllama::rotary_attention", f"({_ARGS}) -> Tensor")
torch.library.define("fastllama::prefill_attention", f"({_ARGS}) -> Tensor")


def rotate_and_write(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """Write the tokens' rotated keys and their values to the cache; return the rotated queries ``[b, h, t, d]``."""
    b, t, n = qkv_btn.shape
    kv_heads, d = k_cache_bksd.shape[1], cos_sd.shape[1]
    heads = n // d - 2 * kv_heads
    q_bthd, k_btkd, v_btkd = qkv_btn.view(b, t, -1, d).split((heads, kv_heads, kv_heads), dim=2)
    cos_bt1d, sin_bt1d = cos_sd[position_bt][:, :, None], sin_sd[position_bt][:, :, None]
    row_b1 = torch.arange(b, device=qkv_btn.device)[:, None]
    for cache_bksd, x_btkd in ((k_cache_bksd, rotate(k_btkd, cos_bt1d, sin_bt1d)), (v_cache_bksd, v_btkd)):
        x_btkd = encoded(x_btkd) if cache_bksd.dtype == torch.int8 else x_btkd
        cache_bksd.transpose(1, 2).index_put_((row_b1, position_bt), x_btkd)
    return rotate(q_bthd, cos_bt1d, sin_bt1d).transpose(1, 2)


def rotate(x_bthd: torch.Tensor, cos_bt1d: torch.Tensor, sin_bt1d: torch.Tensor) -> torch.Tensor:
    """Heads rotated by the angles of these tables, in float32, rounded once."""
    x1, x2 = x_bthd.float().chunk(2, dim=-1)
    return (x_bthd * cos_bt1d + torch.cat((-x2, x1), dim=-1) * sin_bt1d).to(x_bthd.dtype)


def rotary_attention_ref(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """The op in torch operators, over the cache's whole capacity under a mask. Any device, dtype, t."""
    q_bhtd = rotate_and_write(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    return masked_attention(q_bhtd, position_bt, k_cache_bksd, v_cache_bksd).transpose(1, 2).flatten(2)


def masked_attention(
    q_bhtd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    start_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention ``[b, h, t, d]`` over the cache's whole capacity, masked to the slots ``start ≤ s ≤ position``."""
    b, slot_s = len(q_bhtd), torch.arange(k_cache_bksd.shape[2], device=q_bhtd.device)
    visible_bts = slot_s <= position_bt[..., None]
    if start_b is not None:
        visible_bts &= slot_s >= start_b[:, None, None]
    k_bksd, v_bksd = (decoded(cache[:b], q_bhtd.dtype) for cache in (k_cache_bksd, v_cache_bksd))
    return F.scaled_dot_product_attention(q_bhtd, k_bksd, v_bksd, visible_bts[:, None], enable_gqa=True)


def rotary_attention_wide(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """The op for many tokens a row on a GPU: a kernel rotates and writes, torch attends over the whole capacity."""
    q_bthd = torch.ops.fastllama.rotary_write(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    return masked_attention(q_bthd.transpose(1, 2), position_bt, k_cache_bksd, v_cache_bksd).transpose(1, 2).flatten(2)


@torch.library.register_fake("fastllama::rotary_attention")
@torch.library.register_fake("fastllama::prefill_attention")
def attention_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    """Shape and dtype of the heads' outputs."""
    b, t, n = qkv_btn.shape
    return qkv_btn.new_empty((b, t, n - 2 * k_cache_bksd.shape[1] * cos_sd.shape[1]))


def takes(head_dim: int) -> bool:
    """Whether the kernels of a GPU take heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM
