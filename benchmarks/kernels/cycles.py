"""Times a function over copies of what it reads, so that it finds them in memory and not in a cache.

On the CPU each call by the host's clock. On CUDA a whole cycle of calls is recorded as one CUDA graph and replayed
between two events, so that no launch and no host is in the time. Times are seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from fastllama.measure import free_memory

from ..costs import last_level_cache
from .ops import Arguments, StepOp, nbytes

WORKING_SET = 256 * 2**20  # bytes of the copies together, or CACHES_COVERED times the last cache where that is more
CACHES_COVERED = 4
MIN_COPIES, MAX_COPIES = 2, 4096
MIN_CALLS = 8  # in a cycle, however few the copies
CACHED_COPIES, CACHED_PASSES = 16, 8  # of what may be in a cache, and over them in a cycle
REPLAYS = 10  # of a CUDA graph in a cycle

Function = Callable[..., Any]


class Cycle:
    """Calls a function on each copy of its own arguments in turn; calling the cycle gives seconds of the calls.

    A cycle begins with an unmeasured call. On CUDA each value is the mean over a replay.
    """

    def __init__(self, function: Function, op: StepOp, copies: Sequence[Arguments], device: torch.device) -> None:
        passes = CACHED_PASSES if op.in_cache else -(-MIN_CALLS // len(copies))
        self._function, self._calls = function, [(*op.shared, *own) for own in copies] * passes
        self._device = device
        self._graph = self._record() if device.type == "cuda" else None

    def __call__(self) -> list[float]:
        if self._graph is not None:
            return self._replay(self._graph)
        self._function(*self._calls[-1])
        marks = [time.perf_counter()]
        for arguments in self._calls:
            self._function(*arguments)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]

    def _record(self) -> torch.cuda.CUDAGraph:
        """The calls as one graph; the first ones run before on its stream, for libraries allocate on first use."""
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
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if (count - 1) * size > free:
        raise ValueError(
            f"{count} copies of {size / 1e6:.4g} MB of weights or cache do not fit the {free / 1e9:.3g} GB of memory "
            "that are free: take a smaller model, batch or live length"
        )
    return [own, *(tuple(None if x is None else x.clone() for x in own) for _ in range(count - 1))]
