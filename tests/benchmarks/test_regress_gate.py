"""The gate from end to end on a stand-in for fastllama whose clock is its own, so that its speed is exact."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastllama_benchmarks.regress import ROUNDS_TO_FAIL, cli, gate
from fastllama_benchmarks.regress.gate import BaseUnavailable, Gate, Result, Settings
from fastllama_benchmarks.regress.revisions import git
from fastllama_benchmarks.regress.rounds import BASE, FIRST_TOKENS, HEAD, ORDERS, SIDES, WARMUP_TURNS, Metric, run_round
from fastllama_benchmarks.regress.verdict import ARMS
from fastllama_benchmarks.workload import Contender, Decode, Workload

PROJECT = '[project]\nname = "fastllama"\ndependencies = []\n'
DATA = Path(__file__).parent / "data"
PACKAGE, TORCH = ((DATA / f"stand_in_{name}.txt").read_text() for name in ("fastllama", "torch"))
OPTIONS = ("--model", "counting", "--dtype", "float32", "--metrics", "tpot-b1,ttft-b2", "--rounds", "3", "--turns", "2")
COMMITS = {
    "old": "version = 1\n",
    "base": PACKAGE.format(step=0.010, shift=0),
    "slow": PACKAGE.format(step=0.011, shift=0),
    "other": PACKAGE.format(step=0.010, shift=1),
}


@pytest.fixture(scope="module")
def repo(new_repository: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commits of the stand-in, made before any of them is measured, each with a tag."""
    folder = tmp_path_factory.mktemp("gate")
    commit = new_repository(folder)
    git(folder, "tag", "empty", commit("The empty", **{"pyproject.toml": PROJECT, "torch.py": TORCH}))
    for tag, package in COMMITS.items():
        git(folder, "tag", tag, commit(f"The {tag} <one>", **{"fastllama/__init__.py": package}))
    return folder


@pytest.fixture
def invoke(repo: Path, tmp_path: Path) -> Callable:
    """Runs the command on two of the stand-in's commits, with this very interpreter."""

    def run(base: str, head: str, *options: str):
        where = ("--repo", str(repo), "--cache-dir", str(tmp_path / "cache"), "--python", sys.executable)
        return CliRunner().invoke(cli.app, ["--base", base, "--head", head, *where, *OPTIONS, *options])

    return run


def worktrees(repo: Path) -> list[str]:
    return git(repo, "worktree", "list").splitlines()


def test_a_slower_head_fails_and_everything_is_reported(repo: Path, invoke: Callable, tmp_path: Path) -> None:
    report, samples, summary = tmp_path / "out" / "report.md", tmp_path / "out" / "samples.json", tmp_path / "summary"
    done = invoke("base", "slow", "--report", str(report), "--json", str(samples), "--summary", str(summary))
    assert done.exit_code == 1, done.output
    assert "FAIL: slower: tpot-b1" in done.stdout
    assert "The base \\<one\\>" in report.read_text()
    assert "slower by at least 10.0 %, in every round (5 rounds)" in summary.read_text()
    found = json.loads(samples.read_text())
    steps = {arm: [[0.01 if SIDES[arm] == BASE else 0.011] * 7] * 2 for arm in ARMS}
    assert [times["tpot-b1"] for times in found["rounds"]] == [steps] * ROUNDS_TO_FAIL
    assert found["rounds"][0]["ttft-b2"]["head"] == [[0.05] * (1 + FIRST_TOKENS)] * 2
    assert [found["verdicts"][name]["outcome"] for name in ("tpot-b1", "ttft-b2")] == ["slower", "no slower"]
    assert len(worktrees(repo)) == 1


def test_outputs_that_differ_fail_before_anything_is_timed(invoke: Callable) -> None:
    done = invoke("base", "other", "--json", "-")
    assert done.exit_code == 1
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["headline"].startswith("FAIL: outputs differ from token 4 (prompt of 1 tokens): base ")
    assert (found["rounds"], found["verdicts"]) == ([], {})


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("empty", "it has no package fastllama"),
        ("old", "its fastllama predates what is measured: LlamaForCausalLM has no from_pretrained, stream, generate"),
    ],
)
def test_a_base_that_predates_what_is_measured_is_one_line(
    repo: Path, invoke: Callable, base: str, reason: str
) -> None:
    done = invoke(base, "base", "--quiet")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastllama-regress: error: the base ")
    assert reason in line
    assert len(worktrees(repo)) == 1


