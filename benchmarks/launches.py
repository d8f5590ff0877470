"""What a decode step launches on a GPU, and how long the host takes to launch it.

Both compare a call of one new token with one of several, through the public ``generate()`` alone. *Host time* is what a
step costs without waiting for the device: Python, guards, the replay of the graph. Where it comes near the step's own
time the device waits for the host. On a CPU nothing is launched and the host computes: there it is the whole step.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastllama import LlamaForCausalLM

from .workload import Workload

PROFILED_STEPS, TIMED_STEPS, REPEATS = 8, 32, 5
TOP_KERNELS = 15
COPIES = ("Memcpy", "Memset")
NO_WORK = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")  # events of the device that run nothing


def measure_launches(model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """The fields of a record of kind ``launches``; the engine has compiled what the workload needs."""
    host_s = host_seconds_per_step(model, workload)
    return {
        "batch": workload.batch,
        "prompt_len": workload.prompt_len,
        "capacity": workload.capacity or workload.prompt_len + workload.new_tokens,
        "host_us_per_step": 1e6 * host_s,
        **profile_launches(model, workload),
    }


def host_seconds_per_step(model: LlamaForCausalLM, workload: Workload) -> float:
    """Median host time of a decode step: wall time less what was spent waiting for the device."""

    def busy(new_tokens: int) -> float:
        with _waiting() as waits:
            start = time.perf_counter()
            _generate(model, workload, new_tokens)
            return time.perf_counter() - start - sum(waits)

    pairs = [(busy(1), busy(1 + TIMED_STEPS)) for _ in range(REPEATS)]
    return statistics.median((longer - shorter) / TIMED_STEPS for shorter, longer in pairs)


def profile_launches(model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """Kernels, copies and microseconds of a step: what a call of several steps runs more than a call of one token.

    On a CPU, where there are no kernels, torch's outermost operators are counted; Inductor's own loops are not seen.
    """
    prefill, whole = (_profiled(model, workload, count) for count in (1, 1 + PROFILED_STEPS))
    steps = {
        name: ((calls - prefill[name][0]) / PROFILED_STEPS, (us - prefill[name][1]) / PROFILED_STEPS)
        for name, (calls, us) in whole.items()
        if calls > prefill[name][0]
    }
    kernels = {name: found for name, found in steps.items() if not name.startswith(COPIES)}
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    top = sorted(kernels.items(), key=lambda item: item[1][1], reverse=True)[:TOP_KERNELS]
    return {
        "kernels_per_step": sum(calls for calls, _ in kernels.values()),
        "copies_per_step": float(sum(calls for name, (calls, _) in steps.items() if name not in kernels)),
        "kernel_us_per_step": sum(us for _, us in kernels.values()),
        "top_kernels": [{"name": name, "calls": calls, "us": us} for name, (calls, us) in top],
    }


class _Calls(dict[str, tuple[int, float]]):
    """Calls and microseconds by name; none of what was not seen."""

    def __missing__(self, name: str) -> tuple[int, float]:
        return 0, 0.0


def _profiled(model: LlamaForCausalLM, workload: Workload, new_tokens: int) -> _Calls:
    is_cuda = model.device.type == "cuda"
    _generate(model, workload, new_tokens)
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        _generate(model, workload, new_tokens)
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        if (_is_device_work if is_cuda else _is_outermost_operator)(event):
            counts[event.name] += 1
            spent[event.name] += event.time_range.elapsed_us()
    return _Calls({name: (calls, float(spent[name])) for name, calls in counts.items()})


def _is_device_work(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.is_user_annotation and event.name not in NO_WORK


def _is_outermost_operator(event: Any) -> bool:
    outer = event.cpu_parent
    while outer is not None and "::" not in outer.name:
        outer = outer.cpu_parent
    return "::" in event.name and outer is None


def _generate(model: LlamaForCausalLM, workload: Workload, new_tokens: int) -> None:
    ids_bt = workload.input_ids(model.device)
    model.generate(ids_bt, torch.ones_like(ids_bt), max_new_tokens=new_tokens, do_sample=False, eos_token_id=())
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """While open, the list gets the seconds of each wait for an event or the device."""
    waits: list[float] = []

    def timed(genuine: Any) -> Any:
        def wait(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return genuine(*arguments)
            finally:
                waits.append(time.perf_counter() - start)

        return wait

    owners = [(torch.cuda.Event, "synchronize"), (torch.cuda, "synchronize")]
    genuine = [getattr(owner, name) for owner, name in owners]
    for (owner, name), function in zip(owners, genuine, strict=True):
        setattr(owner, name, timed(function))
    try:
        yield waits
    finally:
        for (owner, name), function in zip(owners, genuine, strict=True):
            setattr(owner, name, function)
