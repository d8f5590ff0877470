"""``linear_packed`` and ``gate_up_packed`` of :mod:`fastllama_kernels.linear.packed` in Triton, for 1 to 16 rows.

The formulas and the rest of the program (:mod:`fastllama_kernels.linear.program`) are those of
:mod:`fastllama_kernels.linear.triton`; only a tile of the matrix comes from elsewhere. Codes are loaded 16 bytes at a
time in the order in which they lie, and become numbers in registers, ``(code - middle) · scale`` or
``code · scale + offset``. A program owns one panel of 16 rows, or a panel of gate and the one of up, and streams it
from its beginning to its end. The warps of a program divide the columns of one row of x: of few panels each has as many
warps as fill a multiprocessor. Activations stay as they are: ``codes_inputs`` is for processors whose integers are
faster.

Bytes moved: codes, scales and offsets once. Needs compute capability 8.0, or the interpreter.

Shape suffixes: ``n`` the 16 rows of a panel, ``r`` rows of x, ``k`` input features, ``l`` lines, ``b`` blocks of 32
columns.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl, tiles
from fastllama_kernels.common.checks import check, check_activation, check_dtype
from fastllama_kernels.common.launch import Launch, next_power_of_2
from fastllama_kernels.linear.packed import BLOCK, LINE, PANEL, bits_of
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
from fastllama_kernels.linear.triton import MAX_ROWS

WARPS, MAX_WARPS, STAGES = 4, 16, 3
COLUMNS = 64  # at a time, for each warp; half as many of gate and up, unless loads would get narrow
WARPS_TOGETHER = 16  # that a multiprocessor runs at once, registers permitting
PREFETCHED = 4096  # bytes of a panel that go to the L2 cache before the wait
CACHE_LINE = 128
PANEL_ROWS, LINE_BYTES, SCALED = tl.constexpr(PANEL), tl.constexpr(LINE), tl.constexpr(BLOCK)


@triton.jit
def _prefetch_panel(codes_ptr, panel, nbytes, BYTES: tl.constexpr, AT_ONCE: tl.constexpr):
    """Send for the beginning of a panel."""
    byte = tl.arange(0, BYTES // AT_ONCE) * AT_ONCE
    pdl.prefetch(codes_ptr + panel * nbytes + byte, byte < nbytes)


@triton.jit
def _codes(codes_ptr, panel, first, lines, LINES: tl.constexpr, BITS: tl.constexpr):
    """The codes of some lines as float32 ``[n, k]``, columns in order."""
    line_l, byte = first + tl.arange(0, LINES), tl.arange(0, LINE_BYTES)
    pointers = codes_ptr + (panel * lines + line_l)[:, None] * LINE_BYTES + byte[None, :]
    stored = tl.load(pointers, mask=(line_l < lines)[:, None], other=0, eviction_policy="evict_first")
    if BITS == 8:
        code = tl.permute(tl.reshape(stored, (LINES, PANEL_ROWS, 4)), (1, 0, 2))
    else:
        both = tl.reshape(tl.join(stored & 15, stored >> 4), (LINES, PANEL_ROWS, 4, 2))
        code = tl.permute(both, (1, 0, 3, 2))
    return tl.reshape(code, (PANEL_ROWS, LINES * 32 // BITS)).to(tl.float32)


@triton.jit
def _spread(values_ptr, panel, k, k_in, group, BLOCK_K: tl.constexpr):
    """Scales or offsets of some columns ``[n, k]``."""
    col_b, row_n = k + tl.arange(0, BLOCK_K // SCALED) * SCALED, tl.arange(0, PANEL_ROWS)
    pointers = values_ptr + (panel * (k_in // group) + col_b // group)[None, :] * PANEL_ROWS + row_n[:, None]
    values_nb = tl.load(pointers, mask=(col_b < k_in)[None, :], other=0.0).to(tl.float32)
    spread = tl.broadcast_to(values_nb[:, :, None], (PANEL_ROWS, BLOCK_K // SCALED, SCALED))
    return tl.reshape(spread, (PANEL_ROWS, BLOCK_K))


@triton.jit
def _panel_tile(codes_ptr, scales_ptr, offsets_ptr, panel, k, k_in, group, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weights of a panel and some columns, float32 ``[n, k]``."""
    code_nk = _codes(codes_ptr, panel, k * BITS // 32, k_in * BITS // 32, BLOCK_K * BITS // 32, BITS)
    scale_nk = _spread(scales_ptr, panel, k, k_in, group, BLOCK_K)
    if offsets_ptr is None:
        w_nk = (code_nk - (1 << (BITS - 1))) * scale_nk
    else:
        w_nk = code_nk * scale_nk + _spread(offsets_ptr, panel, k, k_in, group, BLOCK_K)
    return w_nk


@triton.jit
def _packed_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    n_out,
    k_in,
    group,
    eps,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    panel = tl.program_id(0).to(tl.int64)
    up_panel = panel + n_out // PANEL_ROWS
    if PDL:
        _prefetch_panel(codes_ptr, panel, k_in * BITS * PANEL_ROWS // 8, PREFETCHED, AT_ONCE)
        if GATED:
            _prefetch_panel(codes_ptr, up_panel, k_in * BITS * PANEL_ROWS // 8, PREFETCHED, AT_ONCE)
    pdl.wait_for_previous(PDL)

    scale_r = scale_before(x_ptr, k_in, eps, ROWS, ROWS_PADDED, SCALE_FIRST, BLOCK_K)
    squares = tl.zeros((ROWS_PADDED, BLOCK_K), dtype=tl.float32)
    acc = tl.zeros((PANEL_ROWS, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    up_acc = tl.zeros((PANEL_ROWS, ROWS_PADDED if DOT else BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, k_in, BLOCK_K, num_stages=STAGES):
        col_k = k + tl.arange(0, BLOCK_K)
        w_nk = _panel_tile(codes_ptr, scales_ptr, offsets_ptr, panel, k, k_in, group, BITS, BLOCK_K)
        x_rk, squares = normed_inputs(
            x_ptr, norm_ptr, scale_r, squares, col_k, k_in, ROWS, ROWS_PADDED, SCALE_FIRST, DOT
        )
        acc = multiply(acc, w_nk.to(x_rk.dtype) if DOT else w_nk, x_rk, DOT)
        if GATED:
            up_nk = _panel_tile(codes_ptr, scales_ptr, offsets_ptr, up_panel, k, k_in, group, BITS, BLOCK_K)
            up_acc = multiply(up_acc, up_nk.to(x_rk.dtype) if DOT else up_nk, x_rk, DOT)

    scale_r = scale_after(norm_ptr, squares, k_in, eps, ROWS_PADDED, SCALE_FIRST)
    row_n = tl.arange(0, PANEL_ROWS)
    y_nr = finish(acc, scale_r, bias_ptr, panel * PANEL_ROWS + row_n, DOT)
    if GATED:
        y_nr = activate(y_nr, ACTIVATION) * finish(up_acc, scale_r, bias_ptr, up_panel * PANEL_ROWS + row_n, DOT)
    store_rows(y_ptr, residual_ptr, y_nr, panel * PANEL_ROWS + row_n, n_out, ROWS, ROWS_PADDED)


def plan_launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    activation: int | None,
    chip: tuple[int, int] | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor it fills.

    Args:
        x: ``[..., k]``, at most MAX_ROWS rows.
        codes, scales, offsets: a packed matrix of ``[n, k]``; of ``[2f, k]`` with an activation.
        bias: ``[n]`` (``[2f]``), or None.
        norm_weight: ``[k]``, or None for no norm.
        eps: of the norm.
        residual: shaped like the result, or None; not with an activation.
        activation: number of the activation of a gate_up, or None for a plain linear.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread, or too many rows.
    """
    rows, k_in, bits = check_arguments(x, codes, scales, offsets, bias, norm_weight, residual, activation)
    gated, many = activation is not None, rows > 1
    n_out = codes.shape[0] * PANEL // (1 + gated)
    y = x.new_empty((*x.shape[:-1], n_out))
    with_pdl = pdl.used(x.device, chip)
    multiprocessors = tiles.multiprocessors(x.device, chip or tiles.capability(x.device))
    warps = WARPS if many else _warps(n_out // PANEL, multiprocessors)
    columns = COLUMNS * warps >> (gated and (many or bits == 8))
    arguments = {
        "x_ptr": x, "codes_ptr": codes, "scales_ptr": scales, "offsets_ptr": offsets, "bias_ptr": bias,
        "norm_ptr": norm_weight, "residual_ptr": residual, "y_ptr": y, "n_out": n_out, "k_in": k_in,
        "group": k_in // scales.shape[1], "eps": float(eps),
    }  # fmt: skip
    constants = {
        "ROWS": rows, "ROWS_PADDED": DOT_ROWS if many else 1, "BITS": bits,
        "GATED": gated, "ACTIVATION": activation or 0,
        "SCALE_FIRST": many and norm_weight is not None and x.dtype == torch.float16, "DOT": many,
        "BLOCK_K": min(columns, next_power_of_2(k_in)), "STAGES": STAGES, "PREFETCHED": PREFETCHED,
        "AT_ONCE": CACHE_LINE, "PDL": with_pdl,
    }  # fmt: skip
    read = (x, codes, scales, offsets, bias, norm_weight, residual)
    launch = Launch(
        "gate_up_packed" if gated else "linear_packed",
        _packed_kernel,
        (n_out // PANEL,),
        arguments,
        constants,
        reads=sum(tensor.nbytes for tensor in read if tensor is not None),
        writes=y.nbytes,
        warps=warps,
        stages=STAGES,
        pdl=with_pdl,
    )
    return launch, y


def _warps(programs: int, multiprocessors: int) -> int:
    """The warps of a program; few programs all run at once, as the last of several waves would be half empty."""
    fitting = WARPS_TOGETHER * multiprocessors // programs
    return min(max(WARPS, 1 << fitting.bit_length() >> 1), MAX_WARPS)


def check_arguments(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int | None,
) -> tuple[int, int, int]:
    """Rows, input features and bits; raises ValueError for what the kernel would misread."""
    check_dtype("x", x)
    check("x", x, x)
    k_in, rows = x.shape[-1], x.shape[:-1].numel()
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x has {rows} rows, the kernel takes 1 to {MAX_ROWS}; write the matrix out above")
    check("codes", codes, x, (None, None, LINE), torch.uint8)
    panels, bits = codes.shape[0], bits_of(codes, k_in)
    if bits not in (4, 8) or codes.shape[1] * 32 != bits * k_in or k_in % BLOCK:
        raise ValueError(f"codes have {codes.shape[1]} lines, expected {k_in // 8} or {k_in // 4} for {k_in} columns")
    groups = scales.shape[1] if scales.dim() == 3 else 0
    if not groups or k_in % (groups * BLOCK):
        raise ValueError(f"scales have {groups} groups, expected a divisor of {k_in // BLOCK}")
    for name, tensor in (("scales", scales), ("offsets", offsets)):
        if tensor is not None:
            check(name, tensor, x, (panels, groups, PANEL), torch.float16)
    if activation is not None:
        check_activation(activation)
        if panels % 2:
            raise ValueError(f"codes have {panels} panels, expected an even number: gate's and up's")
    if bias is not None:
        check("bias", bias, x, (panels * PANEL,))
    if norm_weight is not None:
        check("norm_weight", norm_weight, x, (k_in,))
    if residual is not None:
        check("residual", residual, x, (*x.shape[:-1], panels * PANEL))
    return rows, k_in, bits


def linear_packed(x, codes, scales, offsets, bias, norm_weight, eps, residual, codes_inputs) -> torch.Tensor:
    """``norm(x) @ Wᵀ + bias + residual``: ``[..., n]``, in x's dtype; see :func:`plan_launch`."""
    launch, y = plan_launch(x, codes, scales, offsets, bias, norm_weight, eps, residual, None)
    launch.run()
    return y


def gate_up_packed(x, codes, scales, offsets, bias, norm_weight, eps, activation, codes_inputs) -> torch.Tensor:
    """``act(gate) · up``: ``[..., f]``, in x's dtype; see :func:`plan_launch` for the arguments."""
    launch, y = plan_launch(x, codes, scales, offsets, bias, norm_weight, eps, None, activation)
    launch.run()
    return y


torch.library.impl("fastllama::linear_packed", "CUDA", linear_packed)
torch.library.impl("fastllama::gate_up_packed", "CUDA", gate_up_packed)
