"""Attention of many query tokens on a GPU: a Triton kernel rotates and writes, torch attends."""

from __future__ import annotations

import pytest
import torch

from fastllama_kernels.attention.op import rotary_attention_ref, rotary_attention_wide

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_on_cpu")]
SLOTS = 40


def draw(device, dtype, tokens: int, cache_rows: int) -> list[torch.Tensor]:
    """Arguments for 2 rows that start at slots of their own, 4 heads over 2 KV heads of 16."""
    angle = torch.rand(SLOTS, 8) * 6
    angle = torch.cat((angle, angle), -1)
    position = torch.tensor([[3], [9]]) + torch.arange(tokens)
    qkv, caches = torch.randn(2, tokens, 128).to(dtype), torch.randn(2, cache_rows, 2, SLOTS, 16).to(dtype)
    return [x.to(device) for x in (qkv, angle.cos(), angle.sin(), position, caches[0].clone(), caches[1].clone())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_rows", [2, 4])
def test_heads_and_caches_are_those_of_the_reference(device, assert_as_exact, dtype, cache_rows) -> None:
    ours = draw(device, dtype, 20, cache_rows)
    torchs = [x.clone() for x in ours]
    exact = [x.double() if x.is_floating_point() else x.clone() for x in ours]
    found, reference = rotary_attention_wide(*ours), rotary_attention_ref(*torchs)
    assert_as_exact(found, reference, rotary_attention_ref(*exact))
    for mine, theirs, true in zip(ours[4:], torchs[4:], exact[4:], strict=True):
        assert_as_exact(mine, theirs, true)
        assert torch.equal(mine[2:], theirs[2:]), "rows beyond the batch are left alone"


def test_copies_of_the_last_token_change_nothing(device) -> None:
    qkv, cos, sin, position, k_cache, v_cache = draw(device, torch.float32, 12, 2)
    short = [qkv[:, :9].contiguous(), cos, sin, position[:, :9].contiguous(), k_cache.clone(), v_cache.clone()]
    qkv[:, 9:], position[:, 9:] = qkv[:, 8:9], position[:, 8:9]
    padded = rotary_attention_wide(qkv, cos, sin, position, k_cache, v_cache)
    torch.testing.assert_close(padded[:, :9], rotary_attention_wide(*short))
    torch.testing.assert_close(k_cache, short[4])
