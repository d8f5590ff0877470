"""The one door to the kernels: which implementation of an operation runs, and why.

The choice is made while a step is traced, from device, dtype and shapes alone, so it costs nothing per token.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastllama_kernels.attention import op as attention_op
from fastllama_kernels.common import bandwidth, build
from fastllama_kernels.layers import op as layers_op
from fastllama_kernels.linear import op as linear_op
from fastllama_kernels.sampling import op as sampling_op

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
layers = layers_op.layers  # where runs_layers_at_once
Layer = layers_op.Layer
Weights = layers_op.Weights
DENSE, DENSE_BIAS, TENSORS = layers_op.DENSE, layers_op.DENSE_BIAS, layers_op.TENSORS
SamplingParams = sampling_op.SamplingParams
row_seed = sampling_op.row_seed
OPS_PER_LAYER = 5
HEADS_TAKEN = f"the kernel takes multiples of 8 up to {attention_op.MAX_HEAD_DIM}"


class Choice(NamedTuple):
    """One row of :func:`report`."""

    op: str
    implementation: str
    reason: str


def memory_reader() -> Callable[[torch.Tensor], int] | None:
    """What reads a CPU tensor with all threads and does nothing else; None where the C++ kernels cannot be built."""
    return bandwidth.read_bytes if build.load() is None else None


@torch.compiler.assume_constant_result
def _without_kernels(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for this device and dtype, or None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    device_type = torch.device(device).type
    if device_type == "cpu":
        return build.load()
    if device_type == "cuda":
        return _without_triton(device)
    return f"there is no kernel for {device_type}"


@functools.cache
def _without_triton(device: str) -> str | None:
    """Why Triton's kernels cannot run on this CUDA device, or None if they can; the reason is also logged, once."""
    reason = None
    if torch.version.hip:
        reason = "the Triton kernels have not been tried on ROCm"
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        found, wanted = torch.cuda.get_device_capability(device), MIN_CAPABILITY
        reason = f"compute capability {found[0]}.{found[1]} is below {wanted[0]}.{wanted[1]}"
    else:
        try:
            from fastllama_kernels.attention import triton as decode_attention  # noqa: F401  they register themselves
            from fastllama_kernels.linear import triton as gemv  # noqa: F401  they register themselves
            from fastllama_kernels.sampling import triton as sample  # noqa: F401  they register themselves
        except ImportError as error:
            reason = f"Triton cannot be imported: {error}"
    if reason:
        logger.warning("%s; decoding runs on torch's own operators, which is slower", reason)
    return reason


@torch.compiler.assume_constant_result
def _attention_takes(device_type: str, head_dim: int) -> bool:
    """Whether the decode attention of this kind of device takes heads of this size; if not, that is logged, once."""
    taken = attention_op.takes(device_type, head_dim)
    if not taken:
        _log_head_dim(head_dim)
    return taken


@functools.cache
def _log_head_dim(head_dim: int) -> None:
    logger.warning("head_dim %d: %s; attention runs on torch's own operators, which is slower", head_dim, HEADS_TAKEN)


def _fits(x: torch.Tensor) -> bool:
    """Whether the matrix kernels take this many rows, and beat torch's GEMM at them."""
    return x.shape[:-1].numel() <= linear_op.MAX_ROWS.get(x.device.type, 0)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``norm(x) @ weightᵀ + bias + residual``; see :mod:`fastllama_kernels.linear.op`."""
    if _fits(x) and _without_kernels(str(x.device), x.dtype) is None:
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
    """``act(gate) · up`` of one fused matrix; see :mod:`fastllama_kernels.linear.op`."""
    if _fits(x) and _without_kernels(str(x.device), x.dtype) is None:
        return linear_op.gate_up(x, weight, bias, norm_weight, eps, activation)
    return linear_op.gate_up_ref(x, weight, bias, norm_weight, eps, activation)


def rotary_attention(
    qkv_btn: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    k_cache_bksd: torch.Tensor,
    v_cache_bksd: torch.Tensor,
    arrived_p: torch.Tensor,
) -> torch.Tensor:
    """Rotary, KV write and attention; see :mod:`fastllama_kernels.attention.op`.

    ``arrived_p`` is read on CUDA alone: int32 zeros, one for each query head of each row, zeros again afterwards, with
    which the programs of a kernel count each other. Engines that may run at the same time need counters of their own.
    """
    args = (qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd)
    if _without_kernels(str(qkv_btn.device), qkv_btn.dtype) is None:
        few = qkv_btn.shape[1] <= attention_op.MAX_TOKENS
        if few and _attention_takes(qkv_btn.device.type, k_cache_bksd.shape[3]):
            if qkv_btn.device.type == "cuda":
                return torch.ops.fastllama.rotary_attention_split(*args, arrived_p)
            return attention_op.rotary_attention(*args)
        if qkv_btn.device.type == "cpu":
            return attention_op.prefill_attention(*args)
    return attention_op.rotary_attention_ref(*args)


def sample(logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor) -> torch.Tensor:
    """A token of each row; see :mod:`fastllama_kernels.sampling.op`."""
    if _without_kernels(str(logits_bv.device), logits_bv.dtype) is None:
        return sampling_op.sample(logits_bv, params, position_b)
    return sampling_op.sample_ref(logits_bv, params, position_b)


def runs_layers_at_once(x_btm: torch.Tensor) -> bool:
    """Whether all layers are one operation: where Python between the kernels would cost, and kernels take it all."""
    few = _fits(x_btm) and x_btm.shape[1] <= attention_op.MAX_TOKENS
    return few and x_btm.device.type == "cpu" and _without_kernels(str(x_btm.device), x_btm.dtype) is None


def kernels_per_step(device: torch.device | str, dtype: torch.dtype, layers: int) -> int | None:
    """Our kernels in a decode step of few rows; Inductor adds embedding and bookkeeping. None: all are Inductor's."""
    device = torch.device(device)
    if _without_kernels(str(device), dtype):
        return None
    # Layers, which are one operation on a CPU, and the head, and the draw, which is two launches on a GPU.
    return 1 + 1 + 1 if device.type == "cpu" else OPS_PER_LAYER * layers + 1 + 2


def report(device: torch.device | str, dtype: torch.dtype, head_dim: int | None = None) -> list[Choice]:
    """What a decode step on this device, in this dtype and with such heads, would run, op by op, and why."""
    device = torch.device(device)
    reason = _without_kernels(str(device), dtype)
    on_cpu = device.type == "cpu"
    chosen = ("C++ kernel" if on_cpu else "Triton kernel") if reason is None else "torch"
    rows, tokens = linear_op.MAX_ROWS.get(device.type, 0), attention_op.MAX_TOKENS
    beyond = "torch's flash attention above" if on_cpu else "torch's attention above, masked"
    attention = Choice("rotary_attention", chosen, reason or f"up to {tokens} tokens a row; {beyond}")
    if not reason and head_dim and not attention_op.takes(device.type, head_dim):
        attention = Choice("rotary_attention", "torch", f"head_dim {head_dim}: {HEADS_TAKEN}")
    at_once = [Choice("layers", chosen, f"all in one operation, up to {rows} rows")] if on_cpu and not reason else []
    return [
        *at_once,
        Choice("linear", chosen, reason or f"up to {rows} rows; torch's GEMM above"),
        Choice("gate_up", chosen, reason or f"up to {rows} rows; torch's GEMM above"),
        attention,
        Choice("sample", chosen, reason or "without sorting the vocabulary"),
        Choice("embedding, bookkeeping", "Inductor", "fused by torch.compile"),
    ]
