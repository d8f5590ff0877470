"""Matrix times a few vectors, with the norm before it and the residual or activation after it.

    linear(x)[r, n]  = Σ_k norm(x)[r, k] · W[n, k] + bias[n] + residual[r, n]
    gate_up(x)[r, f] = act(g[r, f]) · g[r, F + f]        with g = linear(x), W = [gate; up] of 2F rows

norm(x) = x / sqrt(mean(x²) + eps) · norm_weight when a norm weight is given, else x. Sums are float32.

Bytes moved per call: the matrix once, N·K·itemsize; all else is small at the few rows these are made for. The kernels
(``cpu.cpp``; :mod:`fastllama_kernels.linear.triton`, which registers itself for CUDA when imported) need contiguous
tensors of one dtype among float32, bfloat16 and float16.

Shape suffixes: leading dimensions ``...``, ``k`` input features, ``n`` output features, ``f`` FFN dim.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

ACTIVATIONS = {  # the position in this dict is the number that the kernels take
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
MAX_ROWS = {"cpu": 4, "cuda": 16}  # by device type; above, torch's GEMM is faster

torch.library.define(
    "fastllama::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual) -> Tensor",
)
torch.library.define(
    "fastllama::gate_up",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps, int activation) -> Tensor",
)


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension in float32 (arXiv 1910.07467), rounded as Hugging Face does."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``linear`` in torch operators: any dtype and number of rows."""
    if norm_weight is not None:
        x = rms_norm_ref(x, norm_weight, eps)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def gate_up_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """``gate_up`` in torch operators: any dtype and number of rows."""
    gate, up = linear_ref(x, weight, bias, norm_weight, eps, None).chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@torch.library.register_fake("fastllama::linear")
def _linear_fake(x, weight, bias, norm_weight, eps, residual):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fastllama::gate_up")
def _gate_up_fake(x, weight, bias, norm_weight, eps, activation):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel for ``[..., k]`` activations and an ``[n, k]`` matrix: ``[..., n]``; at most MAX_ROWS rows pay."""
    return torch.ops.fastllama.linear(x, weight, bias, norm_weight, eps, residual)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "silu",
) -> torch.Tensor:
    """The kernel for ``[..., k]`` activations and a ``[2f, k]`` matrix: ``[..., f]``."""
    number = list(ACTIVATIONS).index(activation)
    return torch.ops.fastllama.gate_up(x, weight, bias, norm_weight, eps, number)
