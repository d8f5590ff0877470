"""All layers as one operation against the operations it is made of."""

from __future__ import annotations

import pytest
import torch

from fastllama_kernels.common import build
from fastllama_kernels.common.activations import GELU, SILU
from fastllama_kernels.layers.op import DENSE, DENSE_BIAS, Layer, Weights, flatten, layers

LAYERS, M, F, HEADS, KV_HEADS, D, SLOTS = 3, 24, 40, 4, 2, 8, 20
EPS = 1e-5
linear, gate_up = torch.ops.fastllama.linear, torch.ops.fastllama.gate_up


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


def draw(b, t, dtype, bias) -> tuple:
    """Arguments of the op but for the last two."""

    def tensor(*shape) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    def matrix(n: int, k: int) -> Weights:
        return Weights(DENSE_BIAS, (tensor(n, k), tensor(n))) if bias else Weights(DENSE, (tensor(n, k),))

    packed, inner = (HEADS + 2 * KV_HEADS) * D, HEADS * D
    weights = [
        Layer(
            torch.rand(M).to(dtype), matrix(packed, M), matrix(M, inner),
            torch.rand(M).to(dtype), matrix(2 * F, M), matrix(M, F),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    angle = torch.rand(SLOTS, D)
    position = torch.arange(t).repeat(b, 1) + 3
    caches = [[tensor(b, KV_HEADS, SLOTS, D) for _ in range(LAYERS)] for _ in range(2)]
    return torch.randn(b, t, M).to(dtype), angle.cos(), angle.sin(), position, weights, *caches


def one_by_one(x, cos, sin, position, weights, k_caches, v_caches, activation) -> torch.Tensor:
    for layer, k_cache, v_cache in zip(weights, k_caches, v_caches, strict=True):
        qkv, o, up, down = ((*weights.tensors, None)[:2] for weights in (layer.qkv, layer.o, layer.gate_up, layer.down))
        packed = linear(x, *qkv, layer.input_norm, EPS)
        heads = torch.ops.fastllama.rotary_attention(packed, cos, sin, position, k_cache, v_cache)
        x = linear(heads, *o, residual=x)
        x = linear(gate_up(x, *up, layer.post_norm, EPS, activation), *down, residual=x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "t", "bias", "activation"), [(1, 1, False, SILU), (2, 2, True, GELU)])
def test_it_is_its_operations_one_after_the_other(dtype, b, t, bias, activation) -> None:
    *args, k_caches, v_caches = draw(b, t, dtype, bias)
    copies = [[cache.clone() for cache in caches] for caches in (k_caches, v_caches)]
    expected = one_by_one(*args, *copies, activation)
    assert torch.equal(layers(*args, k_caches, v_caches, EPS, activation), expected)
    for ours, theirs in zip([*k_caches, *v_caches], [*copies[0], *copies[1]], strict=True):
        assert torch.equal(ours, theirs)


def test_a_number_of_weights_that_does_not_fit_the_caches_is_refused() -> None:
    x, cos, sin, position, weights, k_caches, v_caches = draw(1, 1, torch.float32, False)
    with pytest.raises(RuntimeError, match="got 8 matrices and 3 value caches for 3 key caches, expected 4 and 1"):
        layers(x, cos, sin, position, weights[:-1], k_caches, v_caches, EPS, SILU)
    with pytest.raises(RuntimeError, match="2 value caches"):
        layers(x, cos, sin, position, weights, k_caches, v_caches[:-1], EPS, SILU)


def test_tensors_that_do_not_fit_their_kinds_are_refused() -> None:
    x, cos, sin, position, weights, *caches = draw(1, 1, torch.float32, False)
    tensors, kinds = flatten(weights)
    with pytest.raises(RuntimeError, match="got 17 weights for matrices of these kinds and their norms, expected 18"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors[1:], kinds, *caches, EPS, 0)
    with pytest.raises(RuntimeError, match=r"got 18 weights .* expected 19"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors, [DENSE_BIAS, *kinds[1:]], *caches, EPS, 0)
    with pytest.raises(RuntimeError, match="there is no matrix of kind 99"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors, [99, *kinds[1:]], *caches, EPS, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_schema_and_fake_are_right(bias) -> None:
    x, cos, sin, position, weights, *caches = draw(1, 1, torch.float32, bias)
    args = (x, cos, sin, position, *flatten(weights), *caches, EPS, 0)
    torch.library.opcheck(torch.ops.fastllama.layers.default, args)
