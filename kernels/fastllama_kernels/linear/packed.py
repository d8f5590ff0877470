"""Products with matrices of 4- and 8-bit codes: how they lie in memory, and what they stand for.

A matrix ``[n, k]`` is cut into panels of PANEL rows (the last one filled up with zeros), and each panel into lines of
64 bytes: all its rows times a few columns. Whoever reads a panel from its beginning to its end reads memory in order,
and each column of x serves 16 rows at once.

    codes[p, l, 4 r + i]   8 bits: the code of row 16 p + r, column 4 l + i
                           4 bits: that of column 8 l + i in the low half, that of column 8 l + 4 + i in the high half
    scales[p, g, r]        of row 16 p + r and of the columns g · group to (g + 1) · group - 1; float16
    offsets[p, g, r]       likewise, or none

Codes are unsigned. They stand for

    W[n, k] = scale · (code - 2^(bits - 1))     without offsets
    W[n, k] = scale · code + offset             with them

The operations are those of :mod:`fastllama_kernels.linear.op`, with such a matrix. With ``codes_inputs`` every BLOCK
columns of norm(x) become 8-bit codes with a scale of their own, max |x| / 127, and products of codes are integers;
else, on GPUs, and where many rows have the matrix written out, x stays as it is. Sums over blocks are float32.

Bytes moved per call: codes, scales and offsets once. Kernels: ``packed.cpp`` and :mod:`.packed_triton`, for x in
float32, bfloat16 and float16. Many rows have the matrix written out for torch's GEMM, on a GPU and on a CPU with a
matrix unit.

Shape suffixes: ``p`` panels, ``l`` lines, ``g`` groups, ``n`` output features, ``k`` input features, ``f`` FFN dim.
"""

from __future__ import annotations

import functools

import torch

from fastllama_kernels.common.activations import FUNCTIONS
from fastllama_kernels.linear.op import (
    SLAB_BYTES,
    gate_up_wide,
    has_matrix_unit,
    linear_wide,
    multiplies,
    rms_norm_ref,
)

PANEL = 16  # rows
LINE = 64  # bytes
BLOCK = 32  # columns of x with one scale; the least group
MAX_ROWS_AMX = 128  # up to which products of codes are taken where there are AMX tiles: assumed, not measured
LEAST = 1e-35  # largest of a block that counts as zero: 127 over less is too large for float32

torch.library.define(
    "fastllama::linear_packed",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? bias, Tensor? norm_weight, float eps, "
    "Tensor? residual, bool codes_inputs) -> Tensor",
)
torch.library.define(
    "fastllama::gate_up_packed",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? bias, Tensor? norm_weight, float eps, "
    "int activation, bool codes_inputs) -> Tensor",
)
torch.library.define(
    "fastllama::written_out",
    "(Tensor like, Tensor codes, Tensor scales, Tensor? offsets, int first, int last) -> Tensor",
)
torch.library.define(
    "fastllama::embed_packed",
    "(Tensor like, Tensor ids, Tensor codes, Tensor scales, Tensor? offsets) -> Tensor",
)


