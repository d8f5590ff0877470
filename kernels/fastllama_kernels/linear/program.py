"""What the Triton GEMVs of dense and of packed matrices share: all but where a tile of the matrix comes from.

Shape suffixes: ``r`` rows of x, ``n`` output features, ``k`` input features.
"""

import triton
import triton.language as tl

from fastllama_kernels.common import activations
from fastllama_kernels.common.products import dot

DOT_ROWS = 16  # what a matrix unit takes at once
SILU, GELU = tl.constexpr(activations.SILU), tl.constexpr(activations.GELU)
GELU_TANH, QUICK_GELU = tl.constexpr(activations.GELU_TANH), tl.constexpr(activations.QUICK_GELU)
RELU2, RELU6 = tl.constexpr(activations.RELU2), tl.constexpr(activations.RELU6)
LEAKY_RELU, SIGMOID = tl.constexpr(activations.LEAKY_RELU), tl.constexpr(activations.SIGMOID)
TANH, LINEAR = tl.constexpr(activations.TANH), tl.constexpr(activations.LINEAR)
MISH, HARDSWISH = tl.constexpr(activations.MISH), tl.constexpr(activations.HARDSWISH)
LAPLACE, GELU_10 = tl.constexpr(activations.LAPLACE), tl.constexpr(activations.GELU_10)
SQRT_SOFTPLUS = tl.constexpr(activations.SQRT_SOFTPLUS)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of this number, in float32."""
    if ACTIVATION == SILU:
        y = x * tl.sigmoid(x)
    elif ACTIVATION == GELU:
        y = _gelu(x)
    elif ACTIVATION == GELU_TANH:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == QUICK_GELU:
        y = x * tl.sigmoid(1.702 * x)
    else:
        y = _rarer(x, ACTIVATION)
    return y


@triton.jit
def _rarer(x, ACTIVATION: tl.constexpr):
    y = tl.maximum(x, 0.0)  # ReLU
    if ACTIVATION == RELU2:
        y = y * y
    elif ACTIVATION == RELU6:
        y = tl.minimum(y, 6.0)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(x < 0.0, 0.01 * x, x)
    elif ACTIVATION == SIGMOID:
        y = tl.sigmoid(x)
    elif ACTIVATION == TANH:
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == LINEAR:
        y = x
    elif ACTIVATION == MISH:
        y = x * (2.0 * tl.sigmoid(2.0 * _softplus(x)) - 1.0)
    elif ACTIVATION == HARDSWISH:
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == LAPLACE:
        y = 0.5 * (1.0 + tl.erf((x - 0.707107) / 0.39894257))
    elif ACTIVATION == GELU_10:
        y = tl.minimum(tl.maximum(_gelu(x), -10.0), 10.0)
    elif ACTIVATION == SQRT_SOFTPLUS:
        y = tl.sqrt(_softplus(x))
    return y


@triton.jit
def load_inputs(x_ptr, col_k, k_in, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr):
    row_r = tl.arange(0, ROWS_PADDED)
    mask = (row_r < ROWS)[:, None] & (col_k < k_in)[None, :]
    return tl.load(x_ptr + row_r[:, None] * k_in + col_k[None, :], mask=mask, other=0.0)


@triton.jit
def scale_of_rows(x_ptr, k_in, eps, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The norm's scale ``[r]``, from a loop over x of its own."""
    squares = tl.zeros((ROWS_PADDED, BLOCK_K), dtype=tl.float32)
    for k in range(0, k_in, BLOCK_K):
        x32_rk = load_inputs(x_ptr, k + tl.arange(0, BLOCK_K), k_in, ROWS, ROWS_PADDED).to(tl.float32)
        squares += x32_rk * x32_rk
    return tl.rsqrt(tl.sum(squares, axis=1) / k_in + eps)


@triton.jit
def weighted(x32_rk, norm_ptr, col_k, k_in):
    """Activations times the norm's weight."""
    return x32_rk * tl.load(norm_ptr + col_k, mask=col_k < k_in, other=0.0).to(tl.float32)[None, :]


@triton.jit
def multiply(acc, w_nk, x_rk, DOT: tl.constexpr):
    if DOT:
        acc = dot(w_nk, tl.trans(x_rk), acc)
    else:
        acc += w_nk.to(tl.float32) * x_rk.to(tl.float32)
    return acc


@triton.jit
def finish(acc, scale_r, bias_ptr, row_n, DOT: tl.constexpr):
    """Scaled sums ``[n, r]`` with their bias."""
    y_nr = acc if DOT else tl.sum(acc, axis=1, keep_dims=True)
    y_nr *= scale_r[None, :]
    if bias_ptr is not None:
        y_nr += tl.load(bias_ptr + row_n).to(tl.float32)[:, None]
    return y_nr


@triton.jit
def store_rows(y_ptr, residual_ptr, y_nr, out_n, n_out, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Write ``[n, r]`` as ``[r, n]``, with the residual added."""
    row_r = tl.arange(0, ROWS_PADDED)
    at_nr = row_r[None, :] * n_out + out_n[:, None]
    mask = (row_r < ROWS)[None, :] & (out_n < n_out)[:, None]
    if residual_ptr is not None:
        y_nr += tl.load(residual_ptr + at_nr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_nr, y_nr.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normed_inputs(
    x_ptr,
    norm_ptr,
    scale_r,
    squares,
    col_k,
    k_in,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DOT: tl.constexpr,
):
    """Some columns of x ``[r, k]`` as they are multiplied, and the squares summed so far."""
    x_rk = load_inputs(x_ptr, col_k, k_in, ROWS, ROWS_PADDED)
    if norm_ptr is not None:
        x32_rk = x_rk.to(tl.float32)
        if SCALE_FIRST:
            x32_rk *= scale_r[:, None]
        else:
            squares += x32_rk * x32_rk
        x32_rk = weighted(x32_rk, norm_ptr, col_k, k_in)
        x_rk = x32_rk.to(x_rk.dtype) if DOT else x32_rk
    return x_rk, squares


@triton.jit
def scale_before(
    x_ptr, k_in, eps, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, SCALE_FIRST: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The scale of each row that goes into x."""
    if SCALE_FIRST:
        scale_r = scale_of_rows(x_ptr, k_in, eps, ROWS, ROWS_PADDED, BLOCK_K)
    else:
        scale_r = tl.full((ROWS_PADDED,), 1.0, dtype=tl.float32)
    return scale_r


@triton.jit
def scale_after(norm_ptr, squares, k_in, eps, ROWS_PADDED: tl.constexpr, SCALE_FIRST: tl.constexpr):
    """The scale of each row that the sums take: none where it is in x already."""
    if SCALE_FIRST:
        scale_r = tl.full((ROWS_PADDED,), 1.0, dtype=tl.float32)
    elif norm_ptr is not None:
        scale_r = tl.rsqrt(tl.sum(squares, axis=1) / k_in + eps)
    else:
        scale_r = tl.full((ROWS_PADDED,), 1.0, dtype=tl.float32)
    return scale_r
