"""Which implementation of an operation runs, and why: RULES says it, and nothing else does.

The choice is made while a step is traced, from device, dtype and shapes alone, so it costs nothing per token.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastllama_kernels.attention import op as attention_op
from fastllama_kernels.common import build
from fastllama_kernels.layers import op as layers_op
from fastllama_kernels.linear import op as linear_op
from fastllama_kernels.linear import packed as packed_op
from fastllama_kernels.sampling import op as sampling_op
from fastllama_kernels.sampling import processing as processing_op

logger = logging.getLogger(__name__)

STEP_SWITCH = "FASTLLAMA_CPU_STEP"
NATIVE, COMPILED = STEP_KINDS = ("native", "compiled")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
HEADS_TAKEN = f"the kernel takes multiples of 8 up to {attention_op.MAX_HEAD_DIM}"


class Case(NamedTuple):
    """What a choice depends on, besides the device and whether its kernels can run."""

    rows: int = 1
    tokens: int = 1
    head_dim: int | None = None
    dtype: torch.dtype = torch.float32


class Rule(NamedTuple):
    """One implementation of an operation, and when it runs.

    Attributes:
        device: type of the device whose kernels it needs; None: it needs none and runs anywhere.
        implementation: what it is, for people.
        run: takes the operation's arguments.
        launches: of our kernels in a call of one row.
        max_rows: limit, or what gives it for a dtype; None: none.
        max_tokens: limit; None: none.
        limits_heads: takes heads of some sizes only.
        note: what else is to say, for people.
    """

    device: str | None
    implementation: str
    run: Callable[..., Any]
    launches: int = 1
    max_rows: int | Callable[[torch.dtype], int | None] | None = None
    max_tokens: int | None = None
    limits_heads: bool = False
    note: str = ""

    def refusal(self, case: Case) -> str | None:
        """Why it does not take a case; None if it does."""
        rows = self._most_rows(case.dtype)
        if rows is not None and case.rows > rows:
            return f"above {rows} rows"
        if self.max_tokens is not None and case.tokens > self.max_tokens:
            return f"above {self.max_tokens} tokens a row"
        if self.limits_heads and case.head_dim and not attention_op.takes(case.head_dim):
            return f"head_dim {case.head_dim}: {HEADS_TAKEN}"
        return None

    def beyond(self, case: Case) -> Case:
        """A case like this one that is too large for it."""
        rows = case.rows if (most := self._most_rows(case.dtype)) is None else most + 1
        tokens = case.tokens if self.max_tokens is None else self.max_tokens + 1
        return case._replace(rows=rows, tokens=tokens)

    def limits(self, case: Case) -> str:
        """Its limits, for people."""
        most = self._most_rows(case.dtype)
        rows = [] if most is None else [f"{most} rows"]
        tokens = [] if self.max_tokens is None else [f"{self.max_tokens} tokens a row"]
        return f"up to {' and '.join(rows + tokens)}" if rows + tokens else ""

    def _most_rows(self, dtype: torch.dtype) -> int | None:
        return self.max_rows(dtype) if callable(self.max_rows) else self.max_rows


def _op(name: str) -> Callable[..., Any]:
    """A registered operation; looked up when it is called, for Triton's are not there before they are needed."""
    return lambda *args: getattr(torch.ops.fastllama, name)(*args)


