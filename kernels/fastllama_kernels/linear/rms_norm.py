"""Root-mean-square norm in Triton.

    rms_norm(x) = x / sqrt(mean(x²) + eps) · weight

over the last dimension, in float32, rounded once at the end (arXiv 1910.07467).

Bytes moved: x and y once each. One program a row, which holds the row on the chip. For more rows than the GEMV takes,
which contains the norm; its reference is :func:`fastllama_kernels.linear.op.rms_norm_ref`.

Shape suffixes: leading dimensions ``...``, ``m`` model dim.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, next_power_of_2

MAX_FEATURES = 65536  # a row has to fit on the chip


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, features, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.let_next_start(PDL)
    col_m = tl.arange(0, BLOCK)
    mask = col_m < features
    weight_m = tl.load(weight_ptr + col_m, mask=mask, other=0.0).to(tl.float32)
    pdl.wait_for_previous(PDL)
    at_m = tl.program_id(0).to(tl.int64) * features + col_m
    x_m = tl.load(x_ptr + at_m, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_m * x_m, axis=0) / features + eps)
    tl.store(y_ptr + at_m, (x_m * scale * weight_m).to(y_ptr.dtype.element_ty), mask=mask)


def plan_launch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, chip: tuple[int, int] | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the normed tensor it fills.

    Args:
        x: ``[..., m]``.
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
    y, block = torch.empty_like(x), next_power_of_2(features)
    with_pdl = pdl.used(x.device, chip)
    launch = Launch(
        "rms_norm",
        _rms_norm_kernel,
        (x.numel() // features,),
        {"x_ptr": x, "weight_ptr": weight, "y_ptr": y, "features": features, "eps": float(eps)},
        {"BLOCK": block, "PDL": with_pdl},
        reads=x.nbytes + weight.nbytes,
        writes=y.nbytes,
        warps=min(16, max(1, block // 256)),
        pdl=with_pdl,
    )
    return launch, y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · weight``, in x's dtype; see :func:`plan_launch` for the arguments."""
    launch, y = plan_launch(x, weight, eps)
    launch.run()
    return y


torch.library.impl("fastllama::rms_norm", "CUDA", rms_norm)
