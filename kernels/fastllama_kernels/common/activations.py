"""The activations of a gated FFN: their names in config.json, the function in torch, the number that kernels take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

# As linear/triton.py and linear/cpu.cpp number them.
SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, RELU6, LEAKY_RELU, SIGMOID, TANH, LINEAR, MISH, HARDSWISH = range(13)
LAPLACE, GELU_10, SQRT_SOFTPLUS = range(13, 16)


class Activation(NamedTuple):
    """One activation: its number in the kernels, and itself in torch operators."""

    number: int
    function: Callable[[torch.Tensor], torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x) (arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)² (arXiv 2109.08668)."""
    return F.relu(x).square()


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x).clamp(-10.0, 10.0)


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x).sqrt()


def _laplace(x: torch.Tensor) -> torch.Tensor:
    """The normal distribution's function that stands in for squared ReLU (arXiv 2209.10655)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


_silu, _gelu = Activation(SILU, F.silu), Activation(GELU, F.gelu)
_gelu_tanh = Activation(GELU_TANH, functools.partial(F.gelu, approximate="tanh"))

#: By their names in transformers (``transformers.activations.ACT2FN``), which config.json's ``hidden_act`` holds: all
#: that have no weights of their own.
ACTIVATIONS = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_10": Activation(GELU_10, _gelu_10),
    "quick_gelu": Activation(QUICK_GELU, quick_gelu),
    "relu": Activation(RELU, F.relu),
    "relu2": Activation(RELU2, relu2),
    "relu6": Activation(RELU6, F.relu6),
    "leaky_relu": Activation(LEAKY_RELU, F.leaky_relu),
    "sigmoid": Activation(SIGMOID, torch.sigmoid),
    "tanh": Activation(TANH, torch.tanh),
    "linear": Activation(LINEAR, torch.clone),
    "mish": Activation(MISH, F.mish),
    "hardswish": Activation(HARDSWISH, F.hardswish),
    "laplace": Activation(LAPLACE, _laplace),
    "sqrtsoftplus": Activation(SQRT_SOFTPLUS, _sqrt_softplus),
}
FUNCTIONS = {activation.number: activation.function for activation in ACTIVATIONS.values()}  # by number
