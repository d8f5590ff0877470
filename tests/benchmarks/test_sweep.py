"""``bench sweep``: which points there are, what each records, and that nothing is lost when one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.cli import options
from fastllama.measure import Bandwidth
from fastllama_benchmarks import sweep as sweeping
from fastllama_benchmarks.commands.sweep import sweep as sweep_command
from fastllama_benchmarks.compare import Comparison
from fastllama_benchmarks.costs import Compilations
from fastllama_benchmarks.figures import figures
from fastllama_benchmarks.harness import Run, Workload
from fastllama_benchmarks.ours import Engine
from fastllama_benchmarks.parity import Parity
from fastllama_benchmarks.records import read
from fastllama_benchmarks.sweep import (
    BATCH,
    CAPACITY,
    LIVE,
    PRECISION,
    AtCapacity,
    Point,
    Setting,
    Sweep,
    check_fits,
    parse_axes,
    parse_values,
    plan,
)

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=3,
)


class Played:
    """Stands in for loading and comparing, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.loads: list[tuple[str | None, str | None]] = []
        self.workloads: list[Workload] = []
        self.released_before: list[bool] = []
        self.others: list[list[str]] = []
        self.fails: Callable[[Workload], BaseException | None] = lambda workload: None
        self.is_right: Callable[[Workload], bool] = lambda workload: True

    def load(self, dtype: str | None, quantize: str | None) -> LlamaForCausalLM:
        self.loads.append((dtype, quantize))
        if quantize:
            raise NotImplementedError(f"{quantize} is not there yet")
        model = LlamaForCausalLM(CONFIG).to(getattr(torch, dtype or "bfloat16"))
        model.release = lambda: setattr(model, "is_released", True)  # type: ignore[method-assign]
        model.is_released = True  # type: ignore[assignment]
        return model

    def compare(self, model: Any, workload: Workload, *, rounds: int, peers: Any, others: Any, **_: Any) -> Comparison:
        self.others.append([other.name for other in others])
        self.released_before.append(model.is_released)
        model.is_released = False
        self.workloads.append(workload)
        if error := self.fails(workload):
            raise error
        tokens = (tuple(range(workload.new_tokens)),) * workload.batch
        runs = [Run(tokens, 0.25, (0.1,) * (workload.new_tokens - 1))] * rounds
        right = self.is_right(workload)
        parity = Parity(right, 0.0, 1.0, 3, 3, "" if right else "all of it")
        known = {"batch": workload.batch, "bytes_per_step": 10**9, "bytes_per_second": 2e10, "reference": tokens[0]}
        found = tuple(figures(name, runs, 1.0, parity=parity, **known) for name in ("fastllama", *peers))
        return Comparison(workload, rounds, found, Bandwidth(2e10, "made up"), 10**9, 1, Compilations())

    def sweep(self, **changes: Any) -> Sweep:
        return Sweep("tiny", Setting(**{"dtype": "bfloat16"} | changes), self.load, rounds=2)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(sweeping, "compare", found.compare)
    monkeypatch.setattr(sweeping, "engine_of", lambda model: SimpleNamespace(cache=SimpleNamespace(max_cache_len=4096)))
    monkeypatch.setattr(
        options, "load", lambda name, dtype, device, quantize, quiet: SimpleNamespace(model=found.load(dtype, quantize))
    )
    return found


# ---- points --------------------------------------------------------------------------------------------------------


def test_points_go_along_each_axis_and_load_each_precision_once() -> None:
    points = plan(("precision", "batch"), {BATCH: (1, 3)}, Setting("bfloat16"), CONFIG, 4096)
    assert [(point.axis, point.value) for point in points] == [
        (BATCH, 1), (BATCH, 3), (PRECISION, "bfloat16"), (PRECISION, "float32"), (PRECISION, "float16"),
    ]  # fmt: skip


def test_capacities_take_turns_with_the_first_that_holds_the_tokens() -> None:
    points = plan((CAPACITY,), {CAPACITY: (64, 256, 512)}, Setting(), CONFIG, 4096)
    assert [(point.value, point.beside) for point in points] == [(64, 256), (256, None), (512, 256)]


def test_a_second_engine_shares_the_weights_and_has_slots_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Engine, "run", lambda self, workload: seen.append((self._model, workload.capacity)))
    model = LlamaForCausalLM(CONFIG.replace(tie_word_embeddings=True)).eval()
    weights = model.state_dict()
    AtCapacity(model, 32).run(Workload(((1, 2),), 3, 500))
    ((twin, capacity),) = seen
    assert capacity == 32
    assert twin is not model
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert all(w.data_ptr() == weights[name].data_ptr() for name, w in twin.state_dict().items())
    twin.model.layers[0].mlp.up_proj.weight.data = torch.zeros(1)  # as an engine moves them
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


