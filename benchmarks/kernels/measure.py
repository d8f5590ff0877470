"""How fast each operation of a decode step is, compared with the torch operators it replaces and the bandwidth.

Weights and caches lie in several copies, which are gone through in turn: a step finds its own in memory, for the other
layers have pushed them out of the processor's caches since. Activations stay where they are, as in a step. Outputs are
compared with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.measure import BandwidthProbe, Quantiles, quantiles

from ..contenders import FASTLLAMA
from ..rounds import Say
from .cycles import Cycle, compiled, copies_of
from .ops import TORCH, Arguments, Function, Shapes, StepOp, nbytes, step_ops

WARMUP_CYCLES = 2
KERNEL, INDUCTOR = "kernel", "Inductor"


@dataclass(frozen=True)
class Check:
    """Whether an operation's output is right.

    Attributes:
        error: how far it lies from the same formula in float64.
        torch_error: how far that formula in the weights' dtype lies.
        bound: what the error may be: twice torch's, or a few roundings where torch happens to have none.
    """

    error: float
    torch_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the figures count; not where the error is NaN."""
        return self.error <= self.bound


@torch.no_grad()
def measure_kernels(
    shapes: Shapes, rounds: int, say: Say = lambda message: None, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Check and time every operation of a decode step; the fields of a record."""
    device = shapes.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        probe = BandwidthProbe(device)
        found: list[dict[str, Any]] = []
        for op in step_ops(shapes):
            if only is None or op.info.name in only:
                found.append(measure_op(op, device, rounds, probe, say))
            del op  # its memory is given back before the next one is made
        bytes_per_second = probe.best.bytes_per_second
    kernels = [entry_of(each, bytes_per_second) for each in found]
    parity = all(kernel["parity"] for kernel in kernels)
    read = sum(kernel["calls_per_step"] * kernel["bytes"] for kernel in kernels if not kernel["in_cache"])
    return shapes.describe() | {
        "parity": parity,
        "rounds": rounds,
        "kernels": kernels,
        "memory_bandwidth_gb_s": bytes_per_second / 1e9,
        "memory_bandwidth_method": probe.best.method,
        "step_us": sum(k["calls_per_step"] * k["us"]["p50"] for k in kernels) if parity else None,
        "torch_step_us": sum(k["calls_per_step"] * k["references"][TORCH]["us"]["p50"] for k in kernels)
        if parity
        else None,
        "floor_us": 1e6 * read / bytes_per_second,
    }


def measure_op(op: StepOp, device: torch.device, rounds: int, probe: BandwidthProbe, say: Say) -> dict[str, Any]:
    """Check an operation, then time it interleaved with its references: ``us`` has the quantiles of each by name."""
    info = op.info
    say(f"checking: {info.label}")
    implementation = implementation_of(op.run, op.arguments)
    checked = check(op, compiled(op.run) if implementation == INDUCTOR else op.run)
    found = {
        "name": info.name,
        "label": info.label,
        "shape": info.shape,
        "implementation": implementation,
        "calls_per_step": info.calls,
        "bytes": info.nbytes,
        "in_cache": info.in_cache,
        "working_set_bytes": 0,
        "parity": checked.passed,
        "parity_detail": asdict(checked),
        "us": {},
    }
    if not checked.passed:
        return found
    copies = copies_of(op.own, device, info.in_cache)
    cycles = {FASTLLAMA: Cycle(op.run, op.shared, copies, device, implementation == INDUCTOR, info.in_cache)}
    for name, reference in op.references.items():
        cycles[name] = Cycle(reference, op.shared, copies, device, in_cache=info.in_cache)
    us = interleaved(cycles, rounds, probe, lambda message: say(f"{info.label}: {message}"))
    return found | {"working_set_bytes": len(copies) * nbytes(op.own), "us": us}


def entry_of(found: dict[str, Any], bytes_per_second: float) -> dict[str, Any]:
    """One entry of a record's ``kernels``, given the memory's bandwidth."""
    us: dict[str, Quantiles] = found["us"]
    rest = {name: value for name, value in found.items() if name != "us"}

    def speed(name: str) -> dict[str, Any]:
        achieved = 1e6 * found["bytes"] / us[name].p50
        return {"us": asdict(us[name]), "bandwidth_gb_s": achieved / 1e9, "mbu": achieved / bytes_per_second}

    ours = speed(FASTLLAMA) if us else {}
    references = {
        name: speed(name) | {"ratio": us[name].p50 / us[FASTLLAMA].p50} for name in us if name != FASTLLAMA
    }
    return rest | ours | {"references": references}


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
    """Compare an operation, and the torch operators it replaces, with these operators in float64."""
    reference = op.references[TORCH]
    exact = op.results(reference, tuple(map(widened, op.arguments))).double()
    ours = op.results(run, op.arguments)
    torch_error = largest_difference(op.results(reference, op.arguments), exact)
    # Where torch happens to hit the exact values: one rounding of the result, a few of the float32 sums before it.
    rounding = 16 * torch.finfo(torch.float32).eps
    if ours.is_floating_point():
        rounding = (rounding + torch.finfo(ours.dtype).eps / 2) * max(1.0, float(exact.abs().max()))
    return Check(largest_difference(ours, exact), torch_error, max(2 * torch_error, rounding))


def widened(argument: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return argument.double() if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


def largest_difference(output: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of the worst element."""
    return float((output.double() - exact).abs().max())


def interleaved(cycles: dict[str, Cycle], rounds: int, probe: BandwidthProbe, say: Say) -> dict[str, Quantiles]:
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
