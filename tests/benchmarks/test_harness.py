"""Contenders by turns, marks in time, workers in processes of their own."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastllama_benchmarks.harness import Marks, Run, Unavailable, Workload, interleave, reason
from fastllama_benchmarks.remote import Remote, worker_environment

WORKLOAD = Workload(((1, 2),), 3)
ROOT = Path(__file__).resolve().parents[2]


class Scripted:
    """Takes note of its turns; fails in those it is told."""

    def __init__(self, name: str, turns: list[str], fails_at: int | None = None) -> None:
        self.name, self._turns, self._fails_at, self._count = name, turns, fails_at, 0

    def run(self, workload: Workload) -> Run:
        assert workload is WORKLOAD
        self._turns.append(self.name)
        self._count += 1
        if self._count == self._fails_at:
            raise RuntimeError("out of luck\nmore lines")
        return Run(((7, 8, 9),), 0.5, (0.1, float(self._count)))

    def close(self) -> None:
        pass


def test_contenders_take_turns_back_and_forth_after_their_warm_up() -> None:
    turns: list[str] = []
    pauses: list[int] = []
    results = interleave(
        [Scripted("a", turns), Scripted("b", turns)],
        WORKLOAD,
        3,
        warmups=2,
        between=lambda: pauses.append(len(turns)),
    )
    assert "".join(turns) == "abba" + "abbaab"
    assert pauses == [2, 4, 6, 8, 10]
    assert [run.tpot[1] for run in results.runs["b"]] == [3.0, 4.0, 5.0]
    assert set(results.first_seconds) == {"a", "b"}
    assert results.broken == {}


def test_a_peer_that_breaks_is_told_in_one_line_and_leaves_no_figures() -> None:
    turns: list[str] = []
    results = interleave([Scripted("a", turns), Scripted("b", turns, fails_at=4)], WORKLOAD, 3, warmups=1)
    assert results.broken == {"b": "RuntimeError: out of luck"}
    assert set(results.runs) == {"a"}
    assert len(results.runs["a"]) == 3
    assert turns.count("b") == 4


def test_the_first_contender_may_not_break() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        interleave([Scripted("a", [], fails_at=1), Scripted("b", [])], WORKLOAD, 3)


def test_random_prompts_are_the_same_for_the_same_arguments() -> None:
    workload = Workload.random(100, batch=3, prompt_len=5, new_tokens=7)
    assert workload == Workload.random(100, 3, 5, 7)
    assert (workload.batch, workload.prompt_len, workload.live_tokens) == (3, 5, 8)
    assert workload.input_ids().shape == (3, 5)
    assert max(map(max, workload.prompts)) < 100


def test_marks_measure_the_time_between_them() -> None:
    marks = Marks(torch.device("cpu"))
    assert marks.gaps() == []
    for _ in range(3):
        marks.mark()
    assert len(marks.gaps()) == 2
    assert min(marks.gaps()) >= 0


@pytest.mark.gpu
def test_marks_on_cuda_time_the_device_and_not_the_host() -> None:
    marks, square = Marks(torch.device("cuda")), torch.rand(8192, 8192, device="cuda")
    for _ in range(3):
        marks.mark()
        square @ square
    marks.mark()
    assert len(marks.gaps()) == 3
    assert min(marks.gaps()[1:]) > 1e-4  # far longer than a launch takes


def test_the_reason_of_an_error_is_its_first_line() -> None:
    assert reason(Unavailable("not here\nreally")) == "not here"
    assert reason(ValueError("bad\nworse")) == "ValueError: bad"
    assert reason(KeyError()) == "KeyError: "


# ---- workers -----------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path):
    """Starts a worker whose decode is the given body of ``run(workload)``."""
    started: list[Remote] = []

    def start(body: str, opening: str = "") -> Remote:
        script = tmp_path / "worker.py"
        script.write_text(
            f"from benchmarks.harness import Run\nfrom benchmarks.remote import serve\n"
            f"def run(workload):\n{textwrap.indent(body, '    ')}\n"
            f"def open_run():\n    print('libraries chatter')\n{textwrap.indent(opening, '    ')}\n"
            f"    return {{'version': 3}}, run\nserve(open_run)\n"
        )
        started.append(Remote("worker", [sys.executable, str(script)], env=worker_environment(ROOT)))
        return started[-1]

    yield start
    for remote in started:
        remote.close()


def test_a_worker_decodes_what_it_is_given(worker) -> None:
    remote = worker("print('noise')\nreturn Run(workload.prompts * 2, workload.new_tokens / 2, (0.25,))")
    assert remote.info == {"version": 3}
    assert remote.run(WORKLOAD) == Run(((1, 2), (1, 2)), 1.5, (0.25,))
    assert remote.run(Workload(((5,),), 4, capacity=9)) == Run(((5,), (5,)), 2.0, (0.25,))


def test_an_error_in_a_worker_is_one_line_and_the_worker_goes_on(worker) -> None:
    remote = worker("if workload.new_tokens == 3: raise ValueError('no threes')\nreturn Run(None, 0.0, ())")
    with pytest.raises(Unavailable, match=r"^ValueError: no threes$"):
        remote.run(WORKLOAD)
    assert remote.run(Workload(((1,),), 2)) == Run(None, 0.0, ())


def test_a_worker_that_cannot_start_says_why(worker) -> None:
    with pytest.raises(Unavailable, match="ended with code 1: ImportError: no such thing"):
        _ = worker("pass", opening="raise ImportError('no such thing')").info
    with pytest.raises(Unavailable, match="cannot start no-such-program"):
        Remote("worker", ["no-such-program"])


def test_a_worker_that_dies_is_no_crash_of_the_run(worker) -> None:
    remote = worker("import os\nos._exit(7)")
    with pytest.raises(Unavailable, match="ended with code 7"):
        remote.run(WORKLOAD)
    with pytest.raises(Unavailable, match="ended with code 7"):
        remote.run(WORKLOAD)


def test_runs_survive_the_way_through_json() -> None:
    assert json.loads(json.dumps([0.1 + 0.2])) == [0.1 + 0.2]
