"""All layers as one operation against the operations it is made of."""

from __future__ import annotations

import pytest
import torch

from fastllama_kernels.attention.op import rotary_attention
from fastllama_kernels.common import build
from fastllama_kernels.layers.op import layers
from fastllama_kernels.linear.op import gate_up, linear

LAYERS, M, F, HEADS, KV_HEADS, D, SLOTS = 3, 24, 40, 4, 2, 8, 20
EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


def draw(b, t, dtype, bias) -> tuple:
    """Arguments of the op but for the last two."""

    def tensor(*shape) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    none = torch.empty(0, dtype=dtype)
    weights = []
    for _ in range(LAYERS):
        packed, inner = (HEADS + 2 * KV_HEADS) * D, HEADS * D
        for shape in ((packed, M), (M, inner), (2 * F, M), (M, F)):
            if shape[1] == M:
                weights.append(torch.rand(M).to(dtype))
            weights += [tensor(*shape), tensor(shape[0]) if bias else none]
    angle = torch.rand(SLOTS, D)
    position = torch.arange(t).repeat(b, 1) + 3
    caches = [[tensor(b, KV_HEADS, SLOTS, D) for _ in range(LAYERS)] for _ in range(2)]
    return torch.randn(b, t, M).to(dtype), angle.cos(), angle.sin(), position, weights, *caches


def one_by_one(x, cos, sin, position, weights, k_caches, v_caches, activation) -> torch.Tensor:
    for index, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        own = weights[10 * index : 10 * index + 10]
        norm, qkv, qkv_bias, o, o_bias, post_norm, up, up_bias, down, down_bias = (
            w if w.numel() else None for w in own
        )
        packed = linear(x, qkv, qkv_bias, norm, EPS)
        heads = rotary_attention(packed, cos, sin, position, k_cache, v_cache, torch.zeros(0, dtype=torch.int32))
        x = linear(heads, o, o_bias, residual=x)
        x = linear(gate_up(x, up, up_bias, post_norm, EPS, activation), down, down_bias, residual=x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "t", "bias", "activation"), [(1, 1, False, "silu"), (2, 2, True, "gelu")])
def test_it_is_its_operations_one_after_the_other(dtype, b, t, bias, activation) -> None:
    *args, k_caches, v_caches = draw(b, t, dtype, bias)
    copies = [[cache.clone() for cache in caches] for caches in (k_caches, v_caches)]
    expected = one_by_one(*args, *copies, activation)
    assert torch.equal(layers(*args, k_caches, v_caches, EPS, activation), expected)
    for ours, theirs in zip([*k_caches, *v_caches], [*copies[0], *copies[1]], strict=True):
        assert torch.equal(ours, theirs)


def test_a_number_of_weights_that_does_not_fit_the_caches_is_refused() -> None:
    x, cos, sin, position, weights, k_caches, v_caches = draw(1, 1, torch.float32, False)
    with pytest.raises(RuntimeError, match="got 29 weights and 3 value caches for 3 key caches, expected 10 and 1"):
        layers(x, cos, sin, position, weights[:-1], k_caches, v_caches, EPS, "silu")
    with pytest.raises(RuntimeError, match="2 value caches"):
        layers(x, cos, sin, position, weights, k_caches, v_caches[:-1], EPS, "silu")


def test_schema_and_fake_are_right() -> None:
    args = draw(1, 1, torch.float32, False)
    torch.library.opcheck(torch.ops.fastllama.layers.default, (*args, EPS, 0))
