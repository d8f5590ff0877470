"""How fast each operation of a decode step is, beside the torch operators it replaces and the memory's bandwidth.

Weights and caches lie in several copies, which are gone through in turn: a step finds its own in memory, for the other
layers have pushed them out of the processor's caches since. Activations stay where they are, as in a step. Outputs are
compared with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.measure import Bandwidth, BandwidthProbe, Quantiles, quantiles

from ..ours import OURS
from .cycles import Cycle, compiled, copies_of
from .ops import TORCH, step_ops
from .step import Arguments, Function, OpInfo, Shapes, StepOp, nbytes

WARMUP_CYCLES = 2
KERNEL, INDUCTOR = "kernel", "Inductor"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """Whether an operation's output is right.

    Attributes:
        error: how far it lies from the result in float64.
        torch_error: how far that of the same formula in torch operators lies.
        bound: what the error may be: twice torch's, or a few roundings where torch happens to have none.
    """

    error: float
    torch_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the figures count; not where the error is NaN."""
        return self.error <= self.bound


@dataclass(frozen=True)
class KernelFigures:
    """What one operation comes to.

    Attributes:
        info: what is told of it.
        implementation: "kernel", one of fastllama_kernels, or "Inductor", torch operators that torch.compile fused.
        working_set: bytes of the copies of what it reads that were gone through; 0 where it was not timed.
        check: of its output.
        us: microseconds of a call of fastllama, then of each reference; empty where the check failed.
    """

    info: OpInfo
    implementation: str
    working_set: int
    check: Check
    us: dict[str, Quantiles]

    def bytes_per_second(self, contender: str = OURS) -> float:
        """Bytes of a call over its median time."""
        return 1e6 * self.info.nbytes / self.us[contender].p50

    def ratio(self, contender: str) -> float:
        """The median time of a reference over fastllama's."""
        return self.us[contender].p50 / self.us[OURS].p50

    def to_dict(self, bytes_per_second: float) -> dict[str, Any]:
        """One entry of a record's ``kernels``, given the memory's bandwidth."""
        speeds = {name: self._speed(name, bytes_per_second) for name in self.us}
        return {
            "name": self.info.name,
            "label": self.info.label,
            "shape": self.info.shape,
            "implementation": self.implementation,
            "calls_per_step": self.info.calls,
            "bytes": self.info.nbytes,
            "in_cache": self.info.in_cache,
            "working_set_bytes": self.working_set,
            "parity": self.check.passed,
            "parity_detail": asdict(self.check),
            **speeds.pop(OURS, {}),
            "references": {name: speed | {"ratio": self.ratio(name)} for name, speed in speeds.items()},
        }

    def _speed(self, contender: str, bytes_per_second: float) -> dict[str, Any]:
        achieved = self.bytes_per_second(contender)
        return {"us": asdict(self.us[contender]), "bandwidth_gb_s": achieved / 1e9, "mbu": achieved / bytes_per_second}


