"""The gate from end to end on a stand-in for fastllama whose clock is its own, so that its speed is exact."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastllama_benchmarks.regress import ROUNDS_TO_FAIL, cli, gate
from fastllama_benchmarks.regress.gate import BaseUnavailable, Gate, Result, Settings, Side
from fastllama_benchmarks.regress.revisions import Revision, git
from fastllama_benchmarks.regress.rounds import (
    ARMS,
    BASE,
    FIRST_TOKENS,
    HEAD,
    ORDERS,
    SIDES,
    WARMUP_TURNS,
    Metric,
    Round,
    run_round,
)
from fastllama_benchmarks.regress.verdict import Interval, Outcome, Verdict
from fastllama_benchmarks.workload import Decode, Unavailable, Workload

AUTHOR = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
PROJECT = '[project]\nname = "fastllama"\ndependencies = []\n'
DATA = Path(__file__).parent / "data"
PACKAGE, TORCH = ((DATA / f"stand_in_{name}.txt").read_text() for name in ("fastllama", "torch"))
OPTIONS = ("--model", "counting", "--dtype", "float32", "--metrics", "tpot-b1,ttft-b2", "--rounds", "3", "--turns", "2")


class Repository:
    """Commits of the stand-in, made before any of them is measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        git(folder, "init", "--quiet", "--initial-branch=main")
        self.commit("empty", None)
        self.commit("old", "version = 1\n")
        self.commit("base", PACKAGE.format(step=0.010, shift=0))
        self.commit("slow", PACKAGE.format(step=0.011, shift=0))
        self.commit("other", PACKAGE.format(step=0.010, shift=1))

    def commit(self, tag: str, package: str | None) -> None:
        (self.folder / "pyproject.toml").write_text(PROJECT)
        if package:
            (self.folder / "torch.py").write_text(TORCH)
            (self.folder / "fastllama").mkdir(exist_ok=True)
            (self.folder / "fastllama" / "__init__.py").write_text(package)
        git(self.folder, "add", "--all")
        git(self.folder, *AUTHOR, "commit", "--quiet", "-m", f"The {tag} <one>")
        git(self.folder, "tag", tag)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("gate") / "repo")


@pytest.fixture
def invoke(repo: Repository, tmp_path: Path) -> Callable:
    """Runs the command on two of the stand-in's commits, with this very interpreter."""

    def run(base: str, head: str, *options: str):
        where = ("--repo", str(repo.folder), "--cache-dir", str(tmp_path / "cache"), "--python", sys.executable)
        return CliRunner().invoke(cli.app, ["--base", base, "--head", head, *where, *OPTIONS, *options])

    return run


def worktrees(repo: Repository) -> list[str]:
    return git(repo.folder, "worktree", "list").splitlines()


def test_a_slower_head_fails_and_everything_is_reported(repo: Repository, invoke: Callable, tmp_path: Path) -> None:
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
    repo: Repository, invoke: Callable, base: str, reason: str
) -> None:
    done = invoke(base, "base", "--quiet")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastllama-regress: error: the base ")
    assert reason in line
    assert len(worktrees(repo)) == 1


# ---- the rest needs no worker ---------------------------------------------------------------------------------------

BASE_REVISION = Revision("main", "a" * 40, "Before", False, "a" * 12)
HEAD_REVISION = Revision(".", "b" * 40, "After", True, "b" * 12, True)
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


def verdict(outcome: Outcome) -> Verdict:
    zero = Interval(0.0, -0.01, 0.01)
    return Verdict(outcome, zero, 0.01, 0.03, 3, 0, "a reason")


def result(outcome: Outcome, tmp_path: Path) -> Result:
    info = {"device_type": "cpu", "device": "cpu", "torch": "2", "python": "3", "threads": 1}
    times = {"tpot-b1": {arm: [[0.1], [0.1]] for arm in ARMS}}
    settings = Settings(tmp_path, "main", ".", tmp_path, METRICS)
    done = Round(times, info=dict.fromkeys(ARMS, info))
    return Result(settings, BASE_REVISION, HEAD_REVISION, rounds=(done,) * 3, verdicts={"tpot-b1": verdict(outcome)})


@pytest.mark.parametrize(
    ("outcome", "options", "code"),
    [
        (Outcome.NO_SLOWER, [], 0),
        (Outcome.FASTER, [], 0),
        (Outcome.SLOWER, [], 1),
        (Outcome.UNDECIDED, [], 0),
        (Outcome.UNDECIDED, ["--strict"], 3),
        (Outcome.SLOWER, ["--strict"], 1),
    ],
)
def test_exit_codes(
    outcome: Outcome, options: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "run", lambda settings, say: result(outcome, tmp_path))
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


class FakeWorker:
    """Takes part in rounds without a process; the head's steps take as long as given."""

    def __init__(self, arm: str, head_step: float, log: list[str]) -> None:
        self.name, self.info = arm, {"vocab_size": 9, "device_type": "cpu"}
        self._step, self._log = head_step if SIDES[arm] == HEAD else 1.0, log
        log.append(f"start {arm}")

    def run(self, workload: Workload) -> Decode:
        self._log.append(self.name)
        if self._step < 0:
            raise Unavailable("it broke")
        return Decode(((1,) * workload.new_tokens,) * workload.batch, 1.0, (self._step,) * workload.new_tokens)

    def close(self) -> None:
        self._log.append(f"close {self.name}")


def fake_round(number: int, head_step: float, log: list[str], turns: int = 4) -> Round:
    def start(arm: str) -> FakeWorker:
        return FakeWorker(arm, head_step, log)

    return run_round(number, start, METRICS, lambda vocab, batch: Workload.random(vocab, batch, 2, 3), turns)  # type: ignore[arg-type]


def test_arms_start_and_decode_in_rotating_orders() -> None:
    logs: list[list[str]] = [[], []]
    for number, log in enumerate(logs):
        fake_round(number, 1.0, log)
    starts = [[line for line in log if line.startswith("start")] for log in logs]
    assert starts == [[f"start {arm}" for arm in order] for order in ORDERS[:2]]
    takes = [line for line in logs[0] if line in ARMS][len(ARMS) * WARMUP_TURNS :]
    assert takes[::2] == takes[1::2] == [arm for order in ORDERS for arm in order]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Measures with fake workers whose head is as slow as each round's number in a list says."""

    def measure(steps: list[float], **settings: object) -> Result:
        log: list[str] = []

        def start(arm: str, dtype: str | None = None) -> FakeWorker:
            number = sum(line == f"start {arm}" for line in log)
            return FakeWorker(arm, steps[min(number, len(steps) - 1)], log)

        asked = replace(Settings(tmp_path, "main", ".", tmp_path, METRICS, turns=2), **settings)
        side = Side(BASE_REVISION, tmp_path, tmp_path)
        it = Gate(asked, {BASE: side, HEAD: side._replace(revision=HEAD_REVISION)}, lambda message: None)
        monkeypatch.setattr(it, "start", start)
        return it.measure(Result(asked, BASE_REVISION, HEAD_REVISION))

    return measure


def test_a_pass_takes_the_rounds_that_were_asked_for_and_a_failure_enough_of_them(
    measured: Callable[..., Result],
) -> None:
    passed, failed = measured([1.0]), measured([1.1])
    assert (len(passed.rounds), passed.failed) == (3, False)
    assert (len(failed.rounds), failed.failed) == (ROUNDS_TO_FAIL, True)