def packed(code_nk: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[n, k]``, uint8, as ``[p, l, 64]``; n is a multiple of PANEL, k of 32 / bits."""
    n, k = code_nk.shape
    columns = 32 // bits
    parts = code_nk.view(n // PANEL, PANEL, k // columns, columns // 4, 4).permute(0, 2, 3, 1, 4)  # p, l, part, r, i
    line = parts[:, :, 0] if bits == 8 else parts[:, :, 0] | parts[:, :, 1] << 4
    return line.reshape(n // PANEL, k // columns, LINE)


def unpacked(codes_pl: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes ``[n, k]`` of ``[p, l, 64]``, uint8."""
    p, lines, _ = codes_pl.shape
    parts = [codes_pl] if bits == 8 else [codes_pl & 15, codes_pl >> 4]
    stacked = torch.stack([part.view(p, lines, PANEL, 4) for part in parts], dim=3)  # p, l, r, part, i
    return stacked.transpose(1, 2).reshape(p * PANEL, lines * 32 // bits)


def by_panel(values_ng: torch.Tensor) -> torch.Tensor:
    """Scales or offsets ``[n, g]`` as ``[p, g, 16]``."""
    n, groups = values_ng.shape
    return values_ng.view(n // PANEL, PANEL, groups).transpose(1, 2).contiguous()


def bits_of(codes_pl: torch.Tensor, k: int) -> int:
    """Bits of a code, from the number of lines that k columns take."""
    return codes_pl.shape[1] * 32 // k


def dequantized(
    codes_pl: torch.Tensor,
    scales_pg: torch.Tensor,
    offsets_pg: torch.Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix ``[n, k]`` in a floating-point dtype, computed in that or in float32."""
    bits = bits_of(codes_pl, k)
    dtype32 = torch.promote_types(dtype, torch.float32)
    groups = scales_pg.shape[1]

    def by_row(values_pg: torch.Tensor) -> torch.Tensor:
        return values_pg.transpose(1, 2).reshape(-1, groups, 1).to(dtype32)

    code_ngk = unpacked(codes_pl, bits).view(-1, groups, k // groups).to(dtype32)
    if offsets_pg is None:
        weight = code_ngk.sub_(2 ** (bits - 1)).mul_(by_row(scales_pg))
    else:
        weight = code_ngk.mul_(by_row(scales_pg)).add_(by_row(offsets_pg))
    return weight.view(-1, k).to(dtype)


def embed_packed_ref(
    like_k: torch.Tensor,
    ids: torch.Tensor,
    codes_pl: torch.Tensor,
    scales_pg: torch.Tensor,
    offsets_pg: torch.Tensor | None,
) -> torch.Tensor:
    """Rows ``ids`` ``[...]`` of the matrix, ``[..., k]`` in the dtype of ``like_k``."""
    k = like_k.shape[0]
    panel, row = ids // PANEL, ids % PANEL
    bits = bits_of(codes_pl, k)
    line = codes_pl.unflatten(2, (PANEL, 4))[panel, :, row]  # ..., l, 4
    code = line if bits == 8 else torch.stack([line & 15, line >> 4], dim=-2)
    code = code.flatten(ids.dim()).unflatten(-1, (scales_pg.shape[1], -1)).float()  # ..., g, group
    scale = scales_pg[panel, :, row].float().unsqueeze(-1)
    if offsets_pg is None:
        rows = (code - 2 ** (bits - 1)) * scale
    else:
        rows = code * scale + offsets_pg[panel, :, row].float().unsqueeze(-1)
    return rows.flatten(-2).to(like_k.dtype)


def quotient(number: float, x: torch.Tensor) -> torch.Tensor:
    """``number / x``, rounded once, and 0 where x is no more than LEAST; torch's own takes x's reciprocal first."""
    return torch.where(x.abs() > LEAST, torch.full_like(x, number) / x, 0.0)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """X as its 8-bit codes stand for it: BLOCK columns share a scale."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks * quotient(127.0, largest)).round()
    return (codes * (largest / 127)).flatten(-2)


def linear_packed_ref(x, codes, scales, offsets, bias, norm_weight, eps, residual, codes_inputs) -> torch.Tensor:
    """``linear_packed`` in torch operators: the matrix is written out, x is rounded if its codes are asked for."""
    if norm_weight is not None:
        x = rms_norm_ref(x, norm_weight, eps)
    if codes_inputs:
        x = rounded_inputs(x.float()).to(x.dtype)
    y = torch.nn.functional.linear(x, dequantized(codes, scales, offsets, x.shape[-1], x.dtype), bias)
    return y if residual is None else residual + y


def gate_up_packed_ref(x, codes, scales, offsets, bias, norm_weight, eps, activation, codes_inputs) -> torch.Tensor:
    """``gate_up_packed`` in torch operators."""
    both = linear_packed_ref(x, codes, scales, offsets, bias, norm_weight, eps, None, codes_inputs)
    gate, up = both.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up


def written_out_ref(like, codes, scales, offsets, first, last) -> torch.Tensor:
    """Weights ``[n, k]`` of panels ``first`` to ``last - 1``, in the dtype of ``like`` ``[..., k]``."""
    offsets = None if offsets is None else offsets[first:last]
    return dequantized(codes[first:last], scales[first:last], offsets, like.shape[-1], like.dtype)


@functools.cache
def max_rows_cpu(dtype: torch.dtype) -> int | None:
    """Rows up to which products of codes are faster than torch's GEMM with the matrix written out; None: always.

    It is the processor's matrix unit (AMX), which torch uses and these kernels do not, that makes it faster.
    """
    return MAX_ROWS_AMX if dtype == torch.bfloat16 and multiplies(dtype) and has_matrix_unit() else None


def linear_packed_slabs(x, codes, scales, offsets, bias, norm_weight, eps, residual, codes_inputs) -> torch.Tensor:
    """``linear_packed`` of many rows on a CPU: some panels at a time are written out for torch's GEMM, x stays."""
    if norm_weight is not None:
        x = torch.ops.fastllama.rms_norm(x, norm_weight, eps)
    x_rk, panels = x.flatten(0, -2), codes.shape[0]
    y = x.new_empty((*x.shape[:-1], panels * PANEL))
    y_rn, step = y.view(-1, panels * PANEL), max(1, SLAB_BYTES // (PANEL * x.shape[-1] * x.itemsize))
    for first in range(0, panels, step):
        last = min(first + step, panels)
        rows = slice(first * PANEL, last * PANEL)
        product = x_rk @ torch.ops.fastllama.written_out(x, codes, scales, offsets, first, last).t()
        product = product if bias is None else product.add_(bias[rows])
        y_rn[:, rows] = product if residual is None else product.add_(residual.reshape(y_rn.shape)[:, rows])
    return y


def gate_up_packed_slabs(x, codes, scales, offsets, bias, norm_weight, eps, activation, codes_inputs) -> torch.Tensor:
    """``gate_up_packed`` of many rows on a CPU, likewise."""
    both = linear_packed_slabs(x, codes, scales, offsets, bias, norm_weight, eps, None, codes_inputs)
    return torch.ops.fastllama.silu_mul(both, activation)


def linear_packed_wide(x, codes, scales, offsets, bias, norm_weight, eps, residual, codes_inputs) -> torch.Tensor:
    """``linear_packed`` of many rows on a GPU: the matrix is written out for one GEMM, x stays as it is."""
    weight = dequantized(codes, scales, offsets, x.shape[-1], x.dtype)
    return linear_wide(x, weight, bias, norm_weight, eps, residual)


def gate_up_packed_wide(x, codes, scales, offsets, bias, norm_weight, eps, activation, codes_inputs) -> torch.Tensor:
    """``gate_up_packed`` of many rows on a GPU."""
    weight = dequantized(codes, scales, offsets, x.shape[-1], x.dtype)
    return gate_up_wide(x, weight, bias, norm_weight, eps, activation)


@torch.library.register_fake("fastllama::linear_packed")
def _linear_fake(x, codes, scales, offsets, bias, norm_weight, eps, residual, codes_inputs):
    return x.new_empty((*x.shape[:-1], codes.shape[0] * PANEL))


@torch.library.register_fake("fastllama::written_out")
def _written_fake(like, codes, scales, offsets, first, last):
    return like.new_empty(((last - first) * PANEL, like.shape[-1]))


@torch.library.register_fake("fastllama::embed_packed")
def _embed_fake(like, ids, codes, scales, offsets):
    return like.new_empty((*ids.shape, like.shape[0]))


@torch.library.register_fake("fastllama::gate_up_packed")
def _gate_up_fake(x, codes, scales, offsets, bias, norm_weight, eps, activation, codes_inputs):
    return x.new_empty((*x.shape[:-1], codes.shape[0] * PANEL // 2))
