"""Times a function over copies of what it reads, so that it finds them in memory and not in a cache.

On the CPU each call by the host's clock; of compiled functions several calls in one compiled function, for entering one
takes longer than many an operation does, and a step enters it once. On CUDA a whole cycle of calls is recorded as one
CUDA graph and replayed between two events, so that no launch and no host is in the time.

Times are seconds, sizes bytes.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastllama.measure import free_memory

from ..harness import Marks

WORKING_SET = 256 * 2**20  # of the copies together, or CACHES_COVERED times the last cache where that is more
CACHES_COVERED = 4
MIN_COPIES, MAX_COPIES = 2, 4096
MIN_CALLS = 8  # in a cycle, however few the copies
GROUP = 16  # calls that one compiled function makes on the CPU, and copies of what may be in a cache
CACHED_PASSES = 8  # over the latter in a cycle
REPLAYS = 10  # of a CUDA graph in a cycle
CPUS = Path("/sys/devices/system/cpu")

Arguments = tuple[Any, ...]
Function = Callable[..., Any]


class Cycle:
    """Calls a function on each copy of its own arguments in turn; calling the cycle gives seconds of the calls.

    Values may be means over a group of calls, on CUDA over a replay. A cycle begins with an unmeasured group.

    Args:
        function: takes the shared arguments, then its own.
        shared: arguments that are the same tensors in every call.
        copies: of its own arguments, from :func:`copies_of`.
        device: where the tensors live.
        is_compiled: torch.compile the function.
        in_cache: go over the copies several times, since they may come from a cache.
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
        marks, calls = Marks(self._device), self._passes * len(self._groups)
        graph.replay()
        marks.mark()
        for _ in range(REPLAYS):
            graph.replay()
            marks.mark()
        return [seconds / calls for seconds in marks.gaps()]


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
    """Distinct copies of some arguments, themselves first, of which a whole cycle fits no cache.

    Args:
        own: tensors, or None for those that there are not.
        device: where they live.
        in_cache: make a few only, for they may come from a cache.

    Raises:
        ValueError: they do not fit the memory.
    """
    size = sum(x.nbytes for x in own if x is not None)
    count = GROUP
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


def last_level_cache(device: torch.device) -> int:
    """Bytes of the caches next to memory, all of them together; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found: dict[tuple[int, str], int] = {}
    for folder in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        found[int(level), shared] = _kibibytes(size)
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def _kibibytes(text: str) -> int:
    """Bytes of a size like ``32768K``."""
    return int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
