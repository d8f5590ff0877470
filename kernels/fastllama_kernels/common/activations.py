"""The activations of a gated FFN: their names in config.json, the function in torch, the number that kernels take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

SILU, GELU, GELU_TANH, QUICK_GELU, RELU = range(5)  # as linear/triton.py and linear/cpu.cpp number them


class Activation(NamedTuple):
    """One activation: its number in the kernels, and itself in torch operators."""

    number: int
    function: Callable[[torch.Tensor], torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x) (arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


_silu, _gelu = Activation(SILU, F.silu), Activation(GELU, F.gelu)
_gelu_tanh = Activation(GELU_TANH, functools.partial(F.gelu, approximate="tanh"))

#: By their names in transformers (``transformers.activations.ACT2FN``), which config.json's ``hidden_act`` holds.
ACTIVATIONS = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": Activation(QUICK_GELU, quick_gelu),
    "relu": Activation(RELU, F.relu),
}
FUNCTIONS = {activation.number: activation.function for activation in ACTIVATIONS.values()}  # by number
