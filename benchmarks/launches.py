"""What a decode step launches on a GPU, and how long the host takes to launch it.

Both compare a call of one new token with one of several. *Host time* is what a step costs without waiting for the
device; where it comes near the step's own time the device waits for the host. On a CPU it is the whole step.
"""

import statistics
import time
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from fastllama import LlamaForCausalLM
from fastllama.measure import BandwidthProbe

from .environment import bandwidth
from .workload import Workload

PROFILED_STEPS, TIMED_STEPS, REPEATS = 8, 32, 5
TOP_KERNELS = 15
COPIES = ("Memcpy", "Memset")
NO_WORK = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")  # events of the device that run nothing


def measure_launches(model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """The fields of a record of kind ``launches``; the engine has compiled what the workload needs."""
    return {
        "batch": workload.batch,
        "prompt_len": workload.prompt_len,
        "capacity": workload.capacity or workload.prompt_len + workload.new_tokens,
        **bandwidth(BandwidthProbe(model.device)),
        "host_us_per_step": 1e6 * host_seconds_per_step(model, workload),
        **profile_launches(model, workload),
    }


def host_seconds_per_step(model: LlamaForCausalLM, workload: Workload) -> float:
    """Median host time of a decode step: wall time less what was spent waiting for events and the device."""
    genuine, waited = (torch.cuda.Event.synchronize, torch.cuda.synchronize), 0.0

    def wait(function: Any, *arguments: Any) -> None:
        nonlocal waited
        start = time.perf_counter()
        function(*arguments)
        waited += time.perf_counter() - start

    def busy(new_tokens: int) -> float:
        nonlocal waited
        start, waited = time.perf_counter(), 0.0
        _generate(model, workload, new_tokens)
        return time.perf_counter() - start - waited

    with (
        patch.object(torch.cuda.Event, "synchronize", lambda event: wait(genuine[0], event)),
        patch.object(torch.cuda, "synchronize", lambda *device: wait(genuine[1], *device)),
    ):
        pairs = [(busy(1), busy(1 + TIMED_STEPS)) for _ in range(REPEATS)]
    return statistics.median((longer - shorter) / TIMED_STEPS for shorter, longer in pairs)


def profile_launches(model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """Kernels, copies and microseconds of a step: what a call of several steps runs more than a call of one token.

    On a CPU, where there are no kernels, torch's outermost operators are counted; Inductor's own loops are not seen.
    """
    calls, spent = Counter[str](), Counter[str]()
    for count, sign in ((1 + PROFILED_STEPS, 1), (1, -1)):
        for event in _events(model, workload, count):
            calls[event.name] += sign
            spent[event.name] += sign * event.time_range.elapsed_us()
    steps = [(name, calls[name] / PROFILED_STEPS, spent[name] / PROFILED_STEPS) for name in calls if calls[name] > 0]
    kernels = sorted((step for step in steps if not step[0].startswith(COPIES)), key=lambda step: -step[2])
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    return {
        "kernels_per_step": sum(each for _, each, _ in kernels),
        "copies_per_step": float(sum(each for name, each, _ in steps if name.startswith(COPIES))),
        "kernel_us_per_step": float(sum(us for *_, us in kernels)),
        "top_kernels": [dict(zip(("name", "calls", "us"), each, strict=True)) for each in kernels[:TOP_KERNELS]],
    }


def _events(model: LlamaForCausalLM, workload: Workload, new_tokens: int) -> list[Any]:
    is_cuda = model.device.type == "cuda"
    _generate(model, workload, new_tokens)
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        _generate(model, workload, new_tokens)
    return [event for event in profiler.events() or () if _is_work(event, is_cuda)]


def _is_work(event: Any, is_cuda: bool) -> bool:
    if is_cuda:
        return event.device_type.name == "CUDA" and not event.is_user_annotation and event.name not in NO_WORK
    outer = event.cpu_parent
    while outer is not None and "::" not in outer.name:
        outer = outer.cpu_parent
    return "::" in event.name and outer is None


def _generate(model: LlamaForCausalLM, workload: Workload, new_tokens: int) -> None:
    ids_bt = workload.input_ids(model.device)
    model.generate(ids_bt, torch.ones_like(ids_bt), max_new_tokens=new_tokens, do_sample=False, eos_token_id=())
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
