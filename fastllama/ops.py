"""The one door to the kernels: which implementation of an operation runs, and why.

The choice is made while a step is traced, from device, dtype and shapes alone, so it costs nothing per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastllama_kernels import attention as attention_op
from fastllama_kernels import cpu_extension
from fastllama_kernels import linear as linear_op

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """One row of :func:`report`."""

    op: str
    implementation: str
    reason: str


@torch.compiler.assume_constant_result
def _without_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for this device and dtype, or None if they can."""
    if device_type != "cpu":
        return f"there is no {device_type} kernel yet; torch.compile fuses the reference"
    if dtype not in KERNEL_DTYPES:
        return f"the CPU kernels take float32, bfloat16 and float16, not {dtype}"
    return cpu_extension.load()


def _few_rows(x: torch.Tensor) -> bool:
    return x.shape[:-1].numel() <= linear_op.MAX_ROWS


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``norm(x) @ weightᵀ + bias + residual``; see :mod:`fastllama_kernels.linear`."""
    if _few_rows(x) and _without_kernels(x.device.type, x.dtype) is None:
        return linear_op.linear(x, weight, bias, norm_weight, eps, residual)
    return linear_op.linear_ref(x, weight, bias, norm_weight, eps, residual)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "silu",
) -> torch.Tensor:
    """``act(gate) · up`` of one fused matrix; see :mod:`fastllama_kernels.linear`."""
    if _few_rows(x) and _without_kernels(x.device.type, x.dtype) is None:
        return linear_op.gate_up(x, weight, bias, norm_weight, eps, activation)
    return linear_op.gate_up_ref(x, weight, bias, norm_weight, eps, activation)


def rotary_attention(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
) -> torch.Tensor:
    """Rotary, KV write and attention; see :mod:`fastllama_kernels.attention`."""
    args = (qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    if _without_kernels(qkv_btn.device.type, qkv_btn.dtype) is None:
        return attention_op.rotary_attention(*args)
    return attention_op.rotary_attention_ref(*args)


def report(device: torch.device | str, dtype: torch.dtype) -> list[Choice]:
    """What a decode step on this device and dtype would run, op by op, and why."""
    reason = _without_kernels(torch.device(device).type, dtype)
    chosen = "C++ kernel" if reason is None else "torch"
    rows, tokens = linear_op.MAX_ROWS, attention_op.MAX_TOKENS
    return [
        Choice("linear", chosen, reason or f"up to {rows} rows; torch's GEMM above"),
        Choice("gate_up", chosen, reason or f"up to {rows} rows; torch's GEMM above"),
        Choice("rotary_attention", chosen, reason or f"up to {tokens} tokens a row; torch's flash attention above"),
        Choice("embedding, sampling", "Inductor", "fused by torch.compile"),
    ]
