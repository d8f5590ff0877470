"""The GPU suite without a GPU: its lines, its budget, what it makes of lines that fail, and a run at tiny shapes."""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main

from fastllama_benchmarks.cli import app
from fastllama_benchmarks.gpu_suite import TESTS, Line, Suite, plan, table
from fastllama_benchmarks.records import read

ROOT = Path(__file__).resolve().parents[2]
RECORDS = read(Path(__file__).parent / "data" / "records.jsonl")


@pytest.mark.parametrize("sizes", ["full", "tiny"])
def test_every_line_is_a_command_with_a_limit_above_what_it_should_take(sizes) -> None:
    group: Any = typer.main.get_command(app)
    assert len({line.name for line in plan()["lines"]}) == len(plan()["lines"])
    for line in plan()["lines"]:
        assert line.expected < line.limit
        if line.name != TESTS:
            name, *words = shlex.split(line.command.format(**plan()[sizes]))
            options = {option for parameter in group.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options


def test_the_lines_can_be_shown_without_a_gpu(bench) -> None:
    shown = bench("gpu", "--list").stdout.splitlines()
    assert [line.split()[0] for line in shown[::2]] == [line.name for line in plan()["lines"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "sees no CUDA device"),
        (("--device", "cpu", "--tiny", "--gpt-fast", "/no/where"), "there is no folder /no/where"),
        (("--only", "70b"), "no line is called 70b"),
    ],
)
def test_what_cannot_run_at_all_has_exit_code_2(bench, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = bench("gpu", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


# ---- lines that fail, hang or do not fit -----------------------------------------------------------------------------


class Scripted(Suite):
    """A suite whose lines are scripts."""

    def command(self, line: Line) -> list[str]:
        return [sys.executable, "-c", line.command]


@pytest.fixture
def suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs scripts by name; gives the exit code and what was printed."""

    def run(scripts: dict[str, str], limit: float = 60.0, **settings: Any) -> tuple[int, str]:
        lines = [Line(name, 1.0, limit, name, script) for name, script in scripts.items()]
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
    assert ends(int((tmp_path / "pid").read_text()))


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone, as soon as the system has got round to it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 30)[0])
    finally:
        os.close(process)


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
    options = ("--device", "cpu", "--tiny", "--only", "8b-batches", "--out", str(tmp_path))
    command = [sys.executable, "-m", "fastllama_benchmarks.gpu_suite", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny b2 16/128" in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    assert [(record["batch"], record["parity"]) for record in read(file)] == [(2, True)]
