"""Runs contenders by turns on the same workload, so that what disturbs one disturbs all.

Every contender is warmed up fully, then they take turns in the order A B B A …; the memory's bandwidth is measured
between the rounds. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

WARMUP_RUNS = 2  # the first compiles, the second sees what the first allocated
CUDA_CHUNK = 16  # decode steps between two events


@dataclass(frozen=True)
class Workload:
    """What every contender decodes: greedily, past any EOS token.

    Attributes:
        prompts: token ids of each row, all of one length.
        new_tokens: decode so many tokens in each row.
        capacity: slots of the KV cache; None: what the workload needs, or the contender's own choice.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    capacity: int | None = None

    @classmethod
    def random(
        cls, vocab_size: int, batch: int, prompt_len: int, new_tokens: int, capacity: int | None = None
    ) -> Workload:
        """Random prompts, the same ones for the same arguments."""
        generator = torch.Generator().manual_seed(0)
        ids_bt = torch.randint(vocab_size, (batch, prompt_len), generator=generator)
        return cls(tuple(map(tuple, ids_bt.tolist())), new_tokens, capacity)

    @property
    def batch(self) -> int:
        """Rows decoded together."""
        return len(self.prompts)

    @property
    def prompt_len(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])

    @property
    def live_tokens(self) -> int:
        """Tokens in a row's cache half way through the decode."""
        return self.prompt_len + self.new_tokens // 2

    def input_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The prompts, int64 ``[b, t]``."""
        return torch.tensor(self.prompts, device=device)


@dataclass(frozen=True)
class Run:
    """One timed decode of a workload.

    Attributes:
        tokens: new token ids of each row; None where the contender does not tell them.
        ttft: seconds to the first token.
        tpot: seconds per decode step after it, one value a step or a group of steps.
    """

    tokens: tuple[tuple[int, ...], ...] | None
    ttft: float
    tpot: tuple[float, ...]

    @property
    def seconds_per_step(self) -> float:
        """Mean over the decode; NaN where there was no second token."""
        return sum(self.tpot) / len(self.tpot) if self.tpot else float("nan")


class Contender(Protocol):
    """Something that decodes a workload: the engine, its eager forward, a peer, another revision."""

    name: str

    def run(self, workload: Workload) -> Run:
        """Decode the workload once and time it."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class Unavailable(RuntimeError):
    """A contender cannot run here; the message is one line that says why."""


class Marks:
    """Points in time along a decode: the host's clock, on CUDA events, which are recorded without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __len__(self) -> int:
        return len(self._marks)

    def mark(self) -> None:
        """Note the present point of the host's work, or of the current stream's."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Seconds from each mark to the next; on CUDA waits for the last."""
        if not self._is_cuda:
            return [after - before for before, after in pairwise(self._marks)]
        if self._marks:
            self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]


@dataclass
class Results:
    """What :func:`interleave` saw.

    Attributes:
        runs: timed runs of each contender, in order.
        first_seconds: how long the first run of each took as a whole, compilation included.
        broken: contenders that failed on the way, and how.
    """

    runs: dict[str, list[Run]] = field(default_factory=dict)
    first_seconds: dict[str, float] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def interleave(
    contenders: Sequence[Contender],
    workload: Workload,
    rounds: int,
    *,
    warmups: int = WARMUP_RUNS,
    say: Callable[[str], None] = lambda message: None,
    between: Callable[[], object] = lambda: None,
) -> Results:
    """Run every contender ``rounds`` times in the order A B B A …, after ``warmups`` unmeasured runs of each.

    Args:
        contenders: what to time. The first one must not fail; another that does is left out from then on.
        workload: what each decodes.
        rounds: timed runs of each.
        warmups: unmeasured runs of each, at least one.
        say: told what is about to run.
        between: called after every round.
    """
    results = Results()
    for number in range(-warmups, rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        for contender in order:
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


def reason(error: BaseException) -> str:
    """One line on what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Unavailable) else f"{type(error).__name__}: {lines[0]}"
