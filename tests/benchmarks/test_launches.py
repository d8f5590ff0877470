"""What a step launches and how long the host takes, told from the engine's own loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.engine.runner import Snapshot
from fastllama_benchmarks.gpu import launches as launches
from fastllama_benchmarks.gpu.launches import PROFILED_STEPS, host_seconds_per_step, profile_launches
from fastllama_benchmarks.harness import CUDA_CHUNK, Workload

WORKLOAD = Workload.random(64, 1, 5, 4 * CUDA_CHUNK)
LAUNCH, WAIT = 0.25, 4.0  # seconds of a made-up clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless a test moves it."""
    made_up = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: made_up.now)
    return made_up


def looks(clock: SimpleNamespace, sizes: list[int]) -> Iterator[torch.Tensor]:
    """What the engine does on CUDA: launches a group, then waits for the one before; the prefill takes long."""
    clock.now += 100.0 + LAUNCH * sizes[0]
    for at, size in enumerate(sizes):
        if at + 1 < len(sizes):
            clock.now += LAUNCH * sizes[at + 1]
        snapshot: Any = Snapshot(torch.zeros(1, size, dtype=torch.long))
        yield snapshot.read()


@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [16, 16, 16, 4], [16, 16, 16]], ids=str)
def test_host_time_is_what_launching_takes_without_the_wait_for_the_device(clock, monkeypatch, sizes) -> None:
    genuine = Snapshot.read

    def slow_read(self: Snapshot) -> torch.Tensor:
        clock.now += WAIT
        return genuine(self)

    monkeypatch.setattr(Snapshot, "read", slow_read)
    monkeypatch.setattr(launches, "_decoding", lambda *_: looks(clock, sizes))
    assert host_seconds_per_step(None, WORKLOAD) == LAUNCH
    assert Snapshot.read is slow_read, "the engine is left as it was"


def test_too_few_tokens_for_the_host_time_are_refused(clock, monkeypatch) -> None:
    monkeypatch.setattr(launches, "_decoding", lambda *_: looks(clock, [16, 16]))
    with pytest.raises(ValueError, match="at least 64 new tokens"):
        host_seconds_per_step(None, WORKLOAD)


@pytest.mark.slow
def test_the_operators_of_a_step_are_counted_once_a_step() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128)
    model = LlamaForCausalLM(config).eval()
    model.generate(WORKLOAD.input_ids(), max_new_tokens=2, eos_token_id=())
    found = profile_launches(model, WORKLOAD)
    calls = {kernel.name: kernel.calls for kernel in found.top_kernels}
    assert calls["fastllama::layers"] == 1
    assert found.kernels_per_step == sum(calls.values())
    assert found.kernel_us_per_step == pytest.approx(sum(kernel.us for kernel in found.top_kernels))
    assert host_seconds_per_step(model, WORKLOAD) > 0
    assert WORKLOAD.new_tokens > PROFILED_STEPS


def event(name: str, device: str, annotation: bool = False) -> Any:
    """An event as the profiler gives it, of three microseconds."""
    span = SimpleNamespace(elapsed_us=lambda: 3.0)
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=annotation,
        cpu_parent=None,
        time_range=span,
    )


def test_on_cuda_only_kernels_count_and_copies_are_told_apart(monkeypatch) -> None:
    events = [
        *[event("triton_red_fused", "CUDA")] * 2 * PROFILED_STEPS,
        *[event("sm90_xmma_gemm", "CUDA")] * PROFILED_STEPS,
        *[event("Memcpy DtoH (Device -> Pinned)", "CUDA")] * PROFILED_STEPS,
        event("Stream Wait Event", "CUDA"),
        event("a region", "CUDA", annotation=True),
        event("cudaGraphLaunch", "CPU"),
    ]
    monkeypatch.setattr(launches, "profile", lambda activities: FakeProfiler(events))
    monkeypatch.setattr(launches, "_decoding", lambda *_: iter_with_close([1, 2]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = profile_launches(SimpleNamespace(device=torch.device("cuda")), WORKLOAD)  # type: ignore[arg-type]
    assert found.kernels_per_step == 3
    assert found.copies_per_step == 1
    assert found.kernel_us_per_step == 9.0
    assert [(kernel.name, kernel.calls, kernel.us) for kernel in found.top_kernels] == [
        ("triton_red_fused", 2, 6.0),
        ("sm90_xmma_gemm", 1, 3.0),
    ]


def test_a_profiler_that_saw_nothing_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(launches, "profile", lambda activities: FakeProfiler([]))
    monkeypatch.setattr(launches, "_decoding", lambda *_: iter_with_close([1, 2]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        profile_launches(SimpleNamespace(device=torch.device("cuda")), WORKLOAD)  # type: ignore[arg-type]


def iter_with_close(items: list[int]) -> Iterator[int]:
    """A generator, which has ``close``."""
    yield from items


class FakeProfiler:
    """Sees the given events."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def __enter__(self) -> FakeProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Any]:
        return self._events
