"""Which implementation of an operation runs, and why: decided without the device at hand."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

import fastllama_kernels.attention
from fastllama import ops


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Every test asks anew what a device can do."""
    ops._without_triton.cache_clear()


def on_chip(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)


def test_triton_kernels_run_on_gpus_that_have_what_they_need(monkeypatch) -> None:
    on_chip(monkeypatch, (8, 0))
    choices = {choice.op: choice.implementation for choice in ops.report("cuda:0", torch.bfloat16)}
    assert {choices[op] for op in ("linear", "gate_up", "rotary_attention", "sample")} == {"Triton kernel"}
    assert ops.kernels_per_step("cuda:0", torch.bfloat16, layers=16) == 83


def test_heads_that_the_kernel_does_not_take_are_reported(monkeypatch) -> None:
    on_chip(monkeypatch, (9, 0))
    choices = {choice.op: choice for choice in ops.report("cuda:0", torch.bfloat16, head_dim=20)}
    assert choices["rotary_attention"][1:] == ("torch", "head_dim 20: the kernel takes multiples of 8 up to 256")
    assert choices["linear"].implementation == "Triton kernel"


def test_on_a_cpu_all_layers_are_one_operation() -> None:
    assert ops.report("cpu", torch.float32)[0] == ("layers", "C++ kernel", "all in one operation, up to 4 rows")
    assert ops.kernels_per_step("cpu", torch.float32, layers=16) == 3


def test_heads_that_the_kernel_does_not_take_are_told_once(caplog) -> None:
    ops._log_head_dim.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [ops._attention_takes("cuda", dim) for dim in (64, 20, 20, 264)] == [True, False, False, False]
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "head_dim 20: the kernel takes multiples of 8 up to 256",
        "head_dim 264: the kernel takes multiples of 8 up to 256",
    ]
    assert ops._attention_takes("cpu", 20)


def test_an_older_gpu_runs_torch_and_says_so_once(monkeypatch, caplog) -> None:
    on_chip(monkeypatch, (7, 5))
    with caplog.at_level(logging.WARNING):
        found = [ops.report("cuda:0", torch.float16)[0] for _ in range(2)]
    assert found[0] == ("linear", "torch", "compute capability 7.5 is below 8.0")
    assert [record.message for record in caplog.records] == [
        "compute capability 7.5 is below 8.0; decoding runs on torch's own operators, which is slower"
    ]
    assert ops.kernels_per_step("cuda:0", torch.float16, layers=16) is None


def test_without_triton_torch_runs(monkeypatch) -> None:
    on_chip(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "fastllama_kernels.attention.triton", None)
    monkeypatch.delattr(fastllama_kernels.attention, "triton", raising=False)
    reason = ops.report("cuda:0", torch.bfloat16)[0].reason
    assert reason.startswith("Triton cannot be imported")


@pytest.mark.parametrize(("device", "said"), [("cpu", "not torch.float64"), ("xpu", "float64"), ("mps", "float64")])
def test_a_dtype_that_no_kernel_takes_runs_on_torch(device, said) -> None:
    assert said in ops.report(device, torch.float64)[0].reason


def test_other_devices_have_no_kernels() -> None:
    assert ops.report("mps", torch.float32)[0].reason == "there is no kernel for mps"
