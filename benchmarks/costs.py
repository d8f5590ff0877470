"""What a run costs besides time: compilations, recordings of CUDA graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch._dynamo.utils import counters


@dataclass
class Compilations:
    """What happened while :func:`counting` was open."""

    graphs: int = 0  # functions that torch.compile has compiled
    recordings: int = 0  # CUDA graphs


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

    with patch.object(CUDAGraphTreeManager, "record_function", record_function):
        yield counted
    counted.graphs = counters["stats"]["unique_graphs"] - before


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now on; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: of the device's memory on CUDA, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return psutil.Process().memory_info().rss


def last_level_cache(device: torch.device) -> int:
    """Bytes of the caches next to memory, all of them together; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found: dict[tuple[int, str], int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        with suppress(OSError, ValueError):
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            units = {"K": 2**10, "M": 2**20, "G": 2**30}
            found[int(level), shared] = int(size.rstrip("KMG")) * units.get(size[-1:], 1)
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)
