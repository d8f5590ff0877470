"""Rotary positions, KV write and attention over the live slots of a static cache.

    q, k, v = split(qkv)                         one token's heads side by side: h query, k key, k value heads
    cache[r, :, p] = rotary(k, p), v             for each new token of row r, at its position p
    out = softmax(rotary(q, p) · K[r, :, ≤ p] / sqrt(d)) · V[r, :, ≤ p]

A query at position p sees the slots 0 .. p of its row, so no mask is needed. Tokens of one row may share a position:
then they are copies of one token, written twice.

Bytes moved per layer: the live keys and values once, 2 · Σ_r (p_r + 1) · k · d · itemsize. The cost follows the live
length, never the capacity. The CPU kernel (``cpu/attention.cpp``) takes a few query tokens a row; for long prefills
``prefill_attention`` runs torch's flash attention on the live part of the cache.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``n`` = (h + 2k)·d packed features.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

MAX_TOKENS = 8  # query tokens a row up to which the decode kernel beats flash attention

_ARGS = "(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor"
torch.library.define("fastllama::rotary_attention", _ARGS)
torch.library.define("fastllama::prefill_attention", _ARGS)


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
    kv_heads, d = k_cache_bksd.shape[1], k_cache_bksd.shape[3]
    heads = n // d - 2 * kv_heads
    q_bthd, k_btkd, v_btkd = qkv_btn.view(b, t, -1, d).split((heads, kv_heads, kv_heads), dim=2)
    cos_bt1d, sin_bt1d = cos_sd[position_bt][:, :, None], sin_sd[position_bt][:, :, None]
    row_b1 = torch.arange(b, device=qkv_btn.device)[:, None]
    k_cache_bksd.transpose(1, 2).index_put_((row_b1, position_bt), _rotate(k_btkd, cos_bt1d, sin_bt1d))
    v_cache_bksd.transpose(1, 2).index_put_((row_b1, position_bt), v_btkd)
    return _rotate(q_bthd, cos_bt1d, sin_bt1d).transpose(1, 2)


def _rotate(x_bthd: torch.Tensor, cos_bt1d: torch.Tensor, sin_bt1d: torch.Tensor) -> torch.Tensor:
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
    b, t, _ = qkv_btn.shape
    q_bhtd = rotate_and_write(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    slot_s = torch.arange(k_cache_bksd.shape[2], device=qkv_btn.device)
    visible_b1ts = (slot_s <= position_bt[..., None])[:, None]
    out_bhtd = F.scaled_dot_product_attention(q_bhtd, k_cache_bksd[:b], v_cache_bksd[:b], visible_b1ts, enable_gqa=True)
    return out_bhtd.transpose(1, 2).reshape(b, t, -1)


@torch.library.impl("fastllama::prefill_attention", "CPU")
def _prefill_attention(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    b, t, _ = qkv_btn.shape
    low, high = position_bt.aminmax()
    if low < 0 or high >= k_cache_bksd.shape[2]:
        bad, slots = int(low if low < 0 else high), k_cache_bksd.shape[2]
        raise IndexError(f"fastllama: position {bad} lies outside the KV cache of {slots} slots")
    q_bhtd = rotate_and_write(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    groups = q_bhtd.shape[1] // k_cache_bksd.shape[1]
    out_bthd = q_bhtd.new_empty((b, t, *q_bhtd.shape[1::2]))
    for row in range(b):
        live = int(position_bt[row].max()) + 1
        k_1hsd, v_1hsd = (
            cache[row : row + 1, :, :live].repeat_interleave(groups, dim=1) for cache in (k_cache_bksd, v_cache_bksd)
        )
        visible_ts = torch.arange(live) <= position_bt[row, :, None]
        out_1htd = F.scaled_dot_product_attention(q_bhtd[row : row + 1], k_1hsd, v_1hsd, visible_ts)
        out_bthd[row] = out_1htd[0].transpose(0, 1)
    return out_bthd.flatten(2)


@torch.library.register_fake("fastllama::rotary_attention")
@torch.library.register_fake("fastllama::prefill_attention")
def _attention_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    b, t, n = qkv_btn.shape
    return qkv_btn.new_empty((b, t, n - 2 * k_cache_bksd.shape[1] * k_cache_bksd.shape[3]))


def rotary_attention(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """The CPU kernels: ``[b, t, h·d]``, in qkv's dtype.

    Args:
        qkv_btn: packed projections, contiguous.
        cos_sd, sin_sd: float32 rotary tables, contiguous, at least as long as the cache.
        position_bt: int64 slot of each token, contiguous.
        k_cache_bksd, v_cache_bksd: the caches, contiguous, mutated; they may have more rows than ``qkv_btn``.
    """
    op = (
        torch.ops.fastllama.rotary_attention
        if qkv_btn.shape[1] <= MAX_TOKENS
        else torch.ops.fastllama.prefill_attention
    )
    return op(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
