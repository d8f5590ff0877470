"""The one door to the kernels: the operations, and what runs where; :mod:`fastllama.ops.rules` chooses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastllama.ops.rules import (
    KERNEL_DTYPES,
    RULES,
    Case,
    choose,
    first_rule,
    without_kernels,
)
from fastllama_kernels.attention import codes as kv_codes
from fastllama_kernels.common import activations, bandwidth, build, calls, shapes
from fastllama_kernels.layers import op as layers_op
from fastllama_kernels.layers import step as step_op
from fastllama_kernels.linear import packed as packed_op
from fastllama_kernels.linear import quantize as quantize_op
from fastllama_kernels.sampling import op as sampling_op
from fastllama_kernels.sampling import processing as processing_op

logger = logging.getLogger(__name__)

ACTIVATIONS = activations.ACTIVATIONS  # by the config's hidden_act
Shape = shapes.Shape
SHAPES = shapes.SHAPES  # of published models
Layer = layers_op.Layer
Weights = layers_op.Weights
network = step_op.network
DENSE, DENSE_BIAS, TENSORS = layers_op.DENSE, layers_op.DENSE_BIAS, layers_op.TENSORS
packed_kind = layers_op.packed_kind
PANEL, LINE = packed_op.PANEL, packed_op.LINE
dequantized, by_panel = packed_op.dequantized, packed_op.by_panel
packed, unpacked = packed_op.packed, packed_op.unpacked
kv_columns, kv_encoded, kv_decoded = kv_codes.columns, kv_codes.encoded, kv_codes.decoded
SamplingParams = sampling_op.SamplingParams
Processing = processing_op.Processing
MAX_NGRAM = processing_op.MAX_NGRAM
allowed_by, token_mask, token_mask_words = processing_op.allowed_by, processing_op.token_mask, processing_op.words
row_seed = sampling_op.row_seed


def _index(op: str, device: str, dtype: torch.dtype, rows: int, tokens: int, head_dim: int | None) -> int | None:
    """Index in RULES of what runs; heads that the kernels do not take are logged, once."""
    index, reason = choose(op, device, dtype, Case(rows, tokens, head_dim, dtype))
    if reason and reason.startswith("head_dim"):
        _log_heads(reason)
    return index


# What torch.compiler.assume_constant_result does; that function imports torch._dynamo, which takes seconds.
_index._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _log_heads(reason: str) -> None:
    logger.warning("%s; attention runs on torch's own operators, which is slower", reason)


def _run(op: str, x: torch.Tensor, *args: Any, tokens: int = 1, head_dim: int | None = None) -> Any:
    """The operation on x and its other arguments, by the implementation that its rules choose."""
    index = _index(op, str(x.device), x.dtype, x.shape[:-1].numel(), tokens, head_dim)
    assert index is not None, f"no implementation of {op} takes this"
    return RULES[op][index].run(x, *args)


# ---- the operations ------------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``norm(x) @ weightᵀ + bias + residual``; see :mod:`fastllama_kernels.linear.op`."""
    return _run("linear", x, weight, bias, norm_weight, eps, residual)


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "silu",
) -> torch.Tensor:
    """``act(gate) · up`` of one fused matrix, for an activation of ACTIVATIONS.

    See :mod:`fastllama_kernels.linear.op`.
    """
    return _run("gate_up", x, weight, bias, norm_weight, eps, ACTIVATIONS[activation].number)


