"""The proof of the gate: what it injects, what it keeps, and when it says that the gate works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastllama_benchmarks.harness import Unavailable
from fastllama_benchmarks.regress import prove
from fastllama_benchmarks.regress.worktrees import git

ROOT = Path(__file__).resolve().parents[2]
AUTHOR = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
SOURCE = """
import time

now = [0.0]
time.perf_counter = lambda: now.__setitem__(0, now[0] + 1e-6) or now[0]


def call_plainly(step, args):
    step(*args)


def decode(seconds):
    before = now[0]
    call_plainly(lambda: now.__setitem__(0, now[0] + seconds), ())
    return now[0] - before
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with an engine whose time passes only where it says so."""
    folder = tmp_path / "repo"
    (folder / "fastllama").mkdir(parents=True)
    (folder / prove.GRAPHS).write_text(SOURCE)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, *AUTHOR, "commit", "--quiet", "-m", "The engine")
    return folder


@pytest.fixture
def typer_app():
    import typer

    app = typer.Typer()
    app.command()(prove.main)
    return app


def outcome(kind: str, code: int, headline: str = "") -> dict:
    return {"kind": kind, "exit": code, "headline": headline, "seconds": 60.0}


def test_the_engine_has_the_place_that_is_slowed() -> None:
    assert prove.HOOKED in (ROOT / prove.GRAPHS).read_text()


def test_every_step_of_the_slowed_engine_takes_a_tenth_longer(repo: Path) -> None:
    prove.inject(repo, 10.0)
    engine: dict = {}
    exec((repo / prove.GRAPHS).read_text(), engine)
    assert engine["decode"](2.0) == pytest.approx(2.2, rel=1e-4)


def test_an_engine_without_that_place_is_one_line(repo: Path) -> None:
    (repo / prove.GRAPHS).write_text("def step(): pass\n")
    with pytest.raises(Unavailable, match="has no call_plainly any more"):
        prove.inject(repo, 10.0)


def test_the_clone_has_one_more_commit_which_is_always_the_same(repo: Path) -> None:
    found = []
    for _ in range(2):
        with prove.slowed_clone(repo, "main", 10.0) as (clone, revisions):
            assert git(clone, "rev-parse", f"{revisions['slowed']}^") == revisions["base"] == revisions["equal"]
            found.append(revisions["slowed"])
        assert not clone.exists()
    assert found[0] == found[1]
    assert git(repo, "status", "--porcelain") == ""


def test_it_is_a_proof_only_if_all_came_out_right_and_there_are_enough() -> None:
    right = [outcome("equal", 0), outcome("slowed", 1)]
    assert prove.is_proof(right, 1)
    assert not prove.is_proof(right, 2)
    assert not prove.is_proof([*right, outcome("equal", 1)], 1)
    assert not prove.is_proof([*right, outcome("slowed", 0)], 1)
    assert not prove.is_proof([*right, outcome("slowed", 2)], 1)


def test_the_tally_counts_what_came_out_right() -> None:
    outcomes = [outcome("equal", 0, "INCONCLUSIVE"), outcome("equal", 1), outcome("slowed", 1)]
    assert list(prove.tally(outcomes)) == [
        "equal: 1 of 2 passed as they should, 1 inconclusive, 60 s at most",
        "slowed: 1 of 1 failed as they should, 0 inconclusive, 60 s at most",
    ]


def test_the_summary_keeps_every_outcome_and_no_path(repo: Path, tmp_path: Path, typer_app, monkeypatch) -> None:
    details = {
        "rounds": 3, "verdicts": {"tpot-b1": {"outcome": "no slower"}}, "samples": [1, 2],
        "environment": {"cpu": "a processor", "argv": ["/home/somebody/x"], "variables": {"TORCH_HOME": "/home/x"}},
    }  # fmt: skip
    monkeypatch.setattr(
        prove, "invoke", lambda clone, revisions, kind, arguments: outcome(kind, prove.EXPECTED[kind]) | details
    )
    file = tmp_path / "summary.json"
    options = ["--repo", str(repo), "--runs", "2", "--log", str(tmp_path / "log"), "--summary", str(file)]
    assert CliRunner().invoke(typer_app, options).exit_code == 0
    found = json.loads(file.read_text())
    assert found["environment"] == {"cpu": "a processor"}
    assert [each["kind"] for each in found["outcomes"]] == ["equal", "slowed"] * 2
    assert found["outcomes"][0]["verdicts"] == details["verdicts"]
    assert "samples" not in file.read_text()
    assert found["tally"][0].startswith("equal: 2 of 2 passed")


def test_kinds_are_run_by_turns_and_a_proof_goes_on_where_it_stopped(
    repo: Path, tmp_path: Path, typer_app, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, ran = tmp_path / "proof.jsonl", []
    log.write_text(json.dumps(outcome("equal", 0)) + "\n")

    def invoke(clone: Path, revisions: dict, kind: str, arguments: list[str]) -> dict:
        ran.append((kind, arguments))
        return outcome(kind, prove.EXPECTED[kind])

    monkeypatch.setattr(prove, "invoke", invoke)
    options = ["--repo", str(repo), "--runs", "2", "--log", str(log)]
    assert CliRunner().invoke(typer_app, options).exit_code == 2
    done = CliRunner().invoke(typer_app, [*options, "--resume", "--", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert ran == [(kind, ["--threads", "1"]) for kind in ("slowed", "equal", "slowed")]
    assert len(prove.read(log)) == 4


def test_one_wrong_outcome_is_told_with_exit_code_1(
    repo: Path, tmp_path: Path, typer_app, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "invoke", lambda clone, revisions, kind, arguments: outcome(kind, 0))
    done = CliRunner().invoke(typer_app, ["--repo", str(repo), "--runs", "1", "--log", str(tmp_path / "log")])
    assert done.exit_code == 1
    assert "slowed: 0 of 1 failed as they should" in done.stdout
