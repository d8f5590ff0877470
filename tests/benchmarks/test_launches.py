"""What a step launches and how long the host takes: what a longer call does more than a call of one token."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LlamaForCausalLM
from fastllama_benchmarks import launches
from fastllama_benchmarks.launches import PROFILED_STEPS, host_seconds_per_step, measure_launches
from fastllama_benchmarks.records import new_record
from fastllama_benchmarks.workload import Workload

WORKLOAD = Workload.random(64, 1, 5, 8)
CUDA: Any = SimpleNamespace(device=torch.device("cuda"))


def test_host_time_is_what_a_step_takes_without_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    def generate(model: Any, workload: Workload, new_tokens: int) -> None:
        sleep(100.0 + 0.25 * new_tokens)  # the prefill, and launching each step
        torch.cuda.synchronize()

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: sleep(77.0))
    genuine = torch.cuda.synchronize
    monkeypatch.setattr(launches, "_generate", generate)
    assert host_seconds_per_step(CUDA, WORKLOAD) == 0.25
    assert torch.cuda.synchronize is genuine, "torch is left as it was"


def event(name: str, device: str = "CUDA", annotation: bool = False) -> Any:
    """An event as the profiler gives it, of three microseconds."""
    kind, span = SimpleNamespace(name=device), SimpleNamespace(elapsed_us=lambda: 3.0)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, cpu_parent=None, time_range=span)


def profiled(monkeypatch: pytest.MonkeyPatch, prefill: list[Any], step: list[Any]) -> dict[str, Any]:
    """The launches of a step, had the profiler seen these events."""
    tokens = [0]

    class Profiler:
        def __init__(self, activities: Any) -> None:
            pass

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            return prefill + step * (tokens[0] - 1)

    monkeypatch.setattr(launches, "profile", Profiler)
    monkeypatch.setattr(launches, "_generate", lambda model, workload, new: tokens.__setitem__(0, new))
    return measure_launches(CUDA, WORKLOAD)


def test_on_cuda_only_kernels_count_and_copies_are_apart(monkeypatch: pytest.MonkeyPatch, memory) -> None:
    noise = [event("Stream Wait Event"), event("a region", annotation=True), event("cudaGraphLaunch", "CPU")]
    step = [event("triton_red"), event("triton_red"), event("sm90_gemm"), event("Memcpy DtoH"), *noise]
    found = profiled(monkeypatch, [event("sm90_gemm")] * 5, step)
    new_record("launches", found | {"model": "m", "dtype": "d", "device": "cuda", "parity": True}, {})
    assert (found["memory_bandwidth_gb_s"], found["memory_bandwidth_method"]) == (10, "made up")
    assert (found["kernels_per_step"], found["copies_per_step"], found["kernel_us_per_step"]) == (3, 1, 9.0)
    assert found["top_kernels"] == [
        {"name": "triton_red", "calls": 2, "us": 6.0},
        {"name": "sm90_gemm", "calls": 1, "us": 3.0},
    ]


@pytest.mark.slow
def test_the_operators_of_a_step_are_counted_once_a_step(tiny, memory) -> None:
    found = measure_launches(LlamaForCausalLM(tiny).eval(), WORKLOAD)
    calls = {kernel["name"]: kernel["calls"] for kernel in found["top_kernels"]}
    assert calls["fastllama::decode_step"] == 1
    assert found["kernels_per_step"] >= sum(calls.values())
    assert found["host_us_per_step"] > 0
    assert PROFILED_STEPS > 1