def _countless(run: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of rotary_attention that leaves the counters alone."""
    return lambda *args: run(*args[:-1])


def _sample_ref(logits_bv: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    *params, position_b = args
    return sampling_op.sample_ref(logits_bv, sampling_op.SamplingParams(*params), position_b)


CPU_ROWS, PACKED_ROWS = linear_op.max_rows_cpu, packed_op.max_rows_cpu
CUDA_ROWS, TOKENS = linear_op.MAX_ROWS["cuda"], attention_op.MAX_TOKENS
#: The implementations of each operation; the first whose kernels can run and that takes the case does.
RULES: dict[str, tuple[Rule, ...]] = {
    "step": (
        Rule(
            "cpu",
            "C++ kernel",
            _op("decode_step"),
            max_rows=CPU_ROWS,
            max_tokens=TOKENS,
            note="from ids to ids in one operation, nothing compiled at the start",
        ),
    ),
    "layers": (
        Rule("cpu", "C++ kernel", layers_op.layers, max_rows=CPU_ROWS, max_tokens=TOKENS, note="all in one operation"),
    ),
    "linear": (
        Rule("cpu", "C++ kernel", _op("linear"), max_rows=CPU_ROWS),
        Rule("cpu", "C++ norm, torch's GEMM", linear_op.linear_slabs),
        Rule("cuda", "Triton kernel", _op("linear"), max_rows=CUDA_ROWS),
        Rule("cuda", "Triton norm, cuBLAS", linear_op.linear_wide),
        Rule(None, "torch", linear_op.linear_ref, launches=0),
    ),
    "gate_up": (
        Rule("cpu", "C++ kernel", _op("gate_up"), max_rows=CPU_ROWS),
        Rule("cpu", "C++ norm and activation, torch's GEMM", linear_op.gate_up_slabs, launches=2),
        Rule("cuda", "Triton kernel", _op("gate_up"), max_rows=CUDA_ROWS),
        Rule("cuda", "Triton norm and activation, cuBLAS", linear_op.gate_up_wide, launches=2),
        Rule(None, "torch", linear_op.gate_up_ref, launches=0),
    ),
    "linear_packed": (
        Rule("cpu", "C++ kernel", _op("linear_packed"), max_rows=PACKED_ROWS),
        Rule("cpu", "written out, torch's GEMM", packed_op.linear_packed_slabs, launches=2),
        Rule("cuda", "Triton kernel", _op("linear_packed"), max_rows=CUDA_ROWS),
        Rule("cuda", "written out, cuBLAS", packed_op.linear_packed_wide),
        Rule(None, "dequantized, torch", packed_op.linear_packed_ref, launches=0),
    ),
    "gate_up_packed": (
        Rule("cpu", "C++ kernel", _op("gate_up_packed"), max_rows=PACKED_ROWS),
        Rule("cpu", "written out, torch's GEMM", packed_op.gate_up_packed_slabs, launches=3),
        Rule("cuda", "Triton kernel", _op("gate_up_packed"), max_rows=CUDA_ROWS),
        Rule("cuda", "written out, cuBLAS", packed_op.gate_up_packed_wide, launches=2),
        Rule(None, "dequantized, torch", packed_op.gate_up_packed_ref, launches=0),
    ),
    "embed_packed": (
        Rule("cpu", "C++ kernel", _op("embed_packed")),
        Rule(None, "torch", packed_op.embed_packed_ref, launches=0),
    ),
    "rotary_attention": (
        Rule("cpu", "C++ kernel", _countless(_op("rotary_attention")), max_tokens=TOKENS),
        Rule("cpu", "C++ kernel for prompts", _countless(_op("prefill_attention"))),
        Rule("cuda", "Triton kernel", _op("rotary_attention_split"), max_tokens=TOKENS, limits_heads=True),
        Rule(
            "cuda",
            "Triton rotary and KV write, torch's masked attention",
            _countless(attention_op.rotary_attention_wide),
            limits_heads=True,
        ),
        Rule(None, "torch", _countless(attention_op.rotary_attention_ref), launches=0),
    ),
    "processed": (
        Rule("cpu", "C++ kernel", _op("processed"), note="penalties, biases, bans and token masks, where a row asks"),
        Rule("cuda", "Inductor, Triton kernel for n-grams", processing_op.processed_cuda),
        Rule(None, "torch", processing_op.processed_ref, launches=0),
    ),
    "sample": (
        Rule("cpu", "C++ kernel", _op("sample"), note="without sorting the vocabulary"),
        Rule("cuda", "Triton kernel", _op("sample"), launches=2, note="without sorting the vocabulary"),
        Rule(None, "torch", _sample_ref, launches=0),
    ),
}


# ---- the choice ----------------------------------------------------------------------------------------------------


def switch(name: str, choices: Sequence[str]) -> str:
    """The value of an environment variable; the first choice where it is not set.

    Raises:
        ValueError: it is set to something else.
    """
    value = os.environ.get(name, choices[0])
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(choices)}")
    return value


def steps_are_native(device_type: str) -> bool:
    """Whether a whole step may be one operation of the kernels: on a CPU, unless ``FASTLLAMA_CPU_STEP`` says compiled.

    Raises:
        ValueError: the variable is set to something else than its choices.
    """
    return device_type == "cpu" and switch(STEP_SWITCH, STEP_KINDS) == NATIVE


def without_kernels(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for this device and dtype, or None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    device_type = torch.device(device).type
    if device_type == "cpu":
        return build.load()
    if device_type == "cuda":
        return without_triton(device)
    return f"there is no kernel for {device_type}"


@functools.cache
def without_triton(device: str) -> str | None:
    """Why Triton's kernels cannot run on this CUDA device, or None if they can; the reason is also logged, once."""
    reason = None
    if torch.version.hip:
        reason = "the Triton kernels have not been tried on ROCm"
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        found, wanted = torch.cuda.get_device_capability(device), MIN_CAPABILITY
        reason = f"compute capability {found[0]}.{found[1]} is below {wanted[0]}.{wanted[1]}"
    else:
        try:
            _register_triton()
        except ImportError as error:
            reason = f"Triton cannot be imported: {error}"
    if reason:
        logger.warning("%s; decoding runs on torch's own operators, which is slower", reason)
    return reason


def _register_triton() -> None:
    """Import the kernels, which register themselves."""
    from fastllama_kernels.attention import rotary  # noqa: F401
    from fastllama_kernels.attention import triton as decode_attention  # noqa: F401
    from fastllama_kernels.linear import packed_triton, rms_norm, silu_mul  # noqa: F401
    from fastllama_kernels.linear import triton as gemv  # noqa: F401
    from fastllama_kernels.sampling import ngrams  # noqa: F401
    from fastllama_kernels.sampling import triton as sample  # noqa: F401


@functools.lru_cache(maxsize=1024)  # prompts of any length are asked for
def first_rule(op: str, device_type: str | None, case: Case) -> tuple[int | None, str | None]:
    """Index in RULES of what runs, None if nothing does, and why not what comes before it on that device."""
    refusal = None
    for index, rule in enumerate(RULES[op]):
        if rule.device in (None, device_type):
            reason = rule.refusal(case)
            if reason is None:
                return index, refusal
            refusal = reason
    return None, refusal


def choose(op: str, device: str, dtype: torch.dtype, case: Case) -> tuple[int | None, str | None]:
    """Index in RULES of what runs, and why not what comes before it."""
    if op == "step" and not steps_are_native(torch.device(device).type):
        return None, f"{STEP_SWITCH} is {COMPILED}"
    if reason := without_kernels(device, dtype):
        return first_rule(op, None, case)[0], reason
    return first_rule(op, torch.device(device).type, case)
