"""A launch of a Triton kernel as a value: run it here, or compile it for a chip that is not here.

Whatever decides the machine code (types, alignment, tile sizes, warps) is in the launch, so what an audit compiles is
what a step runs. Launches are made from tensors of any device; those of ``meta`` tensors can only be compiled.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNMENT = 16  # bytes; what pointers and sizes are multiples of where loads of full width are possible
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        name: what it computes, for people.
        kernel: the ``triton.jit`` function.
        grid: programs in each dimension.
        arguments: tensors, numbers, or None where an optional tensor is absent, by parameter.
        constants: compile-time parameters.
        reads, writes: bytes of memory that must move, each counted once.
        warps: of each program.
        stages: of the loops that Triton pipelines.
        pdl: start while the kernel before still runs; see :mod:`fastllama_kernels.common.pdl`.
        max_registers: of a thread; None leaves it to the compiler, which may spill a few to run more programs at once.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    reads: int = 0
    writes: int = 0
    warps: int = 4
    stages: int = 3
    pdl: bool = False
    max_registers: int | None = None
    _options: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        options |= {"launch_pdl": True} if self.pdl else {}
        options |= {"maxnreg": self.max_registers} if self.max_registers else {}
        object.__setattr__(self, "_options", options)

    def run(self) -> None:
        """Launch it on the current stream of its tensors' device."""
        with torch.cuda.device(self._device) if self._device is not None else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self._options)

    @property
    def _device(self) -> int | None:
        """The GPU of the tensors, where it is not the current one, on which Triton would launch."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        is_current = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
        return None if is_current else tensor.device.index

    @property
    def signature(self) -> tuple[tuple[str, str, bool], ...]:
        """Name, type and alignment of every run-time parameter: launches of one kernel that agree share its code."""
        return tuple((name, *_type_of(value)) for name, value in self.arguments.items())

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for an NVIDIA chip, without one at hand.

        Args:
            capability: compute capability, 90 for 9.0.
        """
        types = {name: (kind, is_aligned) for name, kind, is_aligned in self.signature}
        signature, constants, attributes = {}, dict(self.constants), {}
        for index, name in enumerate(self.kernel.arg_names):
            signature[name], is_aligned = types.get(name, ("constexpr", False))
            if signature[name] == "constexpr" and name in types:
                constants[name] = self.arguments[name]
            if is_aligned:
                attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self._options)


def _type_of(value: Any) -> tuple[str, bool]:
    """Type and whether it is a multiple of ALIGNMENT, as Triton would specialise on this argument in a launch."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], value.is_meta or value.data_ptr() % ALIGNMENT == 0
    if isinstance(value, float):
        return "fp32", False
    if value is None or value == 1:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % ALIGNMENT == 0


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()
