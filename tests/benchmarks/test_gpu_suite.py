"""The GPU suite without a GPU: its plan, its budget, what it makes of steps that fail, and a run at tiny shapes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama_benchmarks import gpu_suite
from fastllama_benchmarks.gpu.plan import FULL, STEPS, TESTS, TINY, Step, points
from fastllama_benchmarks.gpu.table import MAX_LINES, _goal, report
from fastllama_benchmarks.gpu_suite import Process, Suite, file_name, main, marked_files
from fastllama_benchmarks.records import read

ROOT = Path(__file__).resolve().parents[2]
NOT_NEEDED = ("typer", "matplotlib", "pytest_benchmark", "pytest", "gguf", "hypothesis")


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_every_batch_is_decoded_at_both_contexts_with_both_shapes() -> None:
    planned = [point for step in STEPS for point in points(step.name, FULL) if point.quantize is None]
    found = {(point.shape, point.batch, point.prompt_len) for point in planned}
    assert found >= {(shape, batch, length) for shape in ("1b", "8b") for batch in (1, 8, 32) for length in (512, 8192)}
    assert any(point.prompt_len == 512 and point.slots > 8192 for point in planned), "a short context in a long cache"
    assert {point.quantize for point in points("quantized", FULL)} == {"int8", "int4"}
    assert {peer for point in planned for peer in point.peers} == {"transformers", "static", "gpt-fast"}


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["full", "tiny"])
def test_every_decode_fits_its_cache_and_the_events_of_a_gpu(scale) -> None:
    for step in STEPS:
        for point in points(step.name, scale):
            assert point.prompt_len + scale.new_tokens <= point.slots
            assert point.rounds >= 1
            assert point.warmups >= 1
    assert scale.new_tokens >= 64


def test_steps_have_names_of_their_own_and_limits_above_what_they_should_take() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.expected < step.limit for step in STEPS)
    assert all(points(step.name, FULL) or step.name in ("machine", TESTS, "kernels") for step in STEPS)


def test_tests_are_found_by_their_mark() -> None:
    files = marked_files(ROOT / "tests")
    assert {str(ROOT / "tests" / "test_gpu.py"), str(ROOT / "tests" / "ops" / "test_gemv.py")} <= set(files)
    assert str(ROOT / "tests" / "test_config.py") not in files


# ---- what cannot run -------------------------------------------------------------------------------------------------


def test_without_a_cuda_device_there_is_one_line_and_exit_2(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "sees no CUDA device" in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""


def test_a_folder_of_gpt_fast_that_is_not_there_is_one_line_and_exit_2(capsys, tmp_path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--gpt-fast", nowhere]) == 2
    assert capsys.readouterr().err == f"gpu_suite: --gpt-fast {nowhere}: there is no such folder\n"


def test_an_out_folder_that_cannot_be_made_is_one_line_and_exit_2(capsys, tmp_path) -> None:
    (tmp_path / "file").touch()
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "file" / "folder")]) == 2
    assert "--out" in capsys.readouterr().err


def test_an_unknown_step_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "70b"])
    assert ended.value.code == 2
    assert "'70b'" in capsys.readouterr().err


def test_the_plan_can_be_shown_without_a_gpu(capsys) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [step.name for step in STEPS]


def test_only_the_libraries_of_a_bare_gpu_machine_are_imported() -> None:
    modules = [f"fastllama_benchmarks.gpu.{path.stem}" for path in (ROOT / "benchmarks" / "gpu").glob("[a-z]*.py")] + [
        "fastllama",
        "fastllama_benchmarks.gpu_suite",
        "fastllama_benchmarks.peers.transformers",
        "fastllama_benchmarks.peers.gpt_fast",
    ]
    code = (
        f"import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- steps that fail, hang or do not fit -----------------------------------------------------------------------------


class Scripted(Suite):
    """A suite whose steps are scripts."""

    scripts: dict[str, str]

    def _command(self, step: Step) -> list[str]:
        return [sys.executable, "-c", self.scripts[step.name]]


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a suite of scripts by name; keyword arguments override options."""

    def make(scripts: dict[str, str], limits: dict[str, float] | None = None, **overrides: Any) -> Scripted:
        steps = [Step(name, name, 1.0, (limits or {}).get(name, 60.0)) for name in scripts]
        monkeypatch.setattr(gpu_suite, "STEPS", tuple(steps))
        options = {"device": "cpu", "tiny": False, "out": tmp_path, "gpt_fast": None, "only": None}
        made = Scripted(argparse.Namespace(**options | {"budget_seconds": 1000.0} | overrides), tmp_path)
        made.scripts = scripts
        return made

    return make


