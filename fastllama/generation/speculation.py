"""Speculative decoding: tokens that may come next are looked up, and steps take several at once where that pays.

What comes out is what would come out without. A step samples the row's own token after each drafted one and goes on
while they are equal (:func:`fastllama.engine.steps.draft`), so a draft decides how many tokens a step gives, and
nothing else. Where a text has come before, its continuation is the draft: the latest one after the longest end of the
row that occurs in prompt and new tokens (prompt lookup, arXiv 2304.04487, with the match of suffix decoding,
arXiv 2411.04975).

Whether and how far to draft follows from two things that are measured while decoding: what a step of t tokens costs,
and how often a drafted token comes true after a match of that length. The latter is known for rows that do not draft
as well, for what would have been drafted can be compared with what came.

Shape suffixes: ``b`` rows, ``t`` drafted tokens.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastllama.config import GenerationConfig
from fastllama.config.fields import check_int
from fastllama.engine.row import MAX_EOS_IDS
from fastllama.engine.runner import Runner
from fastllama.engine.steps import batch_bucket
from fastllama.generation.request import Request

CHOICES = ("off", "auto")
KEY = 2  # tokens by which a text's places are indexed
PLACES = 16  # of an end that are compared, the latest ones
LONGEST = 32  # tokens of a match, beyond which its length does not matter
CLASSES = (3, 5, 9)  # bounds between match lengths of one hit rate
MARGIN = 1.05  # tokens a second that a step with drafts has to promise, over one without
HIT_WEIGHT = 0.1  # of the newest observation
LEAST_SEEN, LAST_SEEN = 3, 9  # steps that their cost is taken from


def drafts_of(config: GenerationConfig, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many tokens a row may draft, and the longest match that is looked for; None: no drafts.

    Raises:
        ValueError: a setting out of range.
    """
    choice, drafts, longest = (
        settings.get(name, getattr(config, name))
        for name in ("speculate", "prompt_lookup_num_tokens", "max_matching_ngram_size")
    )
    if choice not in (None, *CHOICES):
        raise ValueError(f"speculate is {choice!r}; expected {' or '.join(map(repr, CHOICES))}")
    for name, value in (("prompt_lookup_num_tokens", drafts), ("max_matching_ngram_size", longest)):
        if value is not None:
            check_int(name, value, at_least=1)
    if choice != "auto" and drafts is None:
        return None
    return drafts or LONGEST, min(longest or LONGEST, LONGEST)


class Lookup:
    """Finds what followed the end of a text where that came before.

    Args:
        longest: tokens of the text's end that are compared.
    """

    def __init__(self, longest: int = LONGEST) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # where the text goes on after these tokens
        self._longest, self._key = longest, min(KEY, longest)

    def extend(self, tokens: Sequence[int]) -> None:
        """Let the text go on."""
        for token in tokens:
            if len(self._tokens) >= self._key:
                self._places.setdefault(tuple(self._tokens[-self._key :]), []).append(len(self._tokens))
            self._tokens.append(token)

    def draft(self, count: int) -> tuple[list[int], int]:
        """What may come next, ``count`` tokens or none, and the length of the match."""
        text = self._tokens
        places = self._places.get(tuple(text[-self._key :]), [])
        best, length = 0, 0
        for place in reversed(places[-PLACES:]):
            matched = self._key
            while matched < min(self._longest, place) and text[place - 1 - matched] == text[-1 - matched]:
                matched += 1
            if matched > length:
                best, length = place, matched
        found: list[int] = []
        for at in range(best, best + count if length else best):
            found.append(text[at] if at < len(text) else found[at - len(text)])  # past the end it repeats
        return found, length


class Odds:
    """How often drafted tokens come true, by the length of the match."""

    def __init__(self) -> None:
        self._rates = [0.5] * (len(CLASSES) + 1)

    def of(self, length: int) -> float:
        """The share that comes true after a match of that many tokens."""
        return self._rates[sum(length >= bound for bound in CLASSES)]

    def note(self, length: int, drafted: Sequence[int], came: Sequence[int]) -> None:
        """Compare what was drafted with what came, up to the first token that differs."""
        where = sum(length >= bound for bound in CLASSES)
        for wanted, token in zip(drafted, came, strict=False):
            self._rates[where] += HIT_WEIGHT * ((wanted == token) - self._rates[where])
            if wanted != token:
                return


class Costs:
    """What steps of t tokens a row take, in seconds: the median of the last ones."""

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}

    def of(self, tokens: int) -> float:
        """Seconds of such a step; of one that has hardly been seen a guess."""
        if tokens in self._seconds:
            return self._seconds[tokens]
        return 1.0 if tokens == 1 else self.of(1) * (1 + 0.03 * (tokens - 1))

    def note(self, tokens: int, seconds: float) -> None:
        """A step took that long."""
        last = self._last.setdefault(tokens, deque(maxlen=LAST_SEEN))
        last.append(seconds)
        if len(last) >= LEAST_SEEN:
            self._seconds[tokens] = statistics.median_low(last)


