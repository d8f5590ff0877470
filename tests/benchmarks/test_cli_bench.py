"""``fastllama bench``: its commands, where their output goes, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastllama.cli.app import app
from fastllama.measure import Bandwidth
from fastllama_benchmarks import compare as comparing
from fastllama_benchmarks.compare import Comparison
from fastllama_benchmarks.costs import Compilations
from fastllama_benchmarks.figures import figures
from fastllama_benchmarks.harness import Run, Workload
from fastllama_benchmarks.parity import Parity
from fastllama_benchmarks.records import read

REQUIRED = {
    "tokens_per_second", "tpot_ms", "ttft_ms", "bytes_per_step", "bandwidth_gb_s", "memory_bandwidth_gb_s", "mbu",
    "peak_memory_bytes", "compiles_after_warmup", "parity", "peers", "environment",
}  # fmt: skip


def run(*arguments: str) -> Any:
    """Runs the command in this process."""
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the comparison, which measures nothing here, was asked for; ``parity`` in it decides the gate."""
    seen: dict[str, Any] = {"parity": True}

    def compare(model: Any, workload: Workload, **arguments: Any) -> Comparison:
        seen.update(arguments, workload=workload)
        tokens = (tuple(range(workload.new_tokens)),) * workload.batch
        runs = [Run(tokens, 0.25, (0.1,) * (workload.new_tokens - 1))] * arguments["rounds"]
        parity = Parity(seen["parity"], 0.0, 1.0, 3, 3, "" if seen["parity"] else "wrong")
        known = {"batch": workload.batch, "bytes_per_step": 10**9, "bytes_per_second": 2e10, "reference": tokens[0]}
        found = (figures("fastllama", runs, 1.0, parity=parity, **known),)
        return Comparison(
            workload,
            arguments["rounds"],
            found,
            Bandwidth(2e10, "made up"),
            10**9,
            1,
            Compilations(),
            {"gpt-fast": "no"},
        )

    monkeypatch.setattr(comparing, "compare", compare)
    return seen


@pytest.mark.parametrize("command", [("decode",), ()], ids=["decode", "nothing"])
def test_decode_writes_its_table_to_stderr_and_one_json_line_to_stdout(asked, command) -> None:
    result = run(
        *command, "--batch", "2", "--prompt-len", "7", "--new-tokens", "9", "--rounds", "2", "--capacity", "50",
        "--peers", "eager,static", "--dtype", "float32", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    workload = asked["workload"]
    assert (workload.batch, workload.prompt_len, workload.new_tokens, workload.capacity) == (2, 7, 9, 50)
    assert (asked["rounds"], asked["peers"]) == (2, ("eager", "static"))
    assert "tok/s" in result.stderr
    record = json.loads(result.stdout)
    assert record.keys() >= REQUIRED
    assert record["tpot_ms"].keys() == {"p20", "p50", "p80"}
    assert record["tpot_ms"]["p50"] == pytest.approx(100)
    assert record["dtype"] == "float32"
    assert record["config"]["hidden_size"] == 256
    assert record["peers"] == {"gpt-fast": {"unavailable": "no"}}


def test_prefill_measures_the_prompt_alone(asked) -> None:
    result = run("prefill", "--prompt-len", "20", "--json", "-")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["kind"], record["new_tokens"], record["tpot_ms"]) == ("prefill", 1, None)
    assert record["tokens_per_second"] == pytest.approx(80)


def test_a_record_is_appended_to_a_file(asked, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("decode", "--record", str(tmp_path / "r.jsonl"), "--quiet").exit_code == 0
    assert [record["kind"] for record in read(tmp_path / "r.jsonl")] == ["decode", "decode"]


def test_wrong_outputs_leave_no_record_and_end_in_an_error(asked, tmp_path: Path) -> None:
    asked["parity"] = False
    result = run("--record", str(tmp_path / "r.jsonl"), "--json", str(tmp_path / "r.json"), "--quiet")
    assert result.exit_code == 1
    assert "failed the parity gate" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "random:llama-9"), "llama-3.2-1b"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--dtype", "float99"), "float99"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(arguments, words) -> None:
    result = run("decode", *arguments, "--quiet")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_peer_is_wrong_usage() -> None:
    result = run("decode", "--peers", "vllm")
    assert result.exit_code == 2
    assert "vllm" in result.stderr


@pytest.mark.slow
def test_the_real_thing_on_the_demo_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.measure.READ_BYTES", 1 << 25)
    arguments = ("--prompt-len", "8", "--new-tokens", "6", "--rounds", "1", "--peers", "eager,gpt-fast", "--json", "-")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["parity"] is True
    assert record["compiles_after_warmup"] == 0
    assert record["peers"]["eager forward"]["parity"] is True
    assert "--gpt-fast" in record["peers"]["gpt-fast"]["unavailable"]