def linear_packed(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """``linear`` with a matrix of codes; arguments as in :mod:`fastllama_kernels.linear.packed`."""
    return _run("linear_packed", x, *args)


def gate_up_packed(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    activation: str,
    codes_inputs: bool,
) -> torch.Tensor:
    """``gate_up`` with a matrix of codes; see :mod:`fastllama_kernels.linear.packed`."""
    number = ACTIVATIONS[activation].number
    return _run("gate_up_packed", x, codes, scales, offsets, bias, norm_weight, eps, number, codes_inputs)


def embed_packed(like: torch.Tensor, *args: Any) -> torch.Tensor:
    """Rows of a matrix of codes, in the dtype of ``like``; see :mod:`fastllama_kernels.linear.packed`."""
    return _run("embed_packed", like, *args)


def quantize(
    weight: torch.Tensor, bits: int, group: int, has_offsets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and offsets of a matrix; see :mod:`fastllama_kernels.linear.quantize`."""
    if weight.device.type == "cpu" and weight.dtype in KERNEL_DTYPES and build.load() is None:
        return torch.ops.fastllama.quantize(weight, bits, group, has_offsets)
    return quantize_op.quantize_ref(weight, bits, group, has_offsets)


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
    args = (qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p)
    return _run("rotary_attention", *args, tokens=qkv_btn.shape[1], head_dim=cos_sd.shape[1])


def processed(
    logits_bv: torch.Tensor,
    processing: Processing,
    position_b: torch.Tensor,
    step_b: torch.Tensor,
    limit_b: torch.Tensor,
) -> torch.Tensor:
    """Float32 logits ``[b, v]`` after penalties, biases and bans; see :mod:`fastllama_kernels.sampling.processing`."""
    return _run("processed", logits_bv, [*processing], position_b, step_b, limit_b)


def sample(logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor) -> torch.Tensor:
    """A token of each row, int64 ``[b]``; see :mod:`fastllama_kernels.sampling.op`.

    Args:
        logits_bv: of every token; a logit of minus infinity is never sampled.
        params: of each row.
        position_b: int64, of the token that is sampled; makes every sample of a row a new one.
    """
    return _run("sample", logits_bv, *params, position_b)


def runs_layers_at_once(x_btm: torch.Tensor) -> bool:
    """Whether all layers are one operation: where Python between the kernels would cost, and kernels take it all."""
    x = x_btm
    return _index("layers", str(x.device), x.dtype, x.shape[:-1].numel(), x.shape[1], None) is not None


def layers(
    x_btm: torch.Tensor,
    cos_sd: torch.Tensor,
    sin_sd: torch.Tensor,
    position_bt: torch.Tensor,
    weights: Sequence[Layer],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    eps: float,
    activation: str,
) -> torch.Tensor:
    """All layers, where :func:`runs_layers_at_once`; see :mod:`fastllama_kernels.layers.op`."""
    args = (cos_sd, sin_sd, position_bt, weights, k_caches, v_caches, eps, ACTIVATIONS[activation].number)
    return _run("layers", x_btm, *args, tokens=x_btm.shape[1])


def runs_at_once(device: torch.device, dtype: torch.dtype, rows: int, tokens: int) -> bool:
    """Whether a step is one operation, :func:`decode_step` or :func:`verify_step`, that needs no compiling."""
    return _index("step", str(device), dtype, rows, tokens, None) is not None


def decode_step(rows: Sequence[torch.Tensor], *network: Any) -> None:
    """A decode step in place, where :func:`runs_at_once`; see :mod:`fastllama_kernels.layers.step`."""
    torch.ops.fastllama.decode_step(rows, *network)


def draft_step(rows: Sequence[torch.Tensor], draft_bt: torch.Tensor, *network: Any) -> None:
    """A decode step that goes on while drafts come true, where :func:`runs_at_once`."""
    torch.ops.fastllama.draft_step(rows, draft_bt, *network)


def verify_step(ids_bt: torch.Tensor, position_bt: torch.Tensor, *network: Any) -> None:
    """A verify step, where :func:`runs_at_once`; see :mod:`fastllama_kernels.layers.step`."""
    torch.ops.fastllama.verify_step(ids_bt, position_bt, *network)


# ---- what runs, for people -----------------------------------------------------------------------------------------


PACKED = "_packed"  # ends the names of operations with quantized matrices


class Choice(NamedTuple):
    """One row of :func:`report`."""

    op: str
    implementation: str
    reason: str


def report(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int | None = None,
    rows: int = 1,
    tokens: int = 1,
    quantized: bool = False,
) -> list[Choice]:
    """What a step on this device, in this dtype and with such heads, would run, op by op, and why.

    Args:
        device: where it runs.
        dtype: of weights and cache.
        head_dim: of the model; None: one that the kernels take.
        rows: of the step, all tokens of the batch together.
        tokens: of each row of the batch.
        quantized: whether matrices are; then those that are not run as without.
    """
    choices = _choices(str(torch.device(device)), dtype, Case(rows, tokens, head_dim, dtype))
    choices = (choice for choice in choices if quantized or not choice.op.endswith(PACKED))
    found = list(choices)
    at_once = any(choice.op == "step" for choice in found)
    return found if at_once else [*found, Choice("embedding, bookkeeping", "Inductor", "fused by torch.compile")]


def _choices(device: str, dtype: torch.dtype, case: Case) -> Iterator[Choice]:
    for op, rules in RULES.items():
        index, refusal = choose(op, device, dtype, case)
        if index is None:
            continue
        rule, reasons = rules[index], [refusal] if refusal else []
        if not refusal:
            limits = rule.limits(case)
            reasons = [text for text in (rule.note, limits) if text]
            above = first_rule(op, torch.device(device).type, rule.beyond(case))[0] if limits else None
            reasons = [", ".join(reasons), *([] if above is None else [f"{rules[above].implementation} above"])]
        yield Choice(op, rule.implementation, "; ".join(reasons))


def kernels_per_step(
    device: torch.device | str, dtype: torch.dtype, layers: int, head_dim: int | None = None
) -> int | None:
    """Our kernels in a decode step of one row; on CUDA Inductor adds embedding and bookkeeping.

    On a CPU the step is one operation. None: all are Inductor's.
    """
    device, case = str(torch.device(device)), Case(head_dim=head_dim, dtype=dtype)
    if without_kernels(device, dtype):
        return None

    def launches(op: str) -> int:
        index, _ = choose(op, device, dtype, case)
        return 0 if index is None else RULES[op][index].launches

    if launches("step"):
        return launches("step")
    in_layers = layers * sum(launches(call.op) for call in calls.STEP if call.in_layer)
    return in_layers + sum(launches(call.op) for call in calls.STEP if not call.in_layer)


def cpu_level() -> str | None:
    """The instruction set that the C++ kernels which run were compiled for; None where there are none."""
    return build.level()


def memory_reader() -> Callable[[torch.Tensor], int] | None:
    """What reads a CPU tensor with all threads and does nothing else; None where the C++ kernels cannot be built."""
    return bandwidth.read_bytes if build.load() is None else None
