"""What speculative decoding knows of an engine, from call to call: what steps and drafts cost, and how drafts do."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllama.engine.runner import Runner
from fastllama.engine.steps import VERIFY_TOKENS
from fastllama.generation.lookup import Draft, Texts

HIT_WEIGHT = 0.1  # of the newest observation
LEAST_RATE = 0.1  # that a call begins with
LEAST_SEEN, LAST_SEEN = 3, 9  # times of a step that its cost is taken from
LONGEST_KNOWN = 256  # the same, for which a cost is believed that is not seen again


class Odds:
    """How often drafted tokens come true, by their class.

    Attributes:
        rates: of each class, and of all of them together.
    """

    def __init__(self, classes: int) -> None:
        self.rates = [0.5] * (classes + 1)

    @property
    def rate(self) -> float:
        """The one of all classes together."""
        return self.rates[-1]

    def begin_as(self, others: Sequence[Odds]) -> None:
        """Begin with what others have come to, but not so low that a few hits would not wake it up."""
        found = zip(*(other.rates for other in others), strict=True)
        self.rates = [max(LEAST_RATE, statistics.fmean(rates)) for rates in found]

    def of(self, draft: Draft) -> list[float]:
        """How likely it is for each token that it comes true, and all those before it."""
        return list(itertools.accumulate((self.rates[each] for each in draft.classes), lambda all_, one: all_ * one))

    def note(self, draft: Draft, came: Sequence[int]) -> None:
        """Compare what was drafted with what came, up to the first token that differs."""
        for wanted, where, token in zip(draft.tokens, draft.classes, came, strict=False):
            hit = wanted == token
            for each in (where, -1):
                self.rates[each] += HIT_WEIGHT * (hit - self.rates[each])
            if not hit:
                return


class Costs:
    """What steps of t tokens a row take, or drafts of t tokens, in seconds: the median of the last ones."""

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # when, in steps of any size
        self._count = 0

    def of(self, tokens: int) -> float | None:
        """Seconds of such a step; None where hardly any was seen, or none for long: it may cost less by now."""
        if self._count - self._seen.get(tokens, 0) > LONGEST_KNOWN:
            self._last.pop(tokens, None)
            self._seconds.pop(tokens, None)
        return self._seconds.get(tokens)

    def note(self, tokens: int, seconds: float) -> None:
        """It took that long."""
        self._count += 1
        self._seen[tokens] = self._count
        last = self._last.setdefault(tokens, deque(maxlen=LAST_SEEN))
        last.append(seconds)
        if len(last) >= LEAST_SEEN:
            self._seconds[tokens] = statistics.median_low(last)


@dataclass
class DraftCounts:
    """What has come of the drafts of a model, since it was loaded.

    Attributes:
        steps: steps of a row, with drafts or without, of calls that ask for drafts.
        tokens: new tokens that they gave.
        drafted: tokens that steps verified, by their place in the draft.
        accepted: those of them that came true.
    """

    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=lambda: [0] * (VERIFY_TOKENS[-1] - 1))
    accepted: list[int] = field(default_factory=lambda: [0] * (VERIFY_TOKENS[-1] - 1))

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a row's step, 1 without drafts."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> list[float | None]:
        """The share of drafted tokens that came true, by their place; None where there were none."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return [accepted / drafted if drafted else None for accepted, drafted in pairs]

    def since(self, before: DraftCounts) -> DraftCounts:
        """What has come since then."""
        places = [
            [now - then for now, then in zip(here, there, strict=True)]
            for here, there in ((self.drafted, before.drafted), (self.accepted, before.accepted))
        ]
        return DraftCounts(self.steps - before.steps, self.tokens - before.tokens, *places)

    def note(self, draft: Sequence[int], came: Sequence[int]) -> None:
        """A step verified a draft, perhaps an empty one, and gave these tokens."""
        self.steps += 1
        self.tokens += len(came)
        for place, (wanted, token) in enumerate(itertools.zip_longest(draft, came[: len(draft)])):
            self.drafted[place] += 1
            self.accepted[place] += wanted == token


@dataclass
class Sleep:
    """When a source is asked again that does not pay: after ``left`` steps, the next time after ``length``."""

    length: int = 1
    left: int = 0


@dataclass
class KnownSource:
    """What is known of drafts of one source: what they cost, when they are asked for, how the last call's rows did."""

    costs: Costs = field(default_factory=Costs)
    sleep: Sleep = field(default_factory=Sleep)
    odds: list[Odds] = field(default_factory=list)


@dataclass
class Known:
    """What speculative decoding knows of an engine, from call to call.

    Attributes:
        steps: their costs, by the bucket of the batch.
        drafts: by the bucket and the key of their source.
        counts: what has come of drafts.
        texts: earlier ones.
    """

    steps: dict[int, Costs] = field(default_factory=dict)
    drafts: dict[Any, KnownSource] = field(default_factory=dict)
    counts: DraftCounts = field(default_factory=DraftCounts)
    texts: Texts = field(default_factory=Texts)


def known_of(runner: Runner) -> Known:
    """What is known of an engine."""
    if runner.speculation is None:
        runner.speculation = Known()
    known: Known = runner.speculation
    return known