def test_live_lengths_stay_below_their_bound_and_what_the_model_was_made_for() -> None:
    def lengths(max_live: int, **settings: Any) -> list[Any]:
        return [point.value for point in plan((LIVE,), {}, Setting(**settings), CONFIG, max_live)]

    assert lengths(2048) == [128, 512, 2048]
    assert lengths(32768) == [128, 512, 2048]  # of 4096 positions
    assert [p.value for p in plan((LIVE,), {LIVE: (5000,)}, Setting(), CONFIG, 100)] == [5000]


def test_a_point_changes_its_axis_and_nothing_else() -> None:
    base = Setting("bfloat16", None, 2, 60, 10, 100)
    assert Point(BATCH, 8).of(base) == Setting("bfloat16", None, 8, 60, 10, 100)
    assert Point(CAPACITY, 512).of(base) == Setting("bfloat16", None, 2, 60, 10, 512)
    assert Point(PRECISION, "float32").of(base) == Setting("float32", None, 2, 60, 10, 100)
    assert Point(PRECISION, "int8").of(base) == Setting("bfloat16", "int8", 2, 60, 10, 100)
    live = Point(LIVE, 128).of(base)
    assert (live.prompt_len, live.live) == (123, 128)
    with pytest.raises(ValueError, match="10 new tokens leave no prompt for 5 live"):
        Point(LIVE, 5).of(base)


def test_lists_of_axes_and_values_are_read() -> None:
    assert parse_axes("all") == (BATCH, LIVE, CAPACITY, PRECISION)
    assert parse_axes("live, batch") == (LIVE, BATCH)
    assert parse_values(BATCH, "1, 4") == (1, 4)
    assert parse_values(PRECISION, "float16,int4") == ("float16", "int4")


@pytest.mark.parametrize("text", ["", "depth", "batch,depth"])
def test_unknown_axes_are_refused(text) -> None:
    with pytest.raises(ValueError, match="there are batch, live, capacity, precision"):
        parse_axes(text)


@pytest.mark.parametrize(("axis", "text"), [(BATCH, "0"), (LIVE, "x"), (CAPACITY, ""), (PRECISION, "float8")])
def test_values_that_an_axis_does_not_have_are_refused(axis, text) -> None:
    with pytest.raises(ValueError, match=f"{axis} cannot be"):
        parse_values(axis, text)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_each_point_starts_from_a_released_engine_on_weights_that_stay(played: Played) -> None:
    sweep = played.sweep()
    outcomes = [sweep.measure(Point(BATCH, value)) for value in (1, 2, 4)]
    assert [workload.batch for workload in played.workloads] == [1, 2, 4]
    assert played.released_before == [True, True, True]
    assert played.loads == [("bfloat16", None)]
    assert all(outcome.fields and not outcome.failure for outcome in outcomes)


def test_a_record_says_which_point_it_is(played: Played) -> None:
    fields = played.sweep().measure(Point(LIVE, 512)).fields
    assert fields is not None
    assert (fields["sweep"], fields["sweep_value"], fields["live_tokens"]) == (LIVE, 512, 512)
    assert (fields["prompt_len"], fields["new_tokens"], fields["slots"]) == (480, 64, 4096)
    assert (fields["model"], fields["dtype"], fields["quantize"]) == ("tiny", "bfloat16", None)


def test_other_precisions_are_loaded_when_their_turn_comes(played: Played) -> None:
    sweep = played.sweep(dtype=None)
    dtypes = [(sweep.measure(Point(PRECISION, name)).fields or {})["dtype"] for name in ("bfloat16", "float32")]
    assert dtypes == ["bfloat16", "float32"]
    assert played.loads == [(None, None), ("float32", None)]


def test_a_point_that_fails_says_why_and_the_next_one_runs(played: Played) -> None:
    played.fails = lambda workload: RuntimeError("out of memory\nlong story") if workload.batch == 2 else None
    sweep = played.sweep()
    outcomes = [sweep.measure(point) for point in (Point(BATCH, 2), Point(PRECISION, "int8"), Point(BATCH, 4))]
    assert outcomes[0].failure == "RuntimeError: out of memory"
    assert "int8 is not there yet" in outcomes[1].failure
    assert outcomes[2].fields is not None
    assert played.released_before == [True, True]


def test_outputs_that_fail_the_gate_have_no_fields(played: Played) -> None:
    played.is_right = lambda workload: False
    outcome = played.sweep().measure(Point(BATCH, 1))
    assert (outcome.fields, outcome.comparison, outcome.is_wrong) == (None, None, True)
    assert "all of it" in outcome.failure


