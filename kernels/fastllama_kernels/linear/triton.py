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

from fastllama_kernels.common import pdl, tiles
from fastllama_kernels.common.checks import check, check_activation, check_dtype
from fastllama_kernels.common.launch import Launch, cdiv, next_power_of_2
from fastllama_kernels.linear import op as linear_op
from fastllama_kernels.linear.program import (
    DOT_ROWS,
    activate,
    finish,
    multiply,
    normed_inputs,
    scale_after,
    scale_before,
    store_rows,
)

MAX_ROWS = linear_op.MAX_ROWS["cuda"]
LINE_BYTES, MAX_LINES = 128, 32  # of a row of the matrix that go to the L2 cache before the wait


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

    scale_r = scale_before(x_ptr, k_in, eps, ROWS, ROWS_PADDED, SCALE_FIRST, BLOCK_K)
    squares = tl.zeros((ROWS_PADDED, BLOCK_K), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_N, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, k_in, BLOCK_K, num_stages=STAGES):
        col_k = k + tl.arange(0, BLOCK_K)
        w_nk = _weights(w_ptr, row_n, col_k, k_in)
        if GATED:
            up_nk = _weights(w_ptr, row_n + n_out, col_k, k_in)
        x_rk, squares = normed_inputs(
            x_ptr, norm_ptr, scale_r, squares, col_k, k_in, ROWS, ROWS_PADDED, SCALE_FIRST, DOT
        )
        acc = multiply(acc, w_nk, x_rk, DOT)
        if GATED:
            up_acc = multiply(up_acc, up_nk, x_rk, DOT)

    scale_r = scale_after(norm_ptr, squares, k_in, eps, ROWS_PADDED, SCALE_FIRST)
    y_nr = finish(acc, scale_r, bias_ptr, row_n, DOT)
    if GATED:
        y_nr = activate(y_nr, ACTIVATION) * finish(up_acc, scale_r, bias_ptr, row_n + n_out, DOT)
    store_rows(y_ptr, residual_ptr, y_nr, out_n, n_out, ROWS, ROWS_PADDED)


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
