"""All decoder layers of a decode step in one operation, for a CPU.

    for each layer:  x ← x + o · attention(qkv · norm(x));  x ← x + down · gate_up(norm(x))

with the operations of :mod:`fastllama_kernels.linear.op` and :mod:`fastllama_kernels.attention.op`. Between two of
them there is nothing but a function call in C++ (``cpu.cpp``), where Python would need as long as a small model's
kernels.

A matrix is a kind and the tensors that this kind has. The kernel takes the tensors of all layers as one list, and a
list of kinds that says how to read it: for each layer the input norm, the tensors of q/k/v, those of o, the post norm,
the tensors of gate/up, those of down; four kinds.

Bytes moved: as those operations. On a GPU there is no use for it: a graph replays their kernels without Python.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``m`` model dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

DENSE, DENSE_BIAS, PACKED = range(3)  # numbered as in common/matrix.h; PACKED is the first of eight


def packed_kind(has_bias: bool, has_offsets: bool, codes_inputs: bool) -> int:
    """The kind of a matrix as :mod:`fastllama_kernels.linear.packed` has it."""
    return PACKED + has_bias + 2 * has_offsets + 4 * codes_inputs


#: The tensors of a matrix of each kind, in their order.
TENSORS: dict[int, tuple[str, ...]] = {DENSE: ("weight",), DENSE_BIAS: ("weight", "bias")} | {
    packed_kind(*flags): ("codes", "scales") + ("offsets",) * flags[1] + ("bias",) * flags[0]
    for flags in itertools.product((False, True), repeat=3)
}


class Weights(NamedTuple):
    """One matrix: its kind and the tensors that TENSORS names for it."""

    kind: int
    tensors: tuple[torch.Tensor, ...]


class Layer(NamedTuple):
    """The weights of one layer, in the order that the kernel takes them."""

    input_norm: torch.Tensor
    qkv: Weights
    o: Weights
    post_norm: torch.Tensor
    gate_up: Weights
    down: Weights


torch.library.define(
    "fastllama::layers",
    "(Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor[] weights, int[] kinds, Tensor(a!)[] key_caches, "
    "Tensor(b!)[] value_caches, float eps, int activation) -> Tensor",
)


@torch.library.register_fake("fastllama::layers")
def _layers_fake(x_btm, cos_sd, sin_sd, position_bt, weights, kinds, k_caches, v_caches, eps, activation):
    return torch.empty_like(x_btm)


def flatten(layers: Iterable[Layer]) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors of all layers, and the kinds of their matrices, as the kernel takes them."""
    tensors, kinds = [], []
    for layer in layers:
        for weights in layer:
            if isinstance(weights, Weights):
                tensors.extend(weights.tensors)
                kinds.append(weights.kind)
            else:
                tensors.append(weights)
    return tensors, kinds


def layers(
    x_btm: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    weights: Sequence[Layer],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    eps: float,
    activation: int,
) -> torch.Tensor:
    """Hidden states ``[b, t, m]`` after all layers.

    Args:
        x_btm: hidden states before them; few rows, few tokens (see the operations).
        cos_sd, sin_sd, position_bt: as ``rotary_attention`` of :mod:`fastllama_kernels.attention.op` takes them.
        weights: of every layer.
        k_caches, v_caches: of every layer, mutated.
        eps: of every norm.
        activation: number of every gate's activation.
    """
    tensors, kinds = flatten(weights)
    caches = (list(k_caches), list(v_caches))
    return torch.ops.fastllama.layers(x_btm, cos_sd, sin_sd, position_bt, tensors, kinds, *caches, eps, activation)