# ---- the rest needs no worker ---------------------------------------------------------------------------------------

METRICS = (Metric("tpot", 1),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "speed"], "'speed' is no metric: write tpot-bN or ttft-bN"),
        (["--threshold", "fast"], "'fast' is neither a number of percent nor auto"),
        (["--threshold", "0"], "is neither a number"),
        (["--python", "/nowhere/python"], "/nowhere/python is no interpreter"),
        (["--rounds", "2"], "'--rounds'"),
    ],
)
def test_wrong_usage_has_exit_code_2(invoke: Callable, options: list[str], message: str) -> None:
    done = invoke("base", "base", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("factors", "options", "code"),
    [
        ((1.0,) * 3, [], 0),
        ((0.8,) * 3, [], 0),
        ((1.1,) * 5, [], 1),
        ((1.3, 0.7, 1.2), [], 0),
        ((1.3, 0.7, 1.2), ["--strict"], 3),
        ((1.1,) * 5, ["--strict"], 1),
    ],
    ids=["no slower", "faster", "slower", "undecided", "undecided, strict", "slower, strict"],
)
def test_exit_codes(result_of, factors, options, code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run", lambda settings, say: result_of(*factors))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    done = CliRunner().invoke(cli.app, ["--base", "main", *options])
    assert done.exit_code == code, done.output
    assert (tmp_path / "summary").read_text().startswith("## Latency: ")


def test_a_base_that_cannot_be_measured_can_be_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: Settings, say: object) -> Result:
        raise BaseUnavailable("the base has no package fastllama")

    monkeypatch.setattr(gate, "run", run)
    summary, options = tmp_path / "summary", ["--base", "main", "--summary", str(tmp_path / "summary")]
    assert CliRunner().invoke(cli.app, options).exit_code == 2
    assert not summary.exists()
    assert CliRunner().invoke(cli.app, [*options, "--skip-old-base"]).exit_code == 0
    assert summary.read_text() == "## Latency: not measured: the base has no package fastllama\n"


class FakeWorker(Contender):
    """Takes part in rounds without a process; the head's steps take as long as given."""

    def __init__(self, arm: str, head_step: float, log: list[str]) -> None:
        self.name, self.info = arm, {"vocab_size": 9, "device_type": "cpu"}
        self._step, self._log = head_step if SIDES[arm] == HEAD else 1.0, log
        log.append(f"start {arm}")

    def run(self, workload: Workload) -> Decode:
        self._log.append(self.name)
        return Decode(((1,) * workload.new_tokens,) * workload.batch, 1.0, (self._step,) * workload.new_tokens)


def test_arms_start_and_decode_in_rotating_orders() -> None:
    logs: list[list[str]] = [[], []]
    for number, log in enumerate(logs):
        start = functools.partial(FakeWorker, head_step=1.0, log=log)
        run_round(number, start, METRICS, lambda vocab, batch: Workload.random(vocab, batch, 2, 3), turns=4)
    starts = [[line for line in log if line.startswith("start")] for log in logs]
    assert starts == [[f"start {arm}" for arm in order] for order in ORDERS[:2]]
    takes = [line for line in logs[0] if line in ARMS][len(ARMS) * WARMUP_TURNS :]
    assert takes[::2] == takes[1::2] == [arm for order in ORDERS for arm in order]


@pytest.mark.parametrize(("step", "rounds", "failed"), [(1.0, 3, False), (1.1, ROUNDS_TO_FAIL, True)])
def test_a_pass_takes_the_rounds_that_were_asked_for_and_a_failure_enough_of_them(
    result_of, monkeypatch: pytest.MonkeyPatch, step: float, rounds: int, failed: bool
) -> None:
    nothing = result_of()
    it = Gate(replace(nothing.settings, metrics=METRICS, turns=2), {}, lambda message: None)
    monkeypatch.setattr(it, "start", lambda arm: FakeWorker(arm, step, []))
    found = it.measure(nothing)
    assert (len(found.rounds), found.failed) == (rounds, failed)
