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
(:mod:`fastllama_kernels.attention.triton`). For longer prefills ``prefill_attention`` runs torch's flash attention on
the live part of the cache on a CPU, ``rotary_attention_wide`` torch's masked attention on a GPU. A row's tokens there
lie one behind the other; those that fill up a chunk are copies of the last.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``n`` = (h + 2k)·d packed features, ``p`` counters.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastllama_kernels.attention.codes import decoded, encoded
from fastllama_kernels.linear.op import multiplies

MAX_TOKENS = 8  # query tokens a row up to which the decode kernel beats flash attention
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


@torch.library.impl("fastllama::prefill_attention", "CPU")
def _prefill_attention(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    b, t, _ = qkv_btn.shape
    low, high = position_bt.aminmax()
    if low < 0 or high >= k_cache_bksd.shape[2]:
        bad, slots = int(low if low < 0 else high), k_cache_bksd.shape[2]
        raise IndexError(f"fastllama: position {bad} lies outside the KV cache of {slots} slots")
    count_b = (position_bt.diff(dim=1) == 1).sum(dim=1) + 1  # copies of the last token follow
    expected_bt = position_bt[:, :1] + torch.arange(t).clamp(max=(count_b - 1)[:, None])
    if not torch.equal(position_bt, expected_bt):
        raise ValueError("fastllama: the positions of a row do not follow one another")
    q_bhtd = rotate_and_write(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    out_bthd = q_bhtd.new_empty((b, t, *q_bhtd.shape[1::2]))
    for row, count in enumerate(count_b.tolist()):
        live = int(position_bt[row, -1]) + 1
        k_1ksd, v_1ksd = (
            decoded(cache[row : row + 1, :, :live], q_bhtd.dtype) for cache in (k_cache_bksd, v_cache_bksd)
        )
        out_1htd = causal_attention(q_bhtd[row : row + 1, :, :count], k_1ksd, v_1ksd)
        out_bthd[row, :count] = out_1htd[0].transpose(0, 1)
        out_bthd[row, count:] = out_bthd[row, count - 1]
    return out_bthd.flatten(2)


def causal_attention(q_1htd: torch.Tensor, k_1ksd: torch.Tensor, v_1ksd: torch.Tensor) -> torch.Tensor:
    """Attention ``[1, h, t, d]`` of a row's last t tokens to all s of it, in flash attention's two cheap ways.

    What lies before these tokens all of them see, so it needs no mask, and the query heads that share a KV head are as
    good as tokens; among themselves they are causal. Both parts are weighted by what their softmax divided by.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (_, h, t, d), (_, k, s, _) = q_1htd.shape, k_1ksd.shape
    past = s - t
    k_1htd, v_1htd = (x[:, :, past:].float().repeat_interleave(h // k, dim=1) for x in (k_1ksd, v_1ksd))
    out_1htd, sum_1ht = flash(q_1htd.float(), k_1htd, v_1htd, 0.0, True)
    if past:
        dtype = q_1htd.dtype if multiplies(q_1htd.dtype) else torch.float32
        q, k, v = (x.to(dtype) for x in (q_1htd.reshape(1, k, h // k * t, d), k_1ksd[:, :, :past], v_1ksd[:, :, :past]))
        before, before_sum = flash(q, k, v, 0.0, False)
        share_1ht1 = torch.sigmoid(before_sum.reshape(1, h, t) - sum_1ht.reshape(1, h, t)).unsqueeze(-1)
        out_1htd = torch.lerp(out_1htd, before.reshape(1, h, t, d).float(), share_1ht1)
    return out_1htd.to(q_1htd.dtype)


@torch.library.register_fake("fastllama::rotary_attention")
@torch.library.register_fake("fastllama::prefill_attention")
def attention_fake(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd):
    """Shape and dtype of the heads' outputs."""
    b, t, n = qkv_btn.shape
    return qkv_btn.new_empty((b, t, n - 2 * k_cache_bksd.shape[1] * cos_sd.shape[1]))


def takes(head_dim: int) -> bool:
    """Whether the kernels of a GPU take heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM
