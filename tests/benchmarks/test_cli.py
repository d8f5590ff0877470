"""``fastllama bench``: its commands, where their output goes, and what they refuse."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastllama import LlamaForCausalLM
from fastllama_benchmarks import decode as decoding
from fastllama_benchmarks.cli import generate_table
from fastllama_benchmarks.records import read
from fastllama_benchmarks.workload import Workload

KNOWN = read(Path(__file__).parent / "data" / "records.jsonl")
WHAT = ("schema", "kind", "time", "model", "dtype", "device", "quantize", "environment")
DECODE = next(record for record in KNOWN if record["kind"] == "decode" and record["peers"])
FIELDS = {name: value for name, value in DECODE.items() if name not in WHAT}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the comparison, which measures nothing here, was asked for; ``parity`` in it decides the gate."""
    seen: dict[str, Any] = {"parity": True, "workloads": []}

    def compare(model: Any, workload: Workload, **arguments: Any) -> dict[str, Any]:
        seen.update(arguments)
        seen["workloads"].append(workload)
        if workload.batch == 13:
            raise ValueError("out of luck")
        sizes = {"batch": workload.batch, "prompt_len": workload.prompt_len, "capacity": workload.capacity}
        return {**FIELDS, **sizes, "new_tokens": workload.new_tokens, "parity": seen["parity"]} | {
            "rounds": arguments["rounds"],
            "disturbed": ["it was noisy"],
        }

    monkeypatch.setattr(decoding, "compare", compare)
    return seen


@pytest.mark.parametrize("command", [("decode",), ()], ids=["decode", "nothing"])
def test_decode_writes_its_table_to_stderr_and_one_json_line_to_stdout(bench, asked, command) -> None:
    result = bench(
        *command, "--batch", "2", "--prompt-len", "7", "--new-tokens", "9", "--rounds", "2", "--capacity", "50",
        "--peers", "eager,static", "--dtype", "float32", "--gpt-fast", "/g", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (workload,) = asked["workloads"]
    assert (workload.batch, workload.prompt_len, workload.new_tokens, workload.capacity) == (2, 7, 9, 50)
    assert (asked["rounds"], asked["peers"], asked["places"]["gpt_fast"]) == (2, ("eager", "static"), "/g")
    assert "tok/s" in result.stderr
    assert "DISTURBED: it was noisy" in result.stderr
    record = json.loads(result.stdout)
    assert (record["dtype"], record["config"]["hidden_size"]) == ("float32", 256)
    assert record["peers"] == DECODE["peers"]


def test_a_grid_records_each_point_and_goes_on_after_one_that_fails(bench, asked, tmp_path: Path) -> None:
    file, drawing = tmp_path / "r.jsonl", tmp_path / "grid.svg"
    sizes = ("--batch", "1,13,4", "--prompt-len", "8,16", "--new-tokens", "4")
    result = bench(*sizes, "--record", str(file), "--json", str(tmp_path / "r.json"), "--plot", str(drawing), "-q")
    assert result.exit_code == 0, result.stderr
    points = [(1, 8), (1, 16), (4, 8), (4, 16)]
    assert [(record["batch"], record["prompt_len"]) for record in read(file)] == points
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["points"]) == 4
    assert [each["reason"] for each in found["failed"]] == ["ValueError: out of luck"] * 2
    assert "batch 13, prompt_len 8, new_tokens 4 failed: ValueError: out of luck" in " ".join(result.stderr.split())
    assert "<svg" in drawing.read_text()


@pytest.mark.parametrize("batch", ["1", "1,2"])
def test_wrong_outputs_leave_no_record_and_end_in_an_error(bench, asked, tmp_path: Path, batch: str) -> None:
    asked["parity"] = False
    result = bench("--batch", batch, "--record", str(tmp_path / "r.jsonl"), "--quiet")
    assert result.exit_code == 1
    assert "failed the parity gate" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "random:llama-9"), "llama-3.2-1b"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--dtype", "float99"), "float99"),
        (("--plot", "x.gif"), "expected a name that ends in .png"),
        (("--prompt-len", "64", "--capacity", "8"), "do not fit 8 slots"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bench, arguments, words) -> None:
    result = bench("decode", *arguments, "--quiet")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("option", "value"), [("--peers", "vllm"), ("--batch", "1,x"), ("--capacity", "0")])
def test_wrong_values_are_wrong_usage(bench, option: str, value: str) -> None:
    assert bench("decode", option, value).exit_code == 2


def test_every_command_has_help_without_a_model(bench) -> None:
    for command in ("decode", "startup", "kernels", "quality", "report", "regress", "gpu"):
        assert bench(command, "--help").exit_code == 0


def test_a_report_shows_records_of_a_file(bench) -> None:
    file = str(Path(__file__).parent / "data" / "records.jsonl")
    shown, markdown = bench("report", file, "--kind", "decode"), bench("report", file, "--markdown")
    assert "fastllama bench decode --new-tokens 64 --gpt-fast DIR" in " ".join(shown.stdout.split())
    assert "| fastllama | 12.5 |" in markdown.stdout


def test_generate_gets_a_table_and_the_same_as_a_record(asked) -> None:
    model = LlamaForCausalLM.from_pretrained("demo", progress=False)
    shown, fields = generate_table(model, [5, 6, 7], 3, lambda message: None)
    assert (asked["workloads"], asked["peers"]) == ([Workload(((5, 6, 7),), 3)], ("eager",))
    assert (fields["new_tokens"], fields["parity"]) == (3, True)
    Console(file=(text := io.StringIO()), width=120).print(shown)
    assert "eager forward" in text.getvalue()


@pytest.mark.slow
def test_the_real_thing_on_the_demo_checkpoint(bench, memory) -> None:
    arguments = ("--prompt-len", "8", "--new-tokens", "6", "--rounds", "1", "--peers", "eager,gpt-fast", "--json", "-")
    result = bench(*arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["parity"] is True
    assert record["compiles_after_warmup"] == 0
    assert record["peers"]["eager forward"]["parity"] is True
    assert "--gpt-fast" in record["peers"]["gpt-fast"]["unavailable"]
