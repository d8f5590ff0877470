"""All layers as one operation against the operations it is made of."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastllama_kernels.attention.op  # noqa: F401  (defines an operation)
from fastllama_kernels.common import build
from fastllama_kernels.common.activations import GELU, SILU
from fastllama_kernels.layers.op import DENSE, DENSE_BIAS, Layer, Weights, flatten, layers, packed_kind
from fastllama_kernels.linear import packed

LAYERS, M, F, HEADS, KV_HEADS, D, SLOTS = 3, 32, 64, 4, 2, 8, 20
EPS = 1e-5
linear, gate_up = torch.ops.fastllama.linear, torch.ops.fastllama.gate_up


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


def draw(b, t, dtype, form) -> tuple:
    """Arguments of the op but for the last two."""

    def tensor(*shape) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    def matrix(n: int, k: int) -> Weights:
        if form == "dense":
            return Weights(DENSE, (tensor(n, k),))
        if form == "bias":
            return Weights(DENSE_BIAS, (tensor(n, k), tensor(n)))
        bits, has_offsets, has_bias, codes_inputs = form
        codes = packed.packed(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
        scales = (torch.rand(n // 16, k // 32, 16) / 2**bits / k**0.5).half()
        offsets = (-8 * scales,) if has_offsets else ()
        bias = (tensor(n),) if has_bias else ()
        return Weights(packed_kind(has_bias, has_offsets, codes_inputs), (codes, scales, *offsets, *bias))

    in_qkv, inner = (HEADS + 2 * KV_HEADS) * D, HEADS * D
    weights = [
        Layer(
            torch.rand(M).to(dtype), matrix(in_qkv, M), matrix(M, inner),
            torch.rand(M).to(dtype), matrix(2 * F, M), matrix(M, F),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    angle = torch.rand(SLOTS, D)
    position = torch.arange(t).repeat(b, 1) + 3
    caches = [[tensor(b, KV_HEADS, SLOTS, D) for _ in range(LAYERS)] for _ in range(2)]
    return torch.randn(b, t, M).to(dtype), angle.cos(), angle.sin(), position, weights, *caches


def product(x, weights: Weights, norm=None, residual=None, activation=None, form="dense") -> torch.Tensor:
    """The operation that the matrix's kind stands for."""
    if isinstance(form, str):
        weight, bias = (*weights.tensors, None)[:2]
        if activation is not None:
            return gate_up(x, weight, bias, norm, EPS, activation)
        return linear(x, weight, bias, norm, EPS, residual)
    _, has_offsets, has_bias, codes_inputs = form
    codes, scales, *others = weights.tensors
    args = (codes, scales, others[0] if has_offsets else None, others[-1] if has_bias else None, norm, EPS)
    if activation is not None:
        return torch.ops.fastllama.gate_up_packed(x, *args, activation, codes_inputs)
    return torch.ops.fastllama.linear_packed(x, *args, residual, codes_inputs)


def one_by_one(x, cos, sin, position, weights, k_caches, v_caches, activation, form) -> torch.Tensor:
    for layer, k_cache, v_cache in zip(weights, k_caches, v_caches, strict=True):
        qkv = product(x, layer.qkv, layer.input_norm, form=form)
        heads = torch.ops.fastllama.rotary_attention(qkv, cos, sin, position, k_cache, v_cache)
        x = product(heads, layer.o, residual=x, form=form)
        ffn = product(x, layer.gate_up, layer.post_norm, activation=activation, form=form)
        x = product(ffn, layer.down, residual=x, form=form)
    return x


FORMS = ["dense", "bias", *itertools.product((4, 8), *[(False, True)] * 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("b", "t", "activation"), [(1, 1, SILU), (2, 2, GELU)])
def test_it_is_its_operations_one_after_the_other(dtype, form, b, t, activation) -> None:
    *args, k_caches, v_caches = draw(b, t, dtype, form)
    copies = [[cache.clone() for cache in caches] for caches in (k_caches, v_caches)]
    expected = one_by_one(*args, *copies, activation, form)
    assert torch.equal(layers(*args, k_caches, v_caches, EPS, activation), expected)
    for ours, theirs in zip([*k_caches, *v_caches], [*copies[0], *copies[1]], strict=True):
        assert torch.equal(ours, theirs)


def test_a_number_of_weights_that_does_not_fit_the_caches_is_refused() -> None:
    x, cos, sin, position, weights, k_caches, v_caches = draw(1, 1, torch.float32, "dense")
    with pytest.raises(RuntimeError, match="got 8 matrices and 3 value caches for 3 key caches, expected 4 and 1"):
        layers(x, cos, sin, position, weights[:-1], k_caches, v_caches, EPS, SILU)
    with pytest.raises(RuntimeError, match="2 value caches"):
        layers(x, cos, sin, position, weights, k_caches, v_caches[:-1], EPS, SILU)


def test_tensors_that_do_not_fit_their_kinds_are_refused() -> None:
    x, cos, sin, position, weights, *caches = draw(1, 1, torch.float32, "dense")
    tensors, kinds = flatten(weights)
    with pytest.raises(RuntimeError, match="got 17 weights for matrices of these kinds and their norms, expected 18"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors[1:], kinds, *caches, EPS, 0)
    with pytest.raises(RuntimeError, match=r"got 18 weights .* expected 19"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors, [DENSE_BIAS, *kinds[1:]], *caches, EPS, 0)
    with pytest.raises(RuntimeError, match="there is no matrix of kind 99"):
        torch.ops.fastllama.layers(x, cos, sin, position, tensors, [99, *kinds[1:]], *caches, EPS, 0)


@pytest.mark.parametrize("form", ["dense", "bias", FORMS[-1]], ids=str)
def test_schema_and_fake_are_right(form) -> None:
    x, cos, sin, position, weights, *caches = draw(1, 1, torch.float32, form)
    args = (x, cos, sin, position, *flatten(weights), *caches, EPS, 0)
    torch.library.opcheck(torch.ops.fastllama.layers.default, args)
