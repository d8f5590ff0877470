"""All decoder layers of a decode step in one operation, for a CPU.

    for each layer:  x ← x + o · attention(qkv · norm(x));  x ← x + down · gate_up(norm(x))

with the operations of :mod:`fastllama_kernels.linear.op` and :mod:`fastllama_kernels.attention.op`. Between two of
them there is nothing but a function call in C++ (``cpu.cpp``), where Python would need as long as a small model's
kernels.

Bytes moved: as those operations. On a GPU there is no use for it: a graph replays their kernels without Python.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``m`` model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastllama_kernels.linear.op import ACTIVATIONS

FIELDS = (  # of a layer, in the order that the kernel takes them
    "input_norm", "qkv_weight", "qkv_bias", "o_weight", "o_bias",
    "post_norm", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias",
)  # fmt: skip

torch.library.define(
    "fastllama::layers",
    "(Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor[] weights, Tensor(a!)[] key_caches, "
    "Tensor(b!)[] value_caches, float eps, int activation) -> Tensor",
)


@torch.library.register_fake("fastllama::layers")
def _layers_fake(x_btm, cos_sd, sin_sd, position_bt, weights, k_caches, v_caches, eps, activation):
    return torch.empty_like(x_btm)


def layers(
    x_btm: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    weights: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    eps: float,
    activation: str,
) -> torch.Tensor:
    """Hidden states ``[b, t, m]`` after all layers.

    Args:
        x_btm: hidden states before them; few rows, few tokens (see the operations).
        cos_sd, sin_sd, position_bt: as :func:`fastllama_kernels.attention.op.rotary_attention` takes them.
        weights: FIELDS of every layer, one after the other; an empty tensor for a bias that is not there.
        k_caches, v_caches: of every layer, mutated.
        eps: of every norm.
        activation: of every gate, one of ACTIVATIONS.
    """
    number = list(ACTIVATIONS).index(activation)
    args = (x_btm, cos_sd, sin_sd, position_bt, list(weights), list(k_caches), list(v_caches), eps, number)
    return torch.ops.fastllama.layers(*args)