def test_a_model_that_cannot_be_loaded_at_all_is_an_error(played: Played) -> None:
    with pytest.raises(NotImplementedError):
        played.sweep(quantize="int8")


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(CONFIG)
    with pytest.raises(ValueError, match=r"64 \+ 64 tokens do not fit 100 slots"):
        check_fits(model, Setting(capacity=100))
    monkeypatch.setattr(sweeping, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="KV cache"):
        check_fits(model, Setting())


def test_pad_ids_in_a_random_prompt_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be dropped as padding, and the decode would be another one than that of the peers."""
    seen: list[torch.Tensor] = []

    def stream(self: Any, ids_bt: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        assert attention_mask is not None
        seen.append(attention_mask)
        return iter([torch.zeros(1, dtype=torch.long)] * 2)

    monkeypatch.setattr(LlamaForCausalLM, "stream", stream)
    Engine(LlamaForCausalLM(CONFIG)).run(Workload(((5, 3, 3, 7),), 2))
    assert seen[0].tolist() == [[1, 1, 1, 1]]


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(sweep_command)
    return CliRunner().invoke(app, ["--device", "cpu", "--dtype", "bfloat16", *arguments])


def test_every_point_is_a_line_a_record_and_part_of_the_json(played: Played, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    result = run("--axis", "batch", "--values", "1,2", "--peers", "eager", "--record", str(file), "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["points"] == read(file)
    assert found["failed"] == []
    assert [(point["kind"], point["sweep_value"], point["batch"]) for point in found["points"]] == [
        ("decode", 1, 1), ("decode", 2, 2),
    ]  # fmt: skip
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [
        ["axis", "value"], ["batch", "1"], ["batch", "2"],
    ]  # fmt: skip
    assert "1.00 x eager" in result.stderr


def test_an_interruption_loses_no_point_that_was_measured(played: Played, tmp_path: Path) -> None:
    played.fails = lambda workload: KeyboardInterrupt() if workload.batch == 4 else None
    file = tmp_path / "records.jsonl"
    result = run("--axis", "batch", "--record", str(file), "-q")
    assert result.exit_code == 130
    assert [record["batch"] for record in read(file)] == [1, 2]
    assert "batch" in result.stdout


def test_a_failed_point_is_a_line_and_no_error(played: Played, tmp_path: Path) -> None:
    played.fails = lambda workload: MemoryError("none left") if workload.batch == 2 else None
    result = run("--axis", "batch", "--values", "1,2,4", "--json", str(tmp_path / "s.json"), "-q")
    assert result.exit_code == 0, result.stderr
    assert "failed: MemoryError: none left" in result.stdout
    assert json.loads((tmp_path / "s.json").read_text())["failed"] == [
        {"sweep": "batch", "sweep_value": 2, "reason": "MemoryError: none left"}
    ]


def test_wrong_outputs_are_not_recorded_and_end_in_an_error(played: Played, tmp_path: Path) -> None:
    played.is_right = lambda workload: workload.batch != 2
    file = tmp_path / "records.jsonl"
    result = run("--axis", "batch", "--values", "1,2,4", "--record", str(file), "-q")
    assert result.exit_code == 1
    assert [record["batch"] for record in read(file)] == [1, 4]
    assert "parity gate at batch 2" in result.stderr


def test_a_sweep_without_any_figure_is_an_error(played: Played) -> None:
    played.fails = lambda workload: RuntimeError("no GPU today")
    result = run("--axis", "batch", "--values", "1", "-q")
    assert result.exit_code == 1
    assert "no GPU today" in result.stderr


def test_capacities_and_the_longest_live_length_can_be_chosen(played: Played) -> None:
    result = run("--axis", "capacity,live", "--capacities", "128,8192", "--max-live", "600", "-q")
    assert result.exit_code == 0, result.stderr
    found = [(workload.capacity, workload.live_tokens) for workload in played.workloads]
    assert found == [(None, 128), (None, 512), (128, 96), (8192, 96)]
    assert played.others == [[], [], [], ["128 slots"]]  # measured minutes apart, they would not compare


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--axis", "depth"), "depth"),
        (("--axis", "all", "--values", "1"), "--values"),
        (("--axis", "batch", "--capacities", "1"), "--capacities"),
        (("--axis", "batch", "--values", "zero"), "zero"),
        (("--peers", "vllm"), "vllm"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(played: Played, arguments, words) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert played.loads == []


@pytest.mark.slow
def test_the_real_thing_on_the_demo_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.measure.READ_BYTES", 1 << 25)
    base = ("--prompt-len", "12", "--new-tokens", "8", "--rounds", "1", "--json", "-", "-q")
    result = run("--axis", "capacity", "--capacities", "32,64", *base)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["failed"] == []
    assert [(p["sweep_value"], p["slots"], p["parity"]) for p in found["points"]] == [(32, 32, True), (64, 64, True)]
    beside = found["points"][1]["peers"]["32 slots"]
    assert (beside["parity"], beside["same_tokens"]) == (True, 8)