@dataclass(frozen=True)
class KernelReport:
    """What :func:`measure_kernels` found.

    Attributes:
        shapes: of model, batch and cache.
        rounds: timed cycles through the copies of each.
        kernels: one entry an operation, in the order of a step.
        bandwidth: of the memory, measured between the rounds.
    """

    shapes: Shapes
    rounds: int
    kernels: tuple[KernelFigures, ...]
    bandwidth: Bandwidth

    @property
    def parity(self) -> bool:
        """Whether every output is right; if not, the figures do not count."""
        return all(kernel.check.passed for kernel in self.kernels)

    def step_us(self, contender: str = OURS) -> float | None:
        """Microseconds of a greedy step that is these calls and nothing else; None where an output is wrong."""
        if not self.parity:
            return None
        return sum(kernel.info.calls * kernel.us[contender].p50 for kernel in self.kernels)

    @property
    def floor_us(self) -> float:
        """Microseconds of a step if only reading its weights and live cache took time."""
        read = sum(kernel.info.calls * kernel.info.nbytes for kernel in self.kernels if not kernel.info.in_cache)
        return 1e6 * read / self.bandwidth.bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record."""
        bytes_per_second = self.bandwidth.bytes_per_second
        return self.shapes.describe() | {
            "parity": self.parity,
            "rounds": self.rounds,
            "kernels": [kernel.to_dict(bytes_per_second) for kernel in self.kernels],
            "memory_bandwidth_gb_s": bytes_per_second / 1e9,
            "memory_bandwidth_method": self.bandwidth.method,
            "step_us": self.step_us(),
            "torch_step_us": self.step_us(TORCH),
            "floor_us": self.floor_us,
        }


@torch.no_grad()
def measure_kernels(
    shapes: Shapes, rounds: int, say: Say = lambda message: None, only: Collection[str] | None = None
) -> KernelReport:
    """Check and time every operation of a decode step.

    Args:
        shapes: of model, batch and cache.
        rounds: timed cycles through the copies, for each operation and each of its references.
        say: told what is about to run.
        only: names of the operations; None: all.

    Raises:
        ValueError: the copies of an operation's weights or cache do not fit the memory.
    """
    device = shapes.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        probe = BandwidthProbe(device)
        kernels: list[KernelFigures] = []
        for op in step_ops(shapes):
            if only is None or op.info.name in only:
                kernels.append(_measure(op, device, rounds, probe, say))
            del op  # its memory is given back before the next one is made
        return KernelReport(shapes, rounds, tuple(kernels), probe.best)


def _measure(op: StepOp, device: torch.device, rounds: int, probe: BandwidthProbe, say: Say) -> KernelFigures:
    say(f"checking: {op.info.label}")
    implementation = implementation_of(op.run, op.arguments)
    checked = check(op, compiled(op.run) if implementation == INDUCTOR else op.run)
    if not checked.passed:
        return KernelFigures(op.info, implementation, 0, checked, {})
    in_cache, shared = op.info.in_cache, op.shared
    copies = copies_of(op.own, device, in_cache)
    cycles = {OURS: Cycle(op.run, shared, copies, device, implementation == INDUCTOR, in_cache)}
    for name, reference in op.references.items():
        cycles[name] = Cycle(reference, shared, copies, device, in_cache=in_cache)
    us = _by_turns(cycles, rounds, probe, lambda message: say(f"{op.info.label}: {message}"))
    return KernelFigures(op.info, implementation, len(copies) * nbytes(op.own), checked, us)


def implementation_of(function: Function, arguments: Arguments) -> str:
    """What runs in a step: a kernel is called, torch operators are compiled."""
    with _Namespaces() as called:
        function(*arguments)
    return KERNEL if "fastllama" in called.names else INDUCTOR


class _Namespaces(TorchDispatchMode):
    """Notes the namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


def check(op: StepOp, run: Function) -> Check:
    """Compare an operation with float64, beside the torch operators it replaces."""
    exact = op.exact(*op.arguments)
    ours = op.results(run, op.arguments)
    torch_error = op.error(op.results(op.references[TORCH], op.arguments), exact)
    # Where torch happens to hit the exact values: one rounding of the result, a few of the float32 sums before it.
    rounding = 16 * torch.finfo(torch.float32).eps
    if ours.is_floating_point():
        rounding = (rounding + torch.finfo(ours.dtype).eps / 2) * max(1.0, float(exact.abs().max()))
    return Check(op.error(ours, exact), torch_error, max(2 * torch_error, rounding))


def _by_turns(cycles: dict[str, Cycle], rounds: int, probe: BandwidthProbe, say: Say) -> dict[str, Quantiles]:
    """Microseconds a call, from cycles in the order A B C, C B A, …, after some unmeasured ones of each."""
    seconds: dict[str, list[float]] = {name: [] for name in cycles}
    for number in range(-WARMUP_CYCLES, rounds):
        for name in list(cycles)[:: 1 if number % 2 == 0 else -1]:
            say(f"{'warming up' if number < 0 else f'round {number + 1} of {rounds}'}, {name}")
            found = cycles[name]()
            if number >= 0:
                seconds[name] += found
        probe.sample()
    return {name: quantiles([1e6 * each for each in found]) for name, found in seconds.items()}
