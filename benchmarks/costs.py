"""What a run costs besides time: compilations, recordings of CUDA graphs, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters


@dataclass
class Compilations:
    """What happened while :func:`counting` was open.

    Attributes:
        graphs: functions that torch.compile has compiled.
        recordings: CUDA graphs that were recorded.
    """

    graphs: int = 0
    recordings: int = 0


@contextmanager
def counting() -> Iterator[Compilations]:
    """Count compilations and recordings; the counts are there once the context is left."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    counted = Compilations()
    genuine = CUDAGraphTreeManager.record_function
    before = counters["stats"]["unique_graphs"]

    def record_function(self, *args, **kwargs):
        counted.recordings += 1
        return genuine(self, *args, **kwargs)

    CUDAGraphTreeManager.record_function = record_function
    try:
        yield counted
    finally:
        CUDAGraphTreeManager.record_function = genuine
        counted.graphs = counters["stats"]["unique_graphs"] - before


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now on; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use at once: of the device's memory on CUDA, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _peak_resident()


def _peak_resident() -> int | None:
    """Where there is no /proc; kilobytes, on macOS bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
