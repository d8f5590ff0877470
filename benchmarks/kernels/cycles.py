"""Times a function over copies of what it reads, so that it finds them in memory and not in a cache.

On the CPU each call by the host's clock; compiled functions make several calls in one compiled function, for entering one
takes longer than many an operation does, and a step enters it once. On CUDA a whole cycle of calls is recorded as one
CUDA graph and replayed between two events, so that no launch and no host is in the time. Times are seconds.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastllama.measure import free_memory

from ..costs import last_level_cache
from .ops import Arguments, nbytes

WORKING_SET = 256 * 2**20  # bytes of the copies together, or CACHES_COVERED times the last cache where that is more
CACHES_COVERED = 4
MIN_COPIES, MAX_COPIES = 2, 4096
MIN_CALLS = 8  # in a cycle, however few the copies
GROUP = 16  # calls that one compiled function makes on the CPU, and copies of what may be in a cache
CACHED_PASSES = 8  # over the latter in a cycle
REPLAYS = 10  # of a CUDA graph in a cycle

Function = Callable[..., Any]


class Cycle:
    """Calls a function on each copy of its own arguments in turn; calling the cycle gives seconds of the calls.

    Values may be means over a group of calls, on CUDA over a replay. A cycle begins with an unmeasured group.
    """

    def __init__(
        self,
        function: Function,
        shared: Arguments,
        copies: Sequence[Arguments],
        device: torch.device,
        is_compiled: bool = False,
        in_cache: bool = False,
    ) -> None:
        calls = [(*shared, *own) for own in copies]
        self._passes = CACHED_PASSES if in_cache else -(-MIN_CALLS // len(calls))
        # Of two equal calls in one compiled function only one would happen: a group takes each copy once at most.
        size = min(GROUP, len(calls)) if is_compiled and device.type == "cpu" else 1
        self._groups = [calls[at : at + size] for at in range(0, len(calls), size)]
        self._call = compiled(on_each(function)) if is_compiled else on_each(function)
        self._device = device
        self._graph = self._record() if device.type == "cuda" else None

    def __call__(self) -> list[float]:
        if self._graph is not None:
            return self._replay(self._graph)
        seconds, call = [], self._call
        call(self._groups[-1])
        for group in self._groups * self._passes:
            start = time.perf_counter()
            call(group)
            seconds.append((time.perf_counter() - start) / len(group))
        return seconds

    def _record(self) -> torch.cuda.CUDAGraph:
        """The calls as one graph; the first ones run before on its stream, for libraries allocate on first use."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for group in self._groups[:3]:
                self._call(group)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for group in self._groups * self._passes:
                self._call(group)
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        calls = self._passes * len(self._groups)
        return [a.elapsed_time(b) / 1e3 / calls for a, b in zip(events, events[1:], strict=False)]


def on_each(function: Function) -> Function:
    """The function over a list of arguments."""

    def call(group: list[Arguments]) -> list[Any]:
        return [function(*arguments) for arguments in group]

    return call


def compiled(function: Function) -> Function:
    """The function as a compiled step holds it."""
    code = function.__code__.replace()  # its own, since torch.compile keeps but a few results for one code object
    fresh = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return torch.compile(fresh, fullgraph=True, dynamic=False)


def copies_of(own: Arguments, device: torch.device, in_cache: bool = False) -> list[Arguments]:
    """Distinct copies of some arguments, themselves first, of which a whole cycle fits no cache."""
    size, count = nbytes(own), GROUP
    if not in_cache:
        wanted = -(-max(WORKING_SET, CACHES_COVERED * last_level_cache(device)) // size)
        count = min(max(wanted, MIN_COPIES), MAX_COPIES)
    if count > GROUP:
        count = -(-count // GROUP) * GROUP
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if (count - 1) * size > free:
        raise ValueError(
            f"{count} copies of {size / 1e6:.4g} MB of weights or cache do not fit the {free / 1e9:.3g} GB of memory "
            "that are free: take a smaller model, batch or live length"
        )
    return [own, *(tuple(None if x is None else x.clone() for x in own) for _ in range(count - 1))]
