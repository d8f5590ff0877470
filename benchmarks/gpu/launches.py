"""What a decode step launches, and how long the host takes to launch it.

Both look at the engine's own loop. *Host time* is the time that the loop takes for a step without what it waits for the
device: Python, guards, the replay of the graph. It matters where it comes near the step's own time, for then the device
waits for the host. On a CPU nothing is launched and the host computes: there it is the whole step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastllama import GenerationConfig, LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.engine.buffers import Snapshot
from fastllama.generation.loop import decode
from fastllama.generation.request import requests_of

from ..harness import CUDA_CHUNK, Workload

PROFILED_STEPS = 8
TOP_KERNELS = 15
COPIES = ("Memcpy", "Memset")
NO_WORK = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")  # events of the device that run nothing


@dataclass(frozen=True)
class Kernel:
    """One of a step's kernels, by name.

    Attributes:
        name: the kernel's; on a CPU, where there are none, the torch operator's: Inductor's own loops are not seen.
        calls: per step.
        us: microseconds of all its calls together, per step.
    """

    name: str
    calls: float
    us: float


@dataclass(frozen=True)
class Launches:
    """What a step launches, as the profiler saw a few of them.

    Attributes:
        kernels_per_step: kernels that ran.
        copies_per_step: copies and fills beside them, those of tokens to the host included.
        kernel_us_per_step: microseconds in kernels; what is missing to the step's time, the device idled or copied.
        top_kernels: those that took longest.
    """

    kernels_per_step: float
    copies_per_step: float
    kernel_us_per_step: float
    top_kernels: tuple[Kernel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"top_kernels": [asdict(kernel) for kernel in self.top_kernels]}


def host_seconds_per_step(model: LlamaForCausalLM, workload: Workload) -> float:
    """Median host time of a decode step, over groups of ``CUDA_CHUNK`` steps.

    Args:
        model: its engine has compiled what the workload needs.
        workload: what to decode; on CUDA at least four groups of new tokens.

    Raises:
        ValueError: there are too few new tokens.
    """
    busy, sizes = [], []
    with _waiting() as waited, closing(_decoding(model, workload, CUDA_CHUNK)) as groups:
        start = time.perf_counter()
        for tokens_bn in groups:
            busy.append(time.perf_counter() - start - sum(waited))
            sizes.append(tokens_bn.shape[1])
            waited.clear()
            start = time.perf_counter()
    # While group k is waited for, group k + 1 is launched; the first look also holds the prefill.
    usual = max(sizes)
    steps = [seconds / size for seconds, size in zip(busy[1:], sizes[2:], strict=False) if size == usual]
    if not steps:
        raise ValueError(f"host time needs at least {4 * CUDA_CHUNK} new tokens, got {workload.new_tokens}")
    return statistics.median(steps)


def profile_launches(model: LlamaForCausalLM, workload: Workload) -> Launches:
    """Profile ``PROFILED_STEPS`` replayed decode steps.

    Args:
        model: its engine has compiled what the workload needs.
        workload: what to decode, at least ``3 * PROFILED_STEPS`` new tokens.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    is_cuda = model.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with closing(_decoding(model, workload, PROFILED_STEPS)) as groups:
        next(groups)
        _synchronize(model.device)
        with profile(activities=[activity]) as profiler:
            for _ in range(1 if is_cuda else PROFILED_STEPS):  # a look launches a group, on a CPU a step
                next(groups)
            _synchronize(model.device)
    events = profiler.events()
    is_work = _is_device_work if is_cuda else _is_outermost_operator
    work = [event for event in events or () if is_work(event)]
    kernels = [event for event in work if not event.name.startswith(COPIES)]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    spent: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        spent[event.name].append(event.time_range.elapsed_us())
    found = [Kernel(name, len(us) / PROFILED_STEPS, sum(us) / PROFILED_STEPS) for name, us in spent.items()]
    found.sort(key=lambda kernel: kernel.us, reverse=True)
    return Launches(
        len(kernels) / PROFILED_STEPS,
        (len(work) - len(kernels)) / PROFILED_STEPS,
        sum(kernel.us for kernel in found),
        tuple(found[:TOP_KERNELS]),
    )


def _is_device_work(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.is_user_annotation and event.name not in NO_WORK


def _is_outermost_operator(event: Any) -> bool:
    outer = event.cpu_parent
    while outer is not None and "::" not in outer.name:
        outer = outer.cpu_parent
    return "::" in event.name and outer is None


def _decoding(model: LlamaForCausalLM, workload: Workload, poll_every: int) -> Generator[torch.Tensor, None, None]:
    ids_bt = workload.input_ids(model.device)
    config = GenerationConfig(max_new_tokens=workload.new_tokens, eos_token_id=())
    requests = requests_of(ids_bt, torch.ones_like(ids_bt), config, model.config.vocab_size)
    return decode(engine_of(model), requests, poll_every)


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """While open, the list gets the seconds of each wait of the engine for tokens."""
    genuine, waited = Snapshot.read, []

    def read(self: Snapshot) -> torch.Tensor:
        start = time.perf_counter()
        tokens_bn = genuine(self)
        waited.append(time.perf_counter() - start)
        return tokens_bn

    Snapshot.read = read
    try:
        yield waited
    finally:
        Snapshot.read = genuine


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
