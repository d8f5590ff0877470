"""Matrix times a few vectors, with the norm before it and the residual or activation after it.

    linear(x)[r, n]  = Σ_k norm(x)[r, k] · W[n, k] + bias[n] + residual[r, n]
    gate_up(x)[r, f] = act(g[r, f]) · g[r, F + f]        with g = linear(x), W = [gate; up] of 2F rows

norm(x) = x / sqrt(mean(x²) + eps) · norm_weight when a norm weight is given, else x. Sums are float32.

Bytes moved per call: the matrix once, N·K·itemsize; all else is small at the few rows these are made for. The kernels
(``cpu.cpp``; :mod:`fastllama_kernels.linear.triton`, which registers itself for CUDA when imported) need contiguous
tensors of one dtype among float32, bfloat16 and float16.

For more rows than these kernels are fast for (``MAX_ROWS``, :func:`max_rows_cpu`) the product is torch's GEMM, which
``linear_wide`` and ``gate_up_wide`` put kernels around (``wide.cpp``; :mod:`fastllama_kernels.linear.rms_norm` and
:mod:`fastllama_kernels.linear.silu_mul` on a GPU): the norm before, the residual in it, the activation after. To a CPU
that does not multiply 16-bit numbers ``linear_slabs`` and ``gate_up_slabs`` give the matrix in float32, a slab of rows
at a time.

    rms_norm(x)    = x / sqrt(mean(x²) + eps) · weight        over the last dimension, in float32, rounded once
    silu_mul(x)[f] = act(x[f]) · x[F + f]                     likewise

Shape suffixes: leading dimensions ``...``, ``k`` input features, ``n`` output features, ``f`` FFN dim.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from fastllama_kernels.common import levels
from fastllama_kernels.common.activations import FUNCTIONS

MAX_ROWS = {"cpu": 4, "cuda": 16}  # by device type; above, torch's GEMM is faster
MAX_ROWS_CPU = {
    torch.float32: 32,
    torch.bfloat16: 64,
    torch.float16: 64,
}  # where torch has no GEMM for the 16-bit dtype
MAX_ROWS_BF16 = 24  # where it has one for bfloat16, without tiles
SLAB_BYTES = 2**21  # of a matrix in float32 at a time: what a core's caches hold

torch.library.define(
    "fastllama::linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, float eps=0.0, Tensor? residual=None)"
    " -> Tensor",
)
torch.library.define(
    "fastllama::gate_up",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, float eps=0.0, int activation=0) -> Tensor",
)
torch.library.define("fastllama::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define("fastllama::silu_mul", "(Tensor x, int activation=0) -> Tensor")


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension in float32 (arXiv 1910.07467), rounded as Hugging Face does."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def silu_mul_ref(x: torch.Tensor, activation: int = 0) -> torch.Tensor:
    """``silu_mul`` in torch operators."""
    gate, up = x.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up


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
    activation: int,
) -> torch.Tensor:
    """``gate_up`` in torch operators: any dtype and number of rows."""
    return silu_mul_ref(linear_ref(x, weight, bias, norm_weight, eps, None), activation)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype on this CPU without converting each number again and again."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def has_matrix_unit() -> bool:
    """Whether this CPU has tiles for bfloat16 (AMX), which torch's GEMM uses and these kernels do not."""
    return {"amx_tile", "amx_bf16"} <= set(levels.features().split())


@functools.cache
def max_rows_cpu(dtype: torch.dtype) -> int:
    """Rows up to which the C++ kernels are faster than torch's GEMM on this CPU."""
    if dtype == torch.float32 or not multiplies(dtype):
        return MAX_ROWS_CPU[dtype]
    has_product = dtype == torch.bfloat16 and "avx512_bf16" in levels.usable()[0].needs
    return MAX_ROWS_BF16 if has_product and not has_matrix_unit() else MAX_ROWS["cpu"]


def linear_slabs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``linear`` of many rows on a CPU: torch's GEMM, in float32 where it has none for the dtype."""
    if multiplies(x.dtype):
        return linear_wide(x, weight, bias, norm_weight, eps, residual)
    if norm_weight is not None:
        x = torch.ops.fastllama.rms_norm(x, norm_weight, eps)
    x32_rk, (n, k) = x.flatten(0, -2).float(), weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    y_rn, step = y.view(-1, n), max(1, SLAB_BYTES // (4 * k))
    for first in range(0, n, step):
        rows = slice(first, first + step)
        product = x32_rk @ weight[rows].float().t()
        product = product if bias is None else product.add_(bias[rows])
        y_rn[:, rows] = product if residual is None else product.add_(residual.view(-1, n)[:, rows])
    return y


def gate_up_slabs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    activation: int,
) -> torch.Tensor:
    """``gate_up`` of many rows on a CPU, likewise."""
    return torch.ops.fastllama.silu_mul(linear_slabs(x, weight, bias, norm_weight, eps, None), activation)


def linear_wide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``linear`` of many rows: a kernel for the norm, then torch's GEMM, which adds the residual as it writes."""
    if norm_weight is not None:
        x = torch.ops.fastllama.rms_norm(x, norm_weight, eps)
    if residual is None or bias is not None:  # together they would be rounded once more
        y = F.linear(x, weight, bias)
        return y if residual is None else residual + y
    return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.t()).view(residual.shape)


def gate_up_wide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    activation: int,
) -> torch.Tensor:
    """``gate_up`` of many rows: kernels for the norm and for the gated activation around one GEMM."""
    return torch.ops.fastllama.silu_mul(linear_wide(x, weight, bias, norm_weight, eps, None), activation)


@torch.library.register_fake("fastllama::linear")
def _linear_fake(x, weight, bias=None, norm_weight=None, eps=0.0, residual=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fastllama::rms_norm")
def _rms_norm_fake(x, weight, eps):
    return torch.empty_like(x)


@torch.library.register_fake("fastllama::silu_mul")
def _silu_mul_fake(x, activation=0):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("fastllama::gate_up")
def _gate_up_fake(x, weight, bias=None, norm_weight=None, eps=0.0, activation=0):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
