"""``linear`` and ``gate_up`` of :mod:`fastllama_kernels.linear.op` in Triton, for 1 to 16 rows.

    y[r, n] = s[r] · Σ_k x[r, k] · g[k] · W[n, k] + bias[n] + residual[r, n]      s[r] = 1 / sqrt(mean_k x[r, k]² + eps)

without s and g where no norm weight is given; gate_up computes rows n and F + n of W in one program and writes
act(gate) · up. The norm costs no pass of its own: squares are summed in the loop that multiplies, and the scale, which
is common to a row, comes last. (In float16, where x·g may overflow, a loop over x goes before.)

A program owns a few rows of W and streams them once, in tiles of 16-byte loads into shared memory; some tiles are on
their way while one is multiplied, and the first ones go to the L2 cache before the kernel waits for its input
(:mod:`fastllama_kernels.common.pdl`). x is small and stays on the chip. One row is multiplied in float32 lanes, more
rows on the tensor cores, where 16 rows cost what 2 do. Sums are float32.

Bytes moved: the matrix once, N·K·itemsize. Needs compute capability 8.0, or the interpreter. Any N and K; loads are
of full width where K is a multiple of 16.

Shape suffixes: ``r`` rows, ``n`` output features, ``k`` input features, ``f`` FFN dim.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import activations, pdl, tiles
from fastllama_kernels.common.checks import check, check_activation, check_dtype
from fastllama_kernels.common.launch import Launch, cdiv, next_power_of_2
from fastllama_kernels.common.products import dot
from fastllama_kernels.linear import op as linear_op

MAX_ROWS = linear_op.MAX_ROWS["cuda"]
DOT_ROWS = 16  # what a matrix unit takes at once
LINE_BYTES, MAX_LINES = 128, 32  # of a row of the matrix that go to the L2 cache before the wait
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
def _prefetch_rows(w_ptr, row_n, k_in, is_row_n, LINES: tl.constexpr, LINE: tl.constexpr):
    """Send for the beginnings of some rows of the matrix."""
    line_k = tl.arange(0, LINES) * LINE
    pdl.prefetch(w_ptr + row_n[:, None] * k_in + line_k[None, :], is_row_n[:, None] & (line_k < k_in)[None, :])


@triton.jit
def _weights(w_ptr, row_n, col_k, k_in):
    pointers = w_ptr + row_n[:, None] * k_in + col_k[None, :]
    return tl.load(pointers, mask=(col_k < k_in)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _activations(x_ptr, col_k, k_in, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr):
    row_r = tl.arange(0, ROWS_PADDED)
    mask = (row_r < ROWS)[:, None] & (col_k < k_in)[None, :]
    return tl.load(x_ptr + row_r[:, None] * k_in + col_k[None, :], mask=mask, other=0.0)


@triton.jit
def _scale_of_rows(x_ptr, k_in, eps, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The norm's scale ``[r]``, from a loop over x of its own."""
    squares = tl.zeros((ROWS_PADDED, BLOCK_K), dtype=tl.float32)
    for k in range(0, k_in, BLOCK_K):
        x32_rk = _activations(x_ptr, k + tl.arange(0, BLOCK_K), k_in, ROWS, ROWS_PADDED).to(tl.float32)
        squares += x32_rk * x32_rk
    return tl.rsqrt(tl.sum(squares, axis=1) / k_in + eps)


