"""``bench kernels``: the operations of a step, what is compared, how copies are gone through, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, ops
from fastllama.loading import names
from fastllama.measure import kv_cache_bytes, weight_bytes_per_step
from fastllama_benchmarks.kernels import measure as kernels
from fastllama_benchmarks.kernels.measure import KERNEL, Cycle, check, copies_of, measure_kernels
from fastllama_benchmarks.kernels.ops import PLAIN, TORCH, Shapes, StepOp, step_ops
from fastllama_benchmarks.records import new_record, read

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
NAMES = ["qkv", "attention", "o", "gate_up", "down", "lm_head", "sample_greedy", "sample_top_k"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, memory: type) -> None:
    """Few copies, nothing compiled, a made-up memory; ``random:tiny`` is a model."""
    monkeypatch.setitem(names.RANDOM_SHAPES, "tiny", LlamaConfig(**SHAPE))
    monkeypatch.setattr(kernels, "WORKING_SET", 1 << 18)
    monkeypatch.setattr(kernels, "CACHED_PASSES", 1)
    monkeypatch.setattr(kernels, "last_level_cache", lambda device: 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def shapes_of(batch: int = 1, live: int = 20, capacity: int = 24, **changes: Any) -> Shapes:
    return Shapes("tiny", LlamaConfig(**SHAPE | changes), batch, live, capacity, CPU)


# ---- what the operations are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operations_read_what_a_step_reads(tie, has_bias) -> None:
    changes = {"tie_word_embeddings": tie, "attention_bias": has_bias, "mlp_bias": has_bias, "dtype": "bfloat16"}
    shapes = shapes_of(batch=2, **changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes.config).to(torch.bfloat16)
    of_a_step = weight_bytes_per_step(model, 2) + kv_cache_bytes(shapes.config, 20, 2, itemsize=2)
    embedded_rows = 0 if tie else 2 * 64 * 2
    read = sum(op.calls * op.nbytes for op in step_ops(shapes) if not op.in_cache)
    assert read == of_a_step - embedded_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_torch_and_what_a_step_runs_are_near_float64(dtype, batch, has_bias) -> None:
    shapes = shapes_of(batch=batch, dtype=dtype, attention_bias=has_bias, mlp_bias=has_bias)
    for op in step_ops(shapes):
        found = check(op, op.run)
        assert found.passed, (op.name, found)
        assert found.torch_error <= 64 * torch.finfo(shapes.dtype).eps, op.name


def test_wrong_outputs_are_found() -> None:
    for op in step_ops(shapes_of(dtype="bfloat16")):

        def off(*arguments: Any, run: Any = op.run) -> torch.Tensor:
            output = run(*arguments)
            return output * 1.05 + 0.05 if output.is_floating_point() else (output + 1) % 320

        assert not check(op, off).passed, op.name


def reading(*own: Any, in_cache: bool = False) -> StepOp:
    """An operation that has these arguments in each layer."""
    return StepOp("x", "x", "", 1, 0, (None,), own, torch.add, {}, in_cache=in_cache)


# ---- copies and cycles ---------------------------------------------------------------------------------------------


def test_copies_fill_the_working_set_and_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKING_SET", 1 << 16)
    monkeypatch.setattr(kernels, "last_level_cache", lambda device: 0)
    own = (torch.randn(32, 32), None)
    copies = copies_of(reading(*own), CPU)
    assert copies[0][0] is own[0]
    assert sum(weight.nbytes for weight, _ in copies) >= 1 << 16
    assert len({weight.data_ptr() for weight, _ in copies}) == len(copies)
    assert all(torch.equal(weight, own[0]) and bias is None for weight, bias in copies)


def test_a_cycle_calls_the_function_on_each_copy_in_turn_after_a_call_that_is_not_timed() -> None:
    called: list[Any] = []
    op, own = reading(1), [(number,) for number in range(10)]
    seconds = Cycle("x", lambda shared, each: called.append(each), op, own, CPU).run(None)  # type: ignore[arg-type]
    assert called == [9, *range(10)]
    assert len(seconds) == 10


# ---- the measurement -----------------------------------------------------------------------------------------------


def test_a_record_has_every_operation(quick) -> None:
    record = new_record("kernels", measure_kernels(shapes_of(dtype="bfloat16"), rounds=1), {})
    assert [kernel["name"] for kernel in record["kernels"]] == NAMES
    assert record["parity"]
    runs = {kernel["name"]: kernel["implementation"] for kernel in record["kernels"]}
    assert runs["qkv"] == runs["attention"] == runs["sample_greedy"] == KERNEL
    entry = record["kernels"][0]
    assert entry["bandwidth_gb_s"] == pytest.approx(entry["bytes"] / entry["us"]["p50"] / 1e3)
    assert entry["mbu"] == pytest.approx(entry["bandwidth_gb_s"] / 10)
    assert entry["references"].keys() == {TORCH, PLAIN}
    read_bytes = sum(e["calls_per_step"] * e["bytes"] for e in record["kernels"] if not e["in_cache"])
    assert record["floor_us"] == pytest.approx(read_bytes / 1e4)
    assert record["step_us"] == pytest.approx(sum(k["calls_per_step"] * k["us"]["p50"] for k in record["kernels"]))
    assert json.loads(json.dumps(record)) == record


def test_a_wrong_operation_is_not_timed(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = ops.gate_up
    monkeypatch.setattr(ops, "gate_up", lambda *arguments: genuine(*arguments) * 1.05)
    found = measure_kernels(shapes_of(), rounds=1)
    assert [kernel["name"] for kernel in found["kernels"] if "us" not in kernel] == ["gate_up"]
    assert (found["parity"], found["step_us"]) == (False, None)


def test_the_command_shows_a_table_and_keeps_a_record(bench, quick, tmp_path: Path) -> None:
    file, sizes = tmp_path / "records.jsonl", ("--live", "9", "--batch", "2", "--capacity", "16", "--rounds", "1")
    what = ("--model", "random:tiny", "--dtype", "bfloat16", "--device", "cpu", *sizes)
    result = bench("kernels", *what, "--record", str(file), "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert read(file) == [record]
    assert (record["kind"], record["model"], record["dtype"]) == ("kernels", "random:tiny", "bfloat16")
    assert (record["batch"], record["live"], record["capacity"]) == (2, 9, 16)
    assert record["memory_bandwidth_gb_s"] == 10
    for words in ("norm, q/k/v", "greedy", "F.linear", "all are kernels"):
        assert words in result.stderr


@pytest.mark.gpu
def test_on_cuda_cycles_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKING_SET", 1 << 20)
    config = LlamaConfig(**SHAPE | {"dtype": "bfloat16"})
    found = measure_kernels(Shapes("tiny", config, 2, 20, 24, torch.device("cuda", 0)), rounds=2)
    assert found["parity"]
    assert all(kernel["us"]["p50"] > 0 for kernel in found["kernels"])
