"""Contenders interleaved, the two clocks, and workers in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastllama_benchmarks.contenders import Task
from fastllama_benchmarks.contenders.fastllama import Eager
from fastllama_benchmarks.contenders.remote import Remote
from fastllama_benchmarks.rounds import interleave
from fastllama_benchmarks.workload import Contender, Decode, Unavailable, Workload, timed, timed_by_difference

WORKLOAD = Workload(((1, 2),), 3)


class Scripted(Contender):
    """Notes its runs; fails in the one that it should."""

    def __init__(self, name: str, turns: list[str], fails_at: int | None = None) -> None:
        self.name, self._turns, self._fails_at, self._count = name, turns, fails_at, 0

    def run(self, workload: Workload) -> Decode:
        assert workload is WORKLOAD
        self._turns.append(self.name)
        self._count += 1
        if self._count == self._fails_at:
            raise RuntimeError("out of luck\nmore lines")
        return Decode(((7, 8, 9),), 0.5, (0.1, float(self._count)))


def test_contenders_are_interleaved_after_their_warm_up() -> None:
    turns: list[str] = []
    pauses: list[int] = []
    results = interleave(
        [Scripted("a", turns), Scripted("b", turns)], WORKLOAD, 3, warmups=2, between=lambda: pauses.append(len(turns))
    )
    assert "".join(turns) == "abba" + "abbaab"
    assert pauses == [2, 4, 6, 8, 10]
    assert [run.tpot[1] for run in results.runs["b"]] == [3.0, 4.0, 5.0]
    assert set(results.first_seconds) == {"a", "b"}
    assert results.broken == {}


def test_a_peer_that_breaks_is_one_line_and_leaves_no_figures() -> None:
    turns: list[str] = []
    results = interleave([Scripted("a", turns), Scripted("b", turns, fails_at=4)], WORKLOAD, 3, warmups=1)
    assert results.broken == {"b": "RuntimeError: out of luck"}
    assert set(results.runs) == {"a"}
    assert len(results.runs["a"]) == 3
    assert turns.count("b") == 4


class Clock:
    """A clock that moves a hundredth of a second with each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_a_slowdown_makes_every_step_longer_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> Iterator[torch.Tensor]:
        for token in range(3):
            clock.now += 1.0
            yield torch.tensor([token])

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    plain, slowed = timed(steps()), timed(steps(), slowdown=0.5)
    assert plain.tokens == slowed.tokens == ((0, 1, 2),)
    assert all(slow >= 1.4 * fast for slow, fast in zip(slowed.tpot, plain.tpot, strict=True))


def test_a_step_on_cuda_is_the_difference_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(new_tokens: int) -> torch.Tensor:
        clock.now += 4.0 + new_tokens
        return torch.arange(new_tokens)[None]

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timed_by_difference(call, 3) == Decode(((0, 1, 2),), 5.0, (1.0,))
    assert timed_by_difference(call, 1).tpot == ()


# ---- workers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(checkpoint: str) -> Task:
    """A tiny checkpoint."""
    return Task(checkpoint, "float32", threads=1)


def test_a_worker_decodes_what_the_contender_decodes_in_this_process(task: Task) -> None:
    workload = Workload.random(64, 2, 5, 4)
    remote, here = Remote("eager", warm_up=[workload]), Eager()
    here.load(task)
    with closing(remote):
        remote.load(task)
        assert remote.info["phases"].keys() == {"interpreter", "import", "load"}
        assert (remote.info["threads"], remote.info["device_type"]) == (1, "cpu")
        assert remote.run(workload).tokens == here.run(workload).tokens
        with pytest.raises(Unavailable, match=r"^\w*Error: "):  # and it goes on
            remote.run(Workload(((99,),), 2))
        assert remote.run(workload).tokens == here.run(workload).tokens


def test_a_worker_that_cannot_start_says_why(task: Task) -> None:
    remote = Remote("eager")
    remote.load(replace(task, model="/nowhere"))
    with closing(remote), pytest.raises(Unavailable, match=r"^eager forward ended with code 1: .*nowhere"):
        _ = remote.info
    with pytest.raises(Unavailable, match="cannot start /no/python"):
        Remote("eager", python="/no/python").load(task)


def test_a_worker_refuses_a_fastllama_of_another_place(task: Task, tmp_path: Path) -> None:
    remote = Remote("fastllama", tree=tmp_path)
    remote.load(task)
    with closing(remote), pytest.raises(Unavailable, match="it has no package fastllama"):
        _ = remote.info