def test_a_step_that_crashes_is_a_line_and_the_next_one_runs(suite, capsys) -> None:
    scripts = {"first": "raise RuntimeError('no luck')", "second": "print('note: second ran')"}
    assert suite(scripts).run() == 1
    table = capsys.readouterr().out
    assert "first ended with code 1: RuntimeError: no luck" in table
    assert "second ran" in table


def test_a_step_that_hangs_is_ended_with_all_it_has_started(suite, capsys, tmp_path) -> None:
    grandchild = tmp_path / "pid"
    hang = "import signal; signal.pause()"
    script = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {hang!r}])\n"
        f"open({str(grandchild)!r}, 'w').write(str(process.pid))\n"
        "print('note: it hangs now', flush=True)\n"
        f"{hang}\n"
    )
    assert suite({"hangs": script, "next": "print('note: next ran')"}, {"hangs": 5.0}).run() == 1
    table = capsys.readouterr().out
    assert "hangs ended after 5 s, before it was through" in table
    assert "it hangs now" in table, "what it said before is not lost"
    assert "next ran" in table
    assert not is_running(int(grandchild.read_text()))


def is_running(pid: int) -> bool:
    """Whether a process still does anything: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_would_not_end_within_the_budget_is_skipped_and_told(suite, capsys) -> None:
    assert suite({"first": "print('note: first ran')"}, budget_seconds=0.0).run() == 0
    table = capsys.readouterr().out
    assert "first skipped: it takes about 1 s, 0 s are left" in table
    assert "first ran" not in table


def test_an_interrupted_suite_still_ends_in_its_table(suite, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    made = suite({"first": "print('note: first ran')", "second": ""})
    measure = made._measure
    scripted = {"first": measure, "second": interrupted}
    monkeypatch.setattr(made, "_measure", lambda step, limit: scripted[step.name](step, limit))
    assert made.run() == 130
    table = capsys.readouterr().out
    assert "first ran" in table
    assert "interrupted" in table


def test_what_a_process_said_is_told_apart_from_what_was_in_the_log(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    process = Process([sys.executable, "-c", "print('now')"], log, os.environ)
    assert process.wait(60) == 0
    assert process.said() == "now\n"
    assert log.read_text() == "before\nnow\n"


def test_the_steps_are_rehearsed_as_far_as_the_memory_goes(suite, monkeypatch) -> None:
    made = suite({"only": ""}, device="cpu")
    steps = [replace(step, is_rehearsed=True, gigabytes=30) for step in STEPS[:4]]
    assert made._rehearsed(steps) == []
    made.options.device = "cuda"
    properties = argparse.Namespace(total_memory=100e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert made._rehearsed(steps) == steps[:2]


def test_file_names_are_made_of_letters_digits_and_hyphens() -> None:
    assert file_name("NVIDIA H200 (MIG 1g.18gb)") == "nvidia-h200-mig-1g-18gb"


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_table_without_records_says_so() -> None:
    assert report([], ["a note"]).splitlines() == ["no records", "", "a note"]


def test_notes_that_do_not_fit_are_counted() -> None:
    lines = report([], [f"note {number}" for number in range(100)]).splitlines()
    assert len(lines) == MAX_LINES
    assert lines[-1] == "... and 45 more in the log"


def decode_record(peers: dict[str, Any]) -> dict[str, Any]:
    """What the table reads of the record of a decode."""
    packages = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
    gpu = {"name": "NVIDIA H200", "driver_version": "580", "cuda": "13.0"}
    environment = {"gpu": gpu, "cpu": "EPYC", "packages": packages, "commit": "abc", "dirty": True}
    return {
        "kind": "decode", "time": "2026-11-22", "model": "random:llama-3.2-1b", "dtype": "bfloat16", "shape": "1b",
        "quantize": None, "batch": 1, "prompt_len": 512, "capacity": 640, "tpot_ms": {"p50": 0.8}, "floor_ms": 0.6,
        "mbu": 0.75, "tokens_per_second": 1250.0, "parity": True, "compiles_after_warmup": 0,
        "recordings_after_warmup": 2, "peers": peers, "environment": environment,
    }  # fmt: skip


def test_a_decode_is_a_row_with_its_host_time_launches_and_peers() -> None:
    record = decode_record({
        "transformers": {"ratio": 12.345, "parity": True},
        "transformers static+compile": {"ratio": 2.5, "parity": False, "parity_detail": {"note": "far off"}},
        "gpt-fast": {"unavailable": "no such folder"},
    })  # fmt: skip
    launches = record | {"kind": "launches", "host_us_per_step": 90.0, "kernels_per_step": 163.0}
    lines = report([record, launches | {"kernel_us_per_step": 700.25}], []).splitlines()
    assert lines[0].startswith("NVIDIA H200, driver 580, CUDA 13.0, torch 2.11.0")
    assert "commit abc, with changes" in lines[1]
    (row,) = [line.split() for line in lines if line.startswith("1b bf16 b1 512/640")]
    assert row[4:] == [
        "800.0", "640", "missed", "600.0", "75.0%", "1250.0", "passed", "0", "2", "90.0", "163", "700.2", "12.35x",
        "wrong", "-",
    ]  # fmt: skip
    assert "gpt-fast not run: no such folder" in lines
    assert "transformers static+compile FAILED parity at 1b bf16 b1 512/640: far off" in lines


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run at tiny shapes on the CPU, and the folder it wrote to."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "fastllama_benchmarks.gpu_suite", "--device", "cpu", "--tiny", "--out", str(out)]
    command += ["--only", "machine", "8b-batches", "quantized"]
    return subprocess.run(command, capture_output=True, text=True), out


@pytest.mark.slow
def test_a_tiny_run_succeeds_and_ends_in_a_table(tiny_run) -> None:
    done, _ = tiny_run
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("\ndecode") :]
    assert "8b bf16 b2 16/128" in table
    assert "passed" in table
    assert "int8 is not there yet" in table
    assert "bandwidth" in table
    assert len(done.stdout.splitlines()) < 60
    assert len(done.stdout) < 12_000


@pytest.mark.slow
def test_a_tiny_run_leaves_records_and_few_files(tiny_run) -> None:
    _, out = tiny_run
    files = sorted(path.name for path in out.iterdir())
    assert len(files) <= 8
    (records,) = [read(out / name) for name in files if name.endswith(".jsonl")]
    assert [record["kind"] for record in records] == ["decode", "launches"] * 2
    assert all(record["model"] == "tiny" and record["parity"] for record in records)
    assert all(record["recordings_after_warmup"] == 0 for record in records if record["kind"] == "decode")
    assert all(record["host_us_per_step"] > 0 for record in records if record["kind"] == "launches")


@pytest.mark.slow
def test_the_steps_of_a_rehearsal_measure_nothing(tmp_path) -> None:
    from fastllama_benchmarks.gpu.steps import write_tiny_model

    write_tiny_model(tmp_path)
    files = {name: str(tmp_path / name) for name in ("records", "profile")}
    command = [sys.executable, "-m", "fastllama_benchmarks.gpu_suite", "--device", "cpu", "--tiny", "--rehearse"]
    command += ["--step", "8b-batches", "--workspace", str(tmp_path)]
    command += [argument for name, path in files.items() for argument in (f"--{name}", path)]
    subprocess.run(command, check=True, capture_output=True)
    assert not any(Path(path).exists() for path in files.values())


# ---- goals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "fields", "said"),
    [
        ("NVIDIA H200", {"tpot_ms": {"p50": 0.64}}, "640 met"),
        ("NVIDIA H200", {"tpot_ms": {"p50": 0.641}}, "640 missed"),
        ("NVIDIA H200", {"shape": "8b", "prompt_len": FULL.longest, "mbu": 0.91}, "90% met"),
        ("NVIDIA H200", {"shape": "8b", "prompt_len": FULL.longest, "mbu": 0.89}, "90% missed"),
        ("NVIDIA H200", {"batch": 3}, ""),
        ("NVIDIA H200", {"quantize": "int8"}, ""),
        ("NVIDIA A100", {}, ""),
    ],
)
def test_a_decode_that_has_a_goal_is_held_against_it(gpu, fields, said) -> None:
    record = decode_record({}) | {"environment": {"gpu": {"name": gpu}}}
    assert _goal(record | fields) == said