class Drafter:
    """Drafts for the rows of a call, where they pay.

    Args:
        prompts: int64 ``[tokens]`` on the CPU, of each row.
        longest: tokens of a match that count.
        sizes: tokens a row that a step may take at once, besides 1.
        costs: of such steps, with what is known of them.
    """

    def __init__(self, prompts: Sequence[torch.Tensor], longest: int, sizes: Sequence[int], costs: Costs) -> None:
        self.rows = [Lookup(longest) for _ in prompts]
        for row, prompt in zip(self.rows, prompts, strict=True):
            row.extend(prompt.tolist())
        self._sizes = [*sizes]
        self._odds, self._costs = [Odds() for _ in prompts], costs
        self._found: list[tuple[list[int], int]] = [([], 0)] * len(prompts)

    def draft(self, going: Sequence[int]) -> list[list[int]]:
        """For each row of the next step as many drafted tokens; empty lists where a plain step is better.

        Args:
            going: numbers of the rows that have not ended.
        """
        self._found = [([], 0)] * len(self.rows)
        for row in going:
            self._found[row] = self.rows[row].draft(self._sizes[-1] - 1)
        if not any(found for found, _ in self._found):
            return [[]] * len(self.rows)
        best, promise = 1, MARGIN * len(going) / self._costs.of(1)
        for size in self._sizes:
            expected = sum(self._expected(row, size) for row in going) / self._costs.of(size)
            if expected > promise:
                best, promise = size, expected
        return [found[: best - 1] for found, _ in self._found]

    def note(self, tokens: int, seconds: float, came: Sequence[Sequence[int]]) -> None:
        """A step of that many tokens a row took so long and gave this."""
        self._costs.note(tokens, seconds)
        for row, new in enumerate(came):
            found, length = self._found[row]
            if found and new:
                self._odds[row].note(length, found, new)
            self.rows[row].extend(new)

    def _expected(self, row: int, size: int) -> float:
        found, length = self._found[row]
        odds = self._odds[row].of(length) if found else 0.0
        return sum(odds**at for at in range(size))


def drafter_of(runner: Runner, requests: Sequence[Request], drafts: tuple[int, int] | None) -> Drafter | None:
    """What drafts for the rows of a call; None where it asks for none, or no step takes several tokens."""
    sizes = [size for size in runner.draft_sizes(len(requests)) if drafts and size - 1 <= drafts[0]]
    if drafts is None or not sizes:
        return None
    costs = runner.costs.setdefault(batch_bucket(len(requests)), Costs())
    return Drafter([request.prompt for request in requests], drafts[1], sizes, costs)


def drafted(runner: Runner, requests: Sequence[Request], drafter: Drafter, least: int | None) -> Iterator[torch.Tensor]:
    """Prefill, then step after step, and yield what all rows have given since the last time, ``[b, n]``.

    A row that has given more than another one waits with it.
    """
    count, longest = len(requests), max(len(request.prompt) for request in requests)
    eos = [frozenset(request.eos_token_ids[:MAX_EOS_IDS]) for request in requests]
    waiting: list[list[int]] = [[] for _ in requests]
    given, going = [0] * count, list(range(count))
    newest = runner.newest().read()[:count] if runner.prefill(dict(enumerate(requests)), least) else None
    came, tokens, started = [] if newest is None else newest.tolist(), 0, 0.0
    while True:
        if came:
            new = [came[row] if row in going else [] for row in range(count)]
            drafter.note(tokens, time.perf_counter() - started, new)
            for row in going:
                given[row] += len(came[row])
            going = [row for row in going if given[row] < requests[row].max_new_tokens and not eos[row] & {*came[row]}]
            if newest is not None and not any(waiting):
                yield newest
            else:
                waiting = [before + after for before, after in zip(waiting, new, strict=True)]
                ready = min((len(waiting[row]) for row in going), default=max(map(len, waiting)))
                columns = [(row[:ready] + [0] * ready)[:ready] for row in waiting]  # whoever reads it knows the ends
                waiting = [row[ready:] for row in waiting]
                if ready:
                    yield torch.tensor(columns, dtype=torch.long, device="cpu")
            if not going:
                return
        drafts = drafter.draft(going)
        tokens = 1 + max(map(len, drafts))
        runner.reserve(count, longest + max(given) + tokens)
        started = time.perf_counter()
        if tokens == 1:
            runner.step()
            newest = runner.newest().read()[:count]
            came = newest.tolist()
        else:
            whole = [(draft + [0] * tokens)[: tokens - 1] for draft in drafts]
            newest, came = None, runner.step_with(torch.tensor(whole, dtype=torch.long, device="cpu"))
