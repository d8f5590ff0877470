"""The gated activation between two matrices of an FFN, in Triton.

    y[..., f] = act(x[..., f]) · x[..., F + f]        act is SiLU (arXiv 2002.05202) or another of the activations

in float32, rounded once. Bytes moved: x once, y once, 3·F·itemsize a row. For more rows than the GEMV takes, after the
one GEMM of cuBLAS that both projections are; its reference is :func:`fastllama_kernels.linear.op.silu_mul_ref`.

Shape suffixes: leading dimensions ``...``, ``f`` FFN dim.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_activation, check_dtype
from fastllama_kernels.common.launch import Launch, cdiv
from fastllama_kernels.linear.program import activate

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(x_ptr, y_ptr, features, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    col_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col_f < features
    pdl.wait_for_previous(PDL)
    gate_f = tl.load(x_ptr + row * 2 * features + col_f, mask=mask, other=0.0).to(tl.float32)
    up_f = tl.load(x_ptr + (row * 2 + 1) * features + col_f, mask=mask, other=0.0).to(tl.float32)
    y_f = activate(gate_f, ACTIVATION) * up_f
    tl.store(y_ptr + row * features + col_f, y_f.to(y_ptr.dtype.element_ty), mask=mask)


def plan_launch(
    x: torch.Tensor, activation: int = 0, chip: tuple[int, int] | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the tensor ``[..., f]`` it fills.

    Args:
        x: gate and up side by side, ``[..., 2f]``.
        activation: number of the activation.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    check_dtype("x", x)
    check("x", x, x)
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected an even number of features: gate and up")
    check_activation(activation)
    features = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], features))
    with_pdl = pdl.used(x.device, chip)
    arguments = {"x_ptr": x, "y_ptr": y, "features": features}
    constants = {"ACTIVATION": activation, "BLOCK": BLOCK, "PDL": with_pdl}
    grid = (y.numel() // features, cdiv(features, BLOCK))  # the first dimension has no limit that rows would reach
    return Launch("silu_mul", _silu_mul_kernel, grid, arguments, constants, x.nbytes, y.nbytes, pdl=with_pdl), y


def silu_mul(x: torch.Tensor, activation: int = 0) -> torch.Tensor:
    """``act(gate) · up``: ``[..., f]``, in x's dtype; see :func:`plan_launch` for the arguments."""
    launch, y = plan_launch(x, activation)
    launch.run()
    return y


torch.library.impl("fastllama::silu_mul", "CUDA", silu_mul)
