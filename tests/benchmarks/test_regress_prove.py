"""The proof of the gate: what it asks for, what it keeps, and when it says that the gate works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastllama_benchmarks.regress import prove


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """How the gate, which is not run, was asked; it judges as it should unless a slowdown of 1 % is asked for."""
    calls: list[tuple[str, list[str]]] = []

    def invoke(kind: str, options: list[str]) -> dict[str, Any]:
        calls.append((kind, options))
        code = int(kind == "slowed" and options[-1] != "1.0")
        found = {"kind": kind, "exit": code, "seconds": 60.0, "headline": "PASS", "rounds": 3, "verdicts": {}}
        return found | {"samples": [1], "environment": {"argv": ["/private"], "cpu": "A processor"}}

    monkeypatch.setattr(prove, "invoke", invoke)
    return calls


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(prove.main)
    return CliRunner().invoke(app, list(arguments))


def test_equal_and_slowed_heads_are_judged_interleaved_and_kept(asked, tmp_path: Path) -> None:
    log, summary = tmp_path / "log", tmp_path / "summary"
    done = run("--runs", "2", "--log", str(log), "--summary", str(summary), "--base", "v1", "--", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert [kind for kind, _ in asked] == ["equal", "slowed"] * 2
    plain = ["--repo", ".", "--base", "v1", "--head", "v1", "--threads", "1"]
    assert [options for _, options in asked[:2]] == [plain, [*plain, "--slowdown", "10.0"]]
    assert "slowed: 2 of 2 failed as they should" in done.stdout
    assert len(log.read_text().splitlines()) == 4
    kept = json.loads(summary.read_text())
    assert kept["environment"] == {"cpu": "A processor"}
    assert "samples" not in kept["outcomes"][0]


def test_a_slowdown_that_is_not_seen_is_no_proof(asked, tmp_path: Path) -> None:
    done = run("--runs", "1", "--slowdown", "1", "--log", str(tmp_path / "log"))
    assert done.exit_code == 1
    assert "slowed: 0 of 1 failed as they should" in done.stdout


def test_an_interrupted_proof_goes_on_where_it_stopped(asked, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps({"kind": "equal", "exit": 0, "seconds": 1.0, "headline": ""}) + "\n")
    assert run("--log", str(log)).exit_code == 2
    assert run("--log", str(log), "--runs", "1", "--resume").exit_code == 0
    assert [kind for kind, _ in asked] == ["slowed"]
