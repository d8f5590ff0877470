"""Runs contenders interleaved, in the order A B B A …, so that what disturbs one disturbs all."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .workload import Contender, reason

WARMUP_RUNS = 2  # the first compiles, the second sees what the first allocated

Say = Callable[[str], None]


@dataclass
class Results:
    """What :func:`interleave` saw, by the names of the contenders."""

    runs: dict[str, list[Any]] = field(default_factory=dict)  # what each timed run returned, in order
    first_seconds: dict[str, float] = field(default_factory=dict)  # of the first run as a whole, compilation included
    broken: dict[str, str] = field(default_factory=dict)  # those that failed on the way, and how


def interleave(
    contenders: Sequence[Contender],
    workload: Any,
    rounds: int,
    *,
    warmups: int = WARMUP_RUNS,
    say: Say = lambda message: None,
    between: Callable[[], object] = lambda: None,
) -> Results:
    """Run every contender ``rounds`` times on a workload, after ``warmups`` unmeasured runs of each."""
    results = Results()
    for number in range(-warmups, rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            if contender.name in results.broken:
                continue
            say(f"round {number + 1} of {rounds}: {contender.name}" if number >= 0 else f"warming up: {contender.name}")
            start = time.perf_counter()
            try:
                run = contender.run(workload)
            except Exception as error:
                if contender is contenders[0]:
                    raise
                results.broken[contender.name] = reason(error)
                results.runs.pop(contender.name, None)
                continue
            results.first_seconds.setdefault(contender.name, time.perf_counter() - start)
            if number >= 0:
                results.runs.setdefault(contender.name, []).append(run)
        between()
    return results
