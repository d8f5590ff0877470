"""How fast each operation of a decode step is, compared with the torch operators it replaces and the bandwidth.

Weights and caches lie in several copies, gone through in turn: a step finds its own in memory, for the other layers
have pushed them out of the caches since. Outputs are compared with float64 before anything is timed.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastllama.measure import BandwidthProbe, Quantiles, last_level_cache, quantiles
from fastllama.model.cache import free_memory

from ..contenders import FASTLLAMA
from ..environment import bandwidth
from ..rounds import Say, interleave
from ..workload import Contender
from .ops import TORCH, Arguments, Function, Shapes, StepOp, nbytes, step_ops

KERNEL, INDUCTOR = "kernel", "Inductor"
WORKING_SET = 256 * 2**20  # bytes of the copies together, or CACHES_COVERED times the last cache where that is more
CACHES_COVERED = 4
MIN_COPIES, MAX_COPIES = 2, 4096
MIN_CALLS = 8  # in a cycle, however few the copies
CACHED_COPIES, CACHED_PASSES = 16, 8  # of what may be in a cache, and over them in a cycle
REPLAYS = 10  # of a CUDA graph in a cycle


@dataclass(frozen=True)
class Check:
    """Whether an operation's output is right."""

    error: float  # how far it lies from the same formula in float64
    torch_error: float  # how far that formula in the weights' dtype lies
    bound: float  # what the error may be: twice torch's, or a few roundings where torch happens to have none

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
            if only is None or op.name in only:
                found.append(measure_op(op, device, rounds, probe, say))
            del op  # its memory is given back before the next one is made
        bytes_per_second = probe.best.bytes_per_second
    kernels = [entry_of(each, bytes_per_second) for each in found]
    parity = all(kernel["parity"] for kernel in kernels)
    us = [kernel["calls_per_step"] * kernel["us"]["p50"] for kernel in kernels] if parity else []
    ratios = [kernel["references"][TORCH]["ratio"] for kernel in kernels] if parity else []
    read = sum(kernel["calls_per_step"] * kernel["bytes"] for kernel in kernels if not kernel["in_cache"])
    return shapes.describe() | {
        "parity": parity,
        "rounds": rounds,
        "kernels": kernels,
        **bandwidth(probe),
        "step_us": sum(us) if parity else None,
        "torch_step_us": sum(each * ratio for each, ratio in zip(us, ratios, strict=True)) if parity else None,
        "floor_us": 1e6 * read / bytes_per_second,
    }


def measure_op(op: StepOp, device: torch.device, rounds: int, probe: BandwidthProbe, say: Say) -> dict[str, Any]:
    """Check an operation, then time it interleaved with its references: ``us`` has the quantiles of each by name."""
    say(f"checking: {op.label}")
    implementation = implementation_of(op)
    run = op.run if implementation == KERNEL else torch.compile(op.run, fullgraph=True, dynamic=False)
    checked = check(op, run)
    found = {
        "name": op.name, "label": op.label, "shape": op.shape, "implementation": implementation,
        "calls_per_step": op.calls, "bytes": op.nbytes, "in_cache": op.in_cache, "working_set_bytes": 0,
        "parity": checked.passed, "parity_detail": asdict(checked), "us": {},
    }  # fmt: skip
    if not checked.passed:
        return found
    copies = copies_of(op, device)
    cycles = [Cycle(name, f, op, copies, device) for name, f in {FASTLLAMA: run, **op.references}.items()]
    seconds = interleave(cycles, None, rounds, say=lambda line: say(f"{op.label}: {line}"), between=probe.sample)
    if seconds.broken:
        raise RuntimeError(f"{op.label}: {seconds.broken}")
    us = {name: quantiles([1e6 * each for found in runs for each in found]) for name, runs in seconds.runs.items()}
    return found | {"working_set_bytes": len(copies) * nbytes(op.own), "us": us}


def entry_of(found: dict[str, Any], bytes_per_second: float) -> dict[str, Any]:
    """One entry of a record's ``kernels``, given the memory's bandwidth."""
    us: dict[str, Quantiles] = found.pop("us")
    speeds = {name: 1e6 * found["bytes"] / each.p50 for name, each in us.items()}
    entries = {
        name: {"us": asdict(each), "bandwidth_gb_s": speeds[name] / 1e9, "mbu": speeds[name] / bytes_per_second}
        for name, each in us.items()
    }
    ours = entries.pop(FASTLLAMA, {})
    references = {name: each | {"ratio": us[name].p50 / us[FASTLLAMA].p50} for name, each in entries.items()}
    return found | ours | {"references": references}


def implementation_of(op: StepOp) -> str:
    """What runs in a step: a kernel is called, torch operators are compiled."""
    called = make_fx(op.run)(*op.shared, *op.own).graph.nodes
    return KERNEL if any(getattr(node.target, "namespace", "") == "fastllama" for node in called) else INDUCTOR


def check(op: StepOp, run: Function) -> Check:
    """Compare an operation, and the torch operators it replaces, with these operators in float64."""
    arguments, reference = (*op.shared, *op.own), op.references[TORCH]
    exact = op.results(reference, tuple(x.double() if is_float(x) else x for x in arguments)).double()
    found = [op.results(function, arguments) for function in (run, reference)]
    error, torch_error = (float((each.double() - exact).abs().max()) for each in found)
    # Where torch happens to hit the exact values: one rounding of the result, a few of the float32 sums before it.
    rounding = 16 * torch.finfo(torch.float32).eps
    if is_float(found[0]):
        rounding = (rounding + torch.finfo(found[0].dtype).eps / 2) * max(1.0, float(exact.abs().max()))
    return Check(error, torch_error, max(2 * torch_error, rounding))


def is_float(value: Any) -> bool:
    """Whether it is a floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class Cycle(Contender):
    """Calls a function on each copy of its own arguments in turn, after an unmeasured call."""

    def __init__(
        self, name: str, function: Function, op: StepOp, copies: Sequence[Arguments], device: torch.device
    ) -> None:
        self.name = name
        passes = CACHED_PASSES if op.in_cache else -(-MIN_CALLS // len(copies))
        self._function, self._calls = function, [(*op.shared, *own) for own in copies] * passes
        self._device = device
        self._graph = self._record() if device.type == "cuda" else None

    def run(self, workload: Any) -> Any:
        """Seconds of each call; on CUDA each value is the mean over a replay."""
        if self._graph is not None:
            return self._replay(self._graph)
        self._function(*self._calls[-1])
        marks = [time.perf_counter()]
        for arguments in self._calls:
            self._function(*arguments)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]

    def _record(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for arguments in self._calls[:3]:
                self._function(*arguments)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for arguments in self._calls:
                self._function(*arguments)
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 / len(self._calls) for before, after in pairwise(events)]


def copies_of(op: StepOp, device: torch.device) -> list[Arguments]:
    """Distinct copies of an operation's own arguments, themselves first, of which a whole cycle fits no cache."""
    own, size, count = op.own, nbytes(op.own), CACHED_COPIES
    if not op.in_cache:
        wanted = -(-max(WORKING_SET, CACHES_COVERED * last_level_cache(device)) // size)
        count = min(max(wanted, MIN_COPIES), MAX_COPIES)
    free = free_memory(device)
    if (count - 1) * size > free:
        raise ValueError(
            f"{count} copies of {size / 1e6:.4g} MB of weights or cache do not fit the {free / 1e9:.3g} GB of memory "
            "that are free: take a smaller model, batch or live length"
        )
    return [own, *(tuple(None if x is None else x.clone() for x in own) for _ in range(count - 1))]
