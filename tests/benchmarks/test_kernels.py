"""``bench kernels``: the operations of a step, what is compared, how copies are gone through, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastllama import LlamaConfig, LlamaForCausalLM, ops
from fastllama.loading import names
from fastllama.measure import Bandwidth, kv_cache_bytes, weight_bytes_per_step
from fastllama_benchmarks.cli import app
from fastllama_benchmarks.kernels import cycles
from fastllama_benchmarks.kernels import measure as kernels
from fastllama_benchmarks.kernels.cycles import Cycle, copies_of
from fastllama_benchmarks.kernels.measure import INDUCTOR, KERNEL, Check, check, interleaved, measure_kernels
from fastllama_benchmarks.kernels.ops import PLAIN, TORCH, Shapes, StepOp, step_ops
from fastllama_benchmarks.records import new_record, read
from fastllama_kernels.tools.step import SHAPES, parts

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
NAMES = ["qkv", "attention", "o", "gate_up", "down", "lm_head", "sample_greedy", "sample_top_k"]


class MadeUpProbe:
    """A memory of 10 GB/s."""

    def __init__(self, device: torch.device) -> None:
        self.best = Bandwidth(1e10, "made up")

    def sample(self) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies, nothing compiled, a made-up memory; ``random:tiny`` is a model."""
    monkeypatch.setitem(names.RANDOM_SHAPES, "tiny", LlamaConfig(**SHAPE))
    monkeypatch.setattr(cycles, "WORKING_SET", 1 << 18)
    monkeypatch.setattr(cycles, "CACHED_PASSES", 1)
    monkeypatch.setattr(cycles, "last_level_cache", lambda device: 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "BandwidthProbe", MadeUpProbe)


def shapes_of(batch: int = 1, live: int = 20, capacity: int = 24, **changes: Any) -> Shapes:
    return Shapes("tiny", LlamaConfig(**SHAPE | changes), batch, live, capacity, CPU)


def op_named(name: str, **arguments: Any) -> StepOp:
    return next(op for op in step_ops(shapes_of(**arguments)) if op.name == name)


def test_rows_have_the_names_that_the_plan_of_a_step_has() -> None:
    planned = {part.name for part in parts(SHAPES["llama-3.2-1b"], chip=(9, 0)) if not part.name.startswith("sample")}
    assert planned <= {op.label for op in step_ops(shapes_of())}


# ---- what the operations are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operations_read_what_a_step_reads(tie, has_bias) -> None:
    changes = {"tie_word_embeddings": tie, "attention_bias": has_bias, "mlp_bias": has_bias, "dtype": "bfloat16"}
    shapes = shapes_of(batch=2, **changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes.config)
    of_a_step = weight_bytes_per_step(model, 2, itemsize=2) + kv_cache_bytes(shapes.config, 20, 2, itemsize=2)
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


def test_the_formulas_are_those_of_the_network() -> None:
    """The operations of one layer, put together with its weights, give its output."""
    from fastllama.engine.decoder import FusedDecoder

    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 1, "initializer_range": 0.3})
    model = LlamaForCausalLM(config).eval()
    net = FusedDecoder(model)
    layer: Any = net.layers[0]
    found = {op.name: op for op in step_ops(shapes_of(live=1, num_hidden_layers=1))}
    _, cos, sin, position = found["attention"].shared
    caches = [torch.zeros(1, 2, 24, 32) for _ in range(2)]
    x = torch.randn(1, 64)
    with torch.no_grad():
        arrived = torch.zeros(config.num_attention_heads, dtype=torch.int32)
        expected = layer(x[:, None], cos, sin, position, *[cache.clone() for cache in caches], arrived)[:, 0]
        qkv = found["qkv"].run(x, None, layer.qkv.weight, None, layer.input_norm)
        heads = found["attention"].run(qkv[:, None], cos, sin, position, *caches)[:, 0]
        x = found["o"].run(heads, x, layer.o.weight, None, None)
        ffn = found["gate_up"].run(x, layer.gate_up.weight, None, layer.post_norm)
        x = found["down"].run(ffn, x, layer.down.weight, None, None)
    torch.testing.assert_close(x, expected)


def test_wrong_outputs_are_found() -> None:
    for op in step_ops(shapes_of(dtype="bfloat16")):

        def off(*arguments: Any, run: Any = op.run) -> torch.Tensor:
            output = run(*arguments)
            return output * 1.05 + 0.05 if output.is_floating_point() else (output + 1) % 320

        assert not check(op, off).passed, op.name


def test_keys_written_to_the_wrong_slot_are_found() -> None:
    op = op_named("attention")

    def early(qkv, cos, sin, position, k_cache, v_cache) -> torch.Tensor:
        output = op.run(qkv, cos, sin, position, k_cache, v_cache)
        k_cache[:, :, [18, 19]] = k_cache[:, :, [19, 18]]
        return output

    assert check(op, op.run).passed
    assert not check(op, early).passed


def test_an_error_that_is_no_number_does_not_pass() -> None:
    assert not Check(float("nan"), 0.1, 0.2).passed


