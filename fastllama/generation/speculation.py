"""Speculative decoding: tokens that may come next are drafted, and steps take several at once where that pays.

What comes out is what would come out without. A step samples the row's own token after each drafted one and goes on
while they are equal (:func:`fastllama.engine.steps.draft`), so a draft decides how many tokens a step gives, and
nothing else.

Whether and how far to draft follows from what is measured while decoding: what a step of t tokens costs, what drafting
costs, and how often drafted tokens of a class come true, such as those after a match of that length. Where drafts are
free the latter is known for rows that do not draft as well, for what would have been drafted can be compared with what
came; a second model sleeps where it does not pay, ever longer, and is tried again.

Shape suffixes: ``b`` rows, ``t`` drafted tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from fastllama.engine.row import MAX_EOS_IDS
from fastllama.engine.runner import Runner
from fastllama.engine.steps import batch_bucket
from fastllama.generation.known import Costs, Known, KnownSource, Odds
from fastllama.generation.lookup import NOTHING, Draft
from fastllama.generation.request import Request
from fastllama.generation.stopping import Stopping

MARGIN = 1.05  # tokens a second that a step with drafts has to promise, over one without
DRAFT_SHARE = 0.1  # of a step, what a token of a second model is guessed to cost before one was drafted
MOST_ROOM = 1 << 62
LONGEST_SLEEP = 256  # steps


class Source(Protocol):
    """Where drafts come from: a lookup, a second model; heads of the model's own would be another one."""

    @property
    def classes(self) -> int:
        """Number of classes of drafted tokens, those of one coming true equally often."""
        ...

    @property
    def is_free(self) -> bool:
        """Whether drafting costs nothing next to a step."""
        ...

    @property
    def key(self) -> Any:
        """By which what it costs is known in later calls."""
        ...

    def draft(self, going: Sequence[int], count: int) -> Mapping[int, Draft]:
        """Drafts of at most ``count`` tokens for rows, by number."""
        ...

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Let a row go on."""
        ...

    def close(self) -> None:
        """The call has ended, perhaps by an error."""
        ...


class Drafter:
    """Drafts for the rows of a call, where they pay.

    Args:
        source: of the drafts.
        rows: number of them.
        sizes: tokens a row that a step may take at once, besides 1.
        known: of the engine.
        most: tokens of a draft at most.
        adapts: whether that grows by two after a draft that came true, and shrinks by one after others.
    """

    def __init__(
        self, source: Source, rows: int, sizes: Sequence[int], known: Known, most: int, adapts: bool = False
    ) -> None:
        self._source, self._rows, self._sizes = source, rows, [*sizes]
        self._most, self._adapts = min(most, sizes[-1] - 1), adapts
        bucket = batch_bucket(rows)
        self._steps = known.steps.setdefault(bucket, Costs())
        drafts = known.drafts.setdefault((bucket, source.key), KnownSource())
        self._drafts, self._sleep = drafts.costs, drafts.sleep
        before, drafts.odds = drafts.odds, [Odds(source.classes) for _ in range(rows)]
        self._odds = drafts.odds
        for odds in self._odds if before else ():
            odds.begin_as(before)
        self._counts = known.counts
        self._found: Mapping[int, Draft] = {}
        self._could_pay = True  # if all that is drafted came true

    def draft(self, going: Sequence[int], room: int = MOST_ROOM) -> list[list[int]]:
        """For each row of the next step as many drafted tokens, or fewer; empty lists where a plain step is better.

        Args:
            going: numbers of the rows that have not ended.
            room: tokens that the longest of them may still get.
        """
        sizes = [size for size in self._sizes if size < 2 * (self._most + 1) and size <= room]
        count, self._found = self._planned(going, sizes), {}
        if count:
            started = time.perf_counter()
            self._found = self._source.draft(going, count)
            self._drafts.note(count, time.perf_counter() - started)
        if not self._found or self._steps.of(1) is None:  # nothing to compare with
            return [[]] * self._rows
        likely = {row: self._odds[row].of(draft) for row, draft in self._found.items()}

        def expected(size: int) -> float:
            return len(going) + sum(sum(each[: size - 1]) for each in likely.values())

        size = self._best(sizes, {size: expected(size) / self._cost(size) for size in sizes}, len(going))
        return [self._found.get(row, NOTHING).tokens[: size - 1] for row in range(self._rows)]

    def note(self, tokens: int, seconds: float, drafts: Sequence[Sequence[int]], came: Sequence[Sequence[int]]) -> None:
        """A step of that many tokens a row took so long, verified these drafts and gave this; 0 for a prefill."""
        if tokens:
            self._steps.note(tokens, seconds)
        missed = False
        for row, new in enumerate(came):
            draft = self._found.get(row)
            if draft and new:
                self._odds[row].note(draft, new)
            if new and tokens:
                self._counts.note(drafts[row], new)
                missed |= len(new) <= len(drafts[row])
            self._source.extend(row, new)
        if self._found and self._could_pay and all(d.tokens[0] in came[row][:1] for row, d in self._found.items()):
            self._sleep.length = 1
        if any(drafts) and self._adapts:
            self._most = max(1, self._most - 1) if missed else min(self._most + 2, self._sizes[-1] - 1)

    def size(self, drafts: Sequence[Sequence[int]]) -> int:
        """Tokens a row of the step that takes these drafts."""
        longest = 1 + max(map(len, drafts))
        return longest if longest == 1 else min(size for size in self._sizes if size >= longest)

    def close(self) -> None:
        """The call has ended."""
        self._source.close()

    def _planned(self, going: Sequence[int], sizes: Sequence[int]) -> int:
        """How many tokens to draft: all there may be where it is free, else what pays, if it is not asleep."""
        if not sizes or not going or self._source.is_free:
            return min(self._most, sizes[-1] - 1) if sizes and going else 0
        if self._sleep.left or self._steps.of(1) is None:
            self._sleep.left = max(0, self._sleep.left - 1)
            return 0
        promises = self._promises(sizes, [self._odds[row].rate for row in going])
        self._could_pay = self._best(sizes, self._promises(sizes, [1.0] * len(going)), len(going)) > 1
        if (size := self._best(sizes, promises, len(going))) > 1:
            return min(self._most, size - 1)
        self._sleep.left, self._sleep.length = self._sleep.length, min(2 * self._sleep.length, LONGEST_SLEEP)
        return min(self._most, max(promises, key=promises.__getitem__) - 1)

    def _promises(self, sizes: Sequence[int], rates: Sequence[float]) -> dict[int, float]:
        """Tokens a second of each size, drafting included, where tokens of the rows come true so often."""
        found = {}
        for size in sizes:
            drafting = self._drafts.of(size - 1) or DRAFT_SHARE * (size - 1) * self._cost(1)
            expected = sum(rate**at for rate in rates for at in range(size))
            found[size] = expected / (self._cost(size) + drafting)
        return found

    def _best(self, sizes: Sequence[int], promises: Mapping[int, float], rows: int) -> int:
        """The size that promises the most tokens a second; 1 where none does better than a plain step."""
        best, promise = 1, MARGIN * rows / self._cost(1)
        for size in sizes:
            if promises[size] > promise:
                best, promise = size, promises[size]
        return best

    def _cost(self, tokens: int) -> float:
        """Seconds of a step, of more tokens never less; of one that has hardly been seen a guess."""
        one = self._steps.of(1) or 1.0
        return max(one, self._steps.of(tokens) or one * (1 + 0.03 * (tokens - 1)))


def drafted(
    runner: Runner, requests: Sequence[Request], drafter: Drafter, least: int | None, stopping: Stopping
) -> Iterator[torch.Tensor]:
    """Prefill, then step after step, and yield what all rows have given since the last time, ``[b, n]``.

    A row that has given more than another one waits with it.
    """
    count, longest = len(requests), max(len(request.prompt) for request in requests)
    most = max(len(request.prompt) + request.max_new_tokens for request in requests)
    eos = [frozenset(request.eos_token_ids[:MAX_EOS_IDS]) for request in requests]
    waiting: list[list[int]] = [[] for _ in requests]
    given, going = [0] * count, list(range(count))
    drafts: list[list[int]] = [[]] * count
    newest = runner.newest().read()[:count] if runner.prefill(dict(enumerate(requests)), least) else None
    came, tokens, started = [] if newest is None else newest.tolist(), 0, 0.0
    while True:
        if came:
            new = [came[row] if row in going else [] for row in range(count)]
            drafter.note(tokens, time.perf_counter() - started, drafts, new)
            for row in going:
                given[row] += len(came[row])
            going = [row for row in going if given[row] < requests[row].max_new_tokens and not eos[row] & {*came[row]}]
            if newest is not None and not any(waiting):
                yield newest
            else:
                waiting = [before + after for before, after in zip(waiting, new, strict=True)]
                ready = min((len(waiting[row]) for row in going), default=0)
                if ready:
                    yield _columns(waiting, ready)
                waiting = [row[ready:] for row in waiting]
            if stopped := [row for row in going if stopping.ended[row]]:
                runner.end(stopped)
                going = [row for row in going if row not in stopped]
            if not going:
                if any(waiting):
                    yield _columns(waiting, max(map(len, waiting)))
                return
        held = max(len(requests[row].prompt) + given[row] for row in going)
        drafts = drafter.draft(going, most - held)
        tokens = drafter.size(drafts)
        runner.reserve(count, min(most, longest + max(given) + tokens))
        started = time.perf_counter()
        if tokens == 1:
            runner.step()
            newest = runner.newest().read()[:count]
            came = newest.tolist()
        else:
            whole = [(draft + [0] * tokens)[: tokens - 1] for draft in drafts]
            newest, came = None, runner.step_with(torch.tensor(whole, dtype=torch.long, device="cpu"))


def _columns(rows: Sequence[Sequence[int]], count: int) -> torch.Tensor:
    """The first tokens of rows ``[b, count]``, zeros where there are none: whoever reads them knows the ends."""
    return torch.tensor([([*row[:count]] + [0] * count)[:count] for row in rows], dtype=torch.long, device="cpu")