@triton.jit
def _weighted(x32_rk, norm_ptr, col_k, k_in):
    """Activations times the norm's weight."""
    return x32_rk * tl.load(norm_ptr + col_k, mask=col_k < k_in, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _multiply(acc, w_nk, x_rk, DOT: tl.constexpr):
    if DOT:
        acc = dot(w_nk, tl.trans(x_rk), acc)
    else:
        acc += w_nk.to(tl.float32) * x_rk.to(tl.float32)
    return acc


@triton.jit
def _finish(acc, scale_r, bias_ptr, row_n, DOT: tl.constexpr):
    """Scaled sums ``[n, r]`` with their bias."""
    y_nr = acc if DOT else tl.sum(acc, axis=1, keep_dims=True)
    y_nr *= scale_r[None, :]
    if bias_ptr is not None:
        y_nr += tl.load(bias_ptr + row_n).to(tl.float32)[:, None]
    return y_nr


@triton.jit
def _store(y_ptr, residual_ptr, y_nr, out_n, n_out, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Write ``[n, r]`` as ``[r, n]``, with the residual added."""
    row_r = tl.arange(0, ROWS_PADDED)
    at_nr = row_r[None, :] * n_out + out_n[:, None]
    mask = (row_r < ROWS)[None, :] & (out_n < n_out)[:, None]
    if residual_ptr is not None:
        y_nr += tl.load(residual_ptr + at_nr, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_nr, y_nr.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    n_out,
    k_in,
    eps,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    out_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(out_n, n_out - 1).to(tl.int64)  # rows past the end read the last one again
    if PDL:
        _prefetch_rows(w_ptr, row_n, k_in, out_n < n_out, LINES, LINE)
        if GATED:
            _prefetch_rows(w_ptr, row_n + n_out, k_in, out_n < n_out, LINES, LINE)
    pdl.wait_for_previous(PDL)

    if SCALE_FIRST:
        scale_r = _scale_of_rows(x_ptr, k_in, eps, ROWS, ROWS_PADDED, BLOCK_K)
    else:
        scale_r = tl.full((ROWS_PADDED,), 1.0, dtype=tl.float32)
    squares = tl.zeros((ROWS_PADDED, BLOCK_K), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_N, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, k_in, BLOCK_K, num_stages=STAGES):
        col_k = k + tl.arange(0, BLOCK_K)
        w_nk = _weights(w_ptr, row_n, col_k, k_in)
        if GATED:
            up_nk = _weights(w_ptr, row_n + n_out, col_k, k_in)
        x_rk = _activations(x_ptr, col_k, k_in, ROWS, ROWS_PADDED)
        if norm_ptr is not None:
            x32_rk = x_rk.to(tl.float32)
            if SCALE_FIRST:
                x32_rk *= scale_r[:, None]
            else:
                squares += x32_rk * x32_rk
            x32_rk = _weighted(x32_rk, norm_ptr, col_k, k_in)
            x_rk = x32_rk.to(x_rk.dtype) if DOT else x32_rk
        acc = _multiply(acc, w_nk, x_rk, DOT)
        if GATED:
            up_acc = _multiply(up_acc, up_nk, x_rk, DOT)

    if SCALE_FIRST:
        scale_r = tl.full((ROWS_PADDED,), 1.0, dtype=tl.float32)  # it is in x already
    elif norm_ptr is not None:
        scale_r = tl.rsqrt(tl.sum(squares, axis=1) / k_in + eps)
    y_nr = _finish(acc, scale_r, bias_ptr, row_n, DOT)
    if GATED:
        y_nr = activate(y_nr, ACTIVATION) * _finish(up_acc, scale_r, bias_ptr, row_n + n_out, DOT)
    _store(y_ptr, residual_ptr, y_nr, out_n, n_out, ROWS, ROWS_PADDED)


def plan_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    activation: int | None,
    chip: tuple[int, int] | None = None,
    tile: tiles.GemvTile | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor it fills.

    Args:
        x: ``[..., k]``, at most MAX_ROWS rows.
        weight: ``[n, k]``; ``[2f, k]`` with an activation.
        bias: ``[n]`` (``[2f]``), or None.
        norm_weight: ``[k]``, or None for no norm.
        eps: of the norm.
        residual: shaped like the result, or None; not with an activation.
        activation: number of the activation of a gate_up, or None for a plain linear.
        chip: compute capability to make it for; None: that of the tensors' device.
        tile: to use instead of the one in :mod:`fastllama_kernels.common.tiles`.

    Raises:
        ValueError: arguments that the kernel would misread, or too many rows.
    """
    rows, k_in = check_arguments(x, weight, bias, norm_weight, residual, activation)
    gated = activation is not None
    n_out = weight.shape[0] // (1 + gated)
    y = x.new_empty((*x.shape[:-1], n_out))
    tile = tile or tiles.gemv(chip or tiles.capability(x.device), rows, n_out, k_in, x.dtype, gated)
    with_pdl = pdl.used(x.device, chip)
    arguments = {
        "x_ptr": x, "w_ptr": weight, "bias_ptr": bias, "norm_ptr": norm_weight, "residual_ptr": residual, "y_ptr": y,
        "n_out": n_out, "k_in": k_in, "eps": float(eps),
    }  # fmt: skip
    launch = Launch(
        "gate_up" if gated else "linear",
        _gemv_kernel,
        (cdiv(n_out, tile.block_n),),
        arguments,
        _constants(x, norm_weight is not None, activation, tile, with_pdl),
        reads=sum(tensor.nbytes for tensor in (x, weight, bias, norm_weight, residual) if tensor is not None),
        writes=y.nbytes,
        warps=tile.warps,
        stages=tile.stages,
        pdl=with_pdl,
    )
    return launch, y


def _constants(
    x: torch.Tensor, has_norm: bool, activation: int | None, tile: tiles.GemvTile, with_pdl: bool
) -> dict[str, int | bool]:
    rows, k_in = x.shape[:-1].numel(), x.shape[-1]
    many, line = rows > 1, LINE_BYTES // x.itemsize
    return {
        "ROWS": rows, "ROWS_PADDED": DOT_ROWS if many else 1,
        "GATED": activation is not None, "ACTIVATION": activation or 0,
        "SCALE_FIRST": many and has_norm and x.dtype == torch.float16, "DOT": many,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "LINES": min(MAX_LINES, next_power_of_2(cdiv(k_in, line))), "LINE": line, "PDL": with_pdl,
    }  # fmt: skip


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int | None,
) -> tuple[int, int]:
    """Rows and input features; raises ValueError for what the kernel would misread."""
    check_dtype("x", x)
    check("x", x, x)
    k_in = x.shape[-1]
    check("weight", weight, x, (None, k_in))
    out_features, rows = weight.shape[0], x.shape[:-1].numel()
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x has {rows} rows, the kernel takes 1 to {MAX_ROWS}; use torch's GEMM above")
    if activation is not None and out_features % 2:
        raise ValueError(f"weight has {out_features} rows, expected an even number: gate and up")
    if activation is not None:
        check_activation(activation)
    if bias is not None:
        check("bias", bias, x, (out_features,))
    if norm_weight is not None:
        check("norm_weight", norm_weight, x, (k_in,))
    if residual is not None:
        check("residual", residual, x, (*x.shape[:-1], out_features))
    return rows, k_in


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``norm(x) @ weightᵀ + bias + residual``: ``[..., n]``, in x's dtype; see :func:`plan_launch`."""
    launch, y = plan_launch(x, weight, bias, norm_weight, eps, residual, None)
    launch.run()
    return y


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
) -> torch.Tensor:
    """``act(gate) · up``: ``[..., f]``, in x's dtype; see :func:`plan_launch` for the arguments."""
    launch, y = plan_launch(x, weight, bias, norm_weight, eps, None, activation)
    launch.run()
    return y


torch.library.impl("fastllama::linear", "CUDA", linear)
torch.library.impl("fastllama::gate_up", "CUDA", gate_up)