def test_live_tokens_must_fit_the_capacity() -> None:
    with pytest.raises(ValueError, match="20 live tokens do not fit a cache of 10 slots"):
        Shapes.of("demo", None, "cpu", live=20, capacity=10)


def reading(*own: Any, in_cache: bool = False) -> StepOp:
    """An operation that has these arguments in each layer."""
    return StepOp("x", "x", "", 1, 0, (None,), own, torch.add, {}, in_cache=in_cache)


# ---- copies and cycles ---------------------------------------------------------------------------------------------


def test_copies_fill_the_working_set_and_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "WORKING_SET", 1 << 16)
    monkeypatch.setattr(cycles, "last_level_cache", lambda device: 0)
    own = (torch.randn(32, 32), None)
    copies = copies_of(reading(*own), CPU)
    assert copies[0][0] is own[0]
    assert sum(weight.nbytes for weight, _ in copies) >= 1 << 16
    assert len({weight.data_ptr() for weight, _ in copies}) == len(copies)
    assert all(torch.equal(weight, own[0]) and bias is None for weight, bias in copies)


def test_the_working_set_is_four_times_the_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "WORKING_SET", 1)
    monkeypatch.setattr(cycles, "last_level_cache", lambda device: 1 << 16)
    assert len(copies_of(reading(torch.zeros(1 << 14)), CPU)) == 4


def test_there_are_two_copies_of_what_is_larger_and_a_few_of_what_a_cache_holds(quick) -> None:
    assert len(copies_of(reading(torch.zeros(1 << 17)), CPU)) == 2
    assert len(copies_of(reading(torch.zeros(1 << 17), in_cache=True), CPU)) == cycles.CACHED_COPIES


def test_copies_that_do_not_fit_the_memory_are_refused(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="do not fit"):
        copies_of(reading(torch.zeros(1000)), CPU)


def test_a_cycle_goes_through_all_copies_in_turn() -> None:
    seen: list[int] = []
    copies = [(torch.tensor(number),) for number in range(10)]
    cycle = Cycle(lambda shared, own: seen.append(int(own)), reading(), copies, CPU)
    assert len(cycle()) == 10
    assert seen == [9, *range(10)]  # the first one unmeasured


def test_cycles_are_interleaved_after_two_unmeasured_rounds() -> None:
    order: list[str] = []

    def cycle(name: str) -> Any:
        return lambda: order.append(name) or [1e-6 * len(order)]

    found = interleaved({name: cycle(name) for name in "ABC"}, 2, MadeUpProbe(CPU), lambda message: None)  # type: ignore[arg-type]
    assert "".join(order) == "ABCCBA" * 2
    assert found["A"].p50 == pytest.approx((7 + 12) / 2)


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


def test_more_rows_than_the_kernels_take_run_through_inductor(quick) -> None:
    found = measure_kernels(shapes_of(batch=6), rounds=1, only=("qkv", "gate_up", "attention"))
    assert [kernel["implementation"] for kernel in found["kernels"]] == [INDUCTOR, KERNEL, INDUCTOR]


@pytest.fixture
def wrong_gate_up(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = ops.gate_up
    monkeypatch.setattr(ops, "gate_up", lambda *arguments: genuine(*arguments) * 1.05)


def test_a_wrong_operation_is_not_timed(quick, wrong_gate_up) -> None:
    found = measure_kernels(shapes_of(), rounds=1)
    assert [kernel["name"] for kernel in found["kernels"] if "us" not in kernel] == ["gate_up"]
    assert (found["parity"], found["step_us"]) == (False, None)


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    """Runs the command in this process."""
    common = ("kernels", "--model", "random:tiny", "--rounds", "1", "--live", "9", "--device", "cpu")
    return CliRunner().invoke(app, [*common, *arguments])


def test_the_command_shows_a_table_and_keeps_a_record(quick, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    result = run("--batch", "2", "--capacity", "16", "--dtype", "bfloat16", "--record", str(file), "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert read(file) == [record]
    assert (record["kind"], record["model"], record["dtype"]) == ("kernels", "random:tiny", "bfloat16")
    assert (record["batch"], record["live"], record["capacity"]) == (2, 9, 16)
    assert record["memory_bandwidth_gb_s"] == 10
    for words in ("norm, q/k/v", "greedy", "F.linear", "all are kernels"):
        assert words in result.stderr


def test_the_command_refuses_wrong_outputs(quick, wrong_gate_up, tmp_path: Path) -> None:
    result = run("--record", str(tmp_path / "r.jsonl"), "--json", str(tmp_path / "r.json"), "-q")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "parity gate" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "random:llama-9"), "llama-3.2-1b"),
        (("--dtype", "float99"), "float99"),
        (("--capacity", "8"), "9 live tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_line(quick, arguments, words) -> None:
    result = run(*arguments, "-q")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.gpu
def test_on_cuda_cycles_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "WORKING_SET", 1 << 20)
    config = LlamaConfig(**SHAPE | {"dtype": "bfloat16"})
    found = measure_kernels(Shapes("tiny", config, 2, 20, 24, torch.device("cuda", 0)), rounds=2)
    assert found["parity"]
    assert all(kernel["us"]["p50"] > 0 for kernel in found["kernels"])
