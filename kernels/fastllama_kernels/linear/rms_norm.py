"""Root-mean-square norm in Triton, plain and with a residual added before it.

    rms_norm(x)        = x / sqrt(mean(x²) + eps) · weight
    add_rms_norm(x, z) = rms_norm(x + z), x + z

over the last dimension, in float32, rounded once at the end (arXiv 1910.07467).

Bytes moved: x and y once each; x, z and both results once each. One program a row, which holds the row on the chip.
The engine does not call it: its GEMVs contain the norm, and above their rows Inductor fuses it.

Shape suffixes: leading dimensions ``...``, ``m`` model dim.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, next_power_of_2
from fastllama_kernels.linear.op import rms_norm_ref

MAX_FEATURES = 65536  # a row has to fit on the chip

torch.library.define("fastllama::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define(
    "fastllama::add_rms_norm", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)"
)


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm`` in torch operators."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    features,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    col_m = tl.arange(0, BLOCK)
    mask = col_m < features
    weight_m = tl.load(weight_ptr + col_m, mask=mask, other=0.0).to(tl.float32)
    pdl.wait_for_previous(PDL)
    at_m = tl.program_id(0).to(tl.int64) * features + col_m
    x_m = tl.load(x_ptr + at_m, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x_m += tl.load(residual_ptr + at_m, mask=mask, other=0.0).to(tl.float32)
        rounded_m = x_m.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at_m, rounded_m, mask=mask)
        x_m = rounded_m.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_m * x_m, axis=0) / features + eps)
    tl.store(y_ptr + at_m, (x_m * scale * weight_m).to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    chip: tuple[int, int] | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor | None]:
    """The launch, the normed tensor it fills, and the sum it fills where there is a residual.

    Args:
        x: ``[..., m]``.
        residual: shaped like x, or None.
        weight: ``[m]``.
        eps: added to the mean square.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    check_dtype("x", x)
    check("x", x, x)
    features = x.shape[-1]
    if not 1 <= features <= MAX_FEATURES:
        raise ValueError(f"x has {features} features, the kernel takes 1 to {MAX_FEATURES}")
    check("weight", weight, x, (features,))
    if residual is not None:
        check("residual", residual, x, x.shape)
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    block = next_power_of_2(features)
    with_pdl = pdl.used(x.device, chip)
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "y_ptr": y, "sum_ptr": total,
        "features": features, "eps": float(eps),
    }  # fmt: skip
    moved = x.nbytes * (1 if residual is None else 2)
    made = Launch(
        "rms_norm" if residual is None else "add_rms_norm",
        _rms_norm_kernel,
        (x.numel() // features,),
        arguments,
        {"BLOCK": block, "PDL": with_pdl},
        reads=moved + weight.nbytes,
        writes=moved,
        warps=min(16, max(1, block // 256)),
        pdl=with_pdl,
    )
    return made, y, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · weight``, in x's dtype; see :func:`launch` for the arguments."""
    made, y, _ = launch(x, None, weight, eps)
    made.run()
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum, both in x's dtype; see :func:`launch` for the arguments."""
    made, y, total = launch(x, residual, weight, eps)
    assert total is not None
    made.run()
    return y, total


@torch.library.register_fake("fastllama::rms_norm")
def _rms_norm_fake(x, weight, eps):
    return torch.empty_like(x)


@torch.library.register_fake("fastllama::add_rms_norm")
def _add_rms_norm_fake(x, residual, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


torch.library.impl("fastllama::rms_norm", "CPU", rms_norm_ref)
torch.library.impl("fastllama::add_rms_norm", "CPU", add_rms_norm_ref)
torch.library.impl("fastllama::rms_norm", "CUDA", rms_norm)
torch.library.impl("fastllama::add_rms_norm", "CUDA", add_rms_norm)
