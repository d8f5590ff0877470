"""One round: two fresh processes of the base and two of the head, interleaved on the same decodes.

Fresh, because how fast a process decodes depends on where its memory happened to fall. Two, because that shows what
equal code differs by here and now. The orders in which they start and decode rotate, so that none is always the first.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..workload import Contender, Decode, Rows, Workload
from .verdict import ARMS

BASE, HEAD, HEAD_AGAIN, BASE_AGAIN = ARMS
SIDES = {BASE: BASE, BASE_AGAIN: BASE, HEAD: HEAD, HEAD_AGAIN: HEAD}

#: Each arm is once in each place and follows each other one once (E. J. Williams, Australian J. Sci. Res. A 2, 1949).
ORDERS = (
    (BASE, HEAD, BASE_AGAIN, HEAD_AGAIN),
    (HEAD, HEAD_AGAIN, BASE, BASE_AGAIN),
    (HEAD_AGAIN, BASE_AGAIN, HEAD, BASE),
    (BASE_AGAIN, BASE, HEAD_AGAIN, HEAD),
)

GROUP = 8  # decode steps that are timed as one
FIRST_TOKENS = 3  # more runs of a turn, up to the first token only, where that is judged
WARMUP_TURNS = 2  # the first may compile, the second sees what the first allocated
LEAD_IN = (16, 8)  # tokens of the prompts and new ones of the decode before each timed one

Times = dict[str, dict[str, list[list[float]]]]  # metric → arm → turn → seconds


@dataclass(frozen=True)
class Metric:
    """What is compared: ``tpot`` (seconds per decode step) or ``ttft`` (to the first token), at a batch size."""

    kind: str
    batch: int

    @classmethod
    def parse(cls, name: str) -> Metric:
        """The metric of a name like ``tpot-b1``; ValueError for any other."""
        found = re.fullmatch(r"(tpot|ttft)-b([1-9]\d*)", name)
        if not found:
            raise ValueError(f"{name!r} is no metric: write tpot-bN or ttft-bN for a batch of N, such as tpot-b1")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return f"{self.kind}-b{self.batch}"

    @property
    def title(self) -> str:
        """For a reader."""
        return f"{'decode step' if self.kind == 'tpot' else 'first token'}, batch {self.batch}"

    def of(self, run: Decode) -> list[float]:
        """Its values in one run, in seconds."""
        return [run.ttft] if self.kind == "ttft" else step_seconds(run.tpot)


def step_seconds(tpot: Sequence[float]) -> list[float]:
    """Seconds per step of each group of ``GROUP`` steps of a decode; those that are left over are dropped.

    In groups, so that what happens only every few steps, such as a look at the tokens, is in each of them.
    """
    size = min(GROUP, len(tpot))
    starts = range(0, len(tpot) - size + 1, size)
    return [statistics.fmean(tpot[start : start + size]) for start in starts]


def lead_in(workload: Workload) -> Workload:
    """The beginning of a workload: it brings the weights back into the caches that another arm has just used, and
    outlasts the spinning of that arm's idle threads."""
    prompt_len, new_tokens = LEAD_IN
    prompts = tuple(prompt[:prompt_len] for prompt in workload.prompts)
    return Workload(prompts, min(new_tokens, workload.new_tokens))


@dataclass
class Round:
    """What one round has measured."""

    times: Times = field(default_factory=dict)
    tokens: dict[str, dict[int, Rows]] = field(default_factory=dict)  # of every arm's first run of each batch size
    info: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # what the worker of each arm said of itself


def run_round(
    number: int,
    start: Callable[[str], Contender],
    metrics: Sequence[Metric],
    workload: Callable[[int, int], Workload],
    turns: int,
) -> Round:
    """Start the four arms, let them decode interleaved, and end them."""
    done = Round(times={str(metric): {arm: [] for arm in ARMS} for metric in metrics})
    workers: dict[str, Contender] = {}
    try:
        for arm in ORDERS[number % len(ORDERS)]:
            workers[arm] = start(arm)
        done.info = {arm: workers[arm].info for arm in ARMS}
        vocab_size = min(info["vocab_size"] for info in done.info.values())
        workloads = {batch: workload(vocab_size, batch) for batch in sorted({metric.batch for metric in metrics})}
        for worker in (workers[arm] for _ in range(WARMUP_TURNS) for arm in ARMS):
            for each in workloads.values():
                worker.run(each)
        for turn in range(turns):
            for arm in ORDERS[(number + turn) % len(ORDERS)]:
                _take_turn(done, arm, workers[arm], metrics, workloads)
    finally:
        for worker in workers.values():
            worker.close()
    return done


def _take_turn(
    done: Round, arm: str, worker: Contender, metrics: Sequence[Metric], workloads: Mapping[int, Workload]
) -> None:
    for batch, workload in workloads.items():
        worker.run(lead_in(workload))
        run = worker.run(workload)
        done.tokens.setdefault(arm, {}).setdefault(batch, run.tokens or ())
        for metric in metrics:
            if metric.batch == batch:
                more = FIRST_TOKENS if metric.kind == "ttft" else 0
                runs = [run, *(worker.run(replace(workload, new_tokens=1)) for _ in range(more))]
                done.times[str(metric)][arm].append([round(value, 9) for each in runs for value in metric.of(each)])
