"""The GPU suite without a GPU: its lines, its budget, what it makes of lines that fail, and a run at tiny shapes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main
from typer.testing import CliRunner

from fastllama_benchmarks import gpu_suite
from fastllama_benchmarks.cli import app
from fastllama_benchmarks.gpu_suite import FULL, LINES, TESTS, TINY, Line, Suite, file_name, marked_files, table
from fastllama_benchmarks.records import read

ROOT = Path(__file__).resolve().parents[2]
RECORDS = read(Path(__file__).parent / "data" / "records.jsonl")


def run(*arguments: str) -> Any:
    """Runs ``fastllama bench gpu`` in this process."""
    return CliRunner().invoke(app, ["gpu", *arguments])


@pytest.mark.parametrize("sizes", [FULL, TINY], ids=["full", "tiny"])
def test_every_line_is_a_command_with_a_limit_above_what_it_should_take(sizes) -> None:
    group: Any = typer.main.get_command(app)
    assert len({line.name for line in LINES}) == len(LINES)
    for line in LINES:
        assert line.expected < line.limit
        if line.name != TESTS:
            name, *words = shlex.split(line.command.format(**sizes))
            options = {option for parameter in group.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options


def test_the_lines_can_be_shown_without_a_gpu() -> None:
    assert [line.split()[0] for line in run("--list").stdout.splitlines()[::2]] == [line.name for line in LINES]


def test_tests_are_found_by_their_mark() -> None:
    files = marked_files(ROOT / "tests")
    assert str(ROOT / "tests" / "test_gpu.py") in files
    assert str(ROOT / "tests" / "test_layering.py") not in files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "sees no CUDA device"),
        (("--device", "cpu", "--tiny", "--gpt-fast", "/no/where"), "--gpt-fast /no/where: there is no such folder"),
        (("--only", "70b"), "no line is called 70b"),
    ],
)
def test_what_cannot_run_at_all_is_one_line_and_exit_2(monkeypatch, arguments, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- lines that fail, hang or do not fit -----------------------------------------------------------------------------


class Scripted(Suite):
    """A suite whose lines are scripts."""

    def command(self, line: Line) -> list[str]:
        return [sys.executable, "-c", line.command]


@pytest.fixture
def suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs scripts by name; gives the exit code and what was printed."""

    def run(scripts: dict[str, str], limit: float = 60.0, **settings: Any) -> tuple[int, str]:
        lines = [Line(name, name, script, 1.0, limit) for name, script in scripts.items()]
        code = Scripted("cpu", tmp_path, tmp_path, **{"budget_seconds": 1000.0} | settings).run(lines)
        return code, capsys.readouterr().out

    return run


def test_a_line_that_crashes_is_a_note_and_the_next_one_runs(suite, tmp_path) -> None:
    second = tmp_path / "second"
    code, shown = suite({"first": "raise RuntimeError('no luck')", "second": f"open({str(second)!r}, 'w')"})
    assert code == 1
    assert "first ended with code 1: RuntimeError: no luck" in shown
    assert second.exists()


def test_a_line_that_hangs_is_ended_with_all_it_has_started(suite, tmp_path) -> None:
    hang = "import signal; signal.pause()"
    start = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hang!r}])"
    script = f"{start}; open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); {hang}"
    code, shown = suite({"hangs": script}, limit=5.0)
    assert code == 1
    assert "hangs ended after 5 s, before it was through" in shown
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_line_that_would_not_end_within_the_budget_is_skipped(suite) -> None:
    code, shown = suite({"first": "raise SystemExit(1)"}, budget_seconds=0.0)
    assert code == 0
    assert "first skipped: it takes about 1 s, 0 s are left" in shown


def test_an_interrupted_suite_still_ends_in_its_table(suite, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite, "run_process", interrupted)
    code, shown = suite({"first": ""})
    assert code == 130
    assert "interrupted" in shown


def test_file_names_are_made_of_letters_digits_and_hyphens(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (MIG 1g.18gb)")
    assert file_name("cuda") == "gpu-nvidia-h200-mig-1g-18gb"
    assert file_name("cpu") == "cpu"


def test_the_table_has_every_contender_and_says_what_did_not_run() -> None:
    shown = table([RECORDS[1] | {"disturbed": ["noise"]}], ["a note"])
    (row,) = [line.split() for line in shown.splitlines() if " fastllama " in line]
    assert row[-3:] == ["demo", "b1", "64/None"]
    assert "demo b1 64/None: gpt-fast not run: head_dim" in shown
    assert "demo b1 64/None: DISTURBED: noise" in shown
    assert shown.endswith("a note")
    assert table([], ["a note"]).splitlines() == ["no records", "", "a note"]


@pytest.mark.slow
def test_a_tiny_run_succeeds_and_leaves_records(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "fastllama_benchmarks.gpu_suite",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--only", "8b-batches"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny b2 16/128" in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    assert [(record["batch"], record["parity"]) for record in read(file)] == [(2, True)]
