"""Drafts by lookup: what followed before, in the row's own text or in earlier ones.

The draft is the continuation of the latest place where the longest end of the row has come before: prompt lookup
(arXiv 2304.04487) with the match of suffix decoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

KEY = 2  # tokens by which a text's places are indexed
POOL_KEY = 4  # the same of earlier texts, where two tokens are found everywhere
PLACES = 16  # of an end that are compared, the latest ones
LONGEST = 32  # tokens of a match, beyond which its length does not matter
CLASSES = (3, 5, 9)  # bounds between match lengths of one hit rate


class Draft(NamedTuple):
    """Tokens that may come next, and for each of them the class of drafts that it comes true as often as."""

    tokens: list[int]
    classes: list[int]


NOTHING = Draft([], [])


class Lookup:
    """Finds what followed the end of a text where that came before.

    Args:
        longest: tokens of the text's end that are compared.
    """

    def __init__(self, longest: int = LONGEST) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # where the text goes on after these tokens
        self.longest, self._key = longest, min(KEY, longest)

    def extend(self, tokens: Sequence[int]) -> None:
        """Let the text go on."""
        for token in tokens:
            if len(self.tokens) >= self._key:
                self._places.setdefault(tuple(self.tokens[-self._key :]), []).append(len(self.tokens))
            self.tokens.append(token)

    def draft(self, count: int) -> tuple[list[int], int]:
        """What may come next, ``count`` tokens or none, and the length of the match."""
        text, best, length = self.tokens, 0, 0
        for place in reversed(self._places.get(tuple(text[-self._key :]), [])[-PLACES:]):
            if (matched := common_end(text, place, text, self.longest)) > length:
                best, length = place, matched
        found: list[int] = []
        for at in range(best, best + count if length else best):
            found.append(text[at] if at < len(text) else found[at - len(text)])  # past the end it repeats
        return found, length


class Texts:
    """Earlier texts of an engine, the newest ones, in which drafts can be looked up too."""

    def __init__(self) -> None:
        self._texts: deque[tuple[int, ...]] = deque()
        self._places: dict[tuple[int, ...], deque[tuple[tuple[int, ...], int]]] = {}
        self.count = 0  # tokens of all of them

    def add(self, tokens: Sequence[int], most: int) -> None:
        """Keep a text, its last tokens where it is longer than that, and forget the oldest ones beyond ``most``."""
        text = tuple(tokens[-most:])
        self._texts.append(text)
        self.count += len(text)
        for place in range(POOL_KEY, len(text)):
            self._places.setdefault(text[place - POOL_KEY : place], deque()).append((text, place))
        while self.count > most:
            self._forget_oldest()

    def draft(self, ending: Sequence[int], count: int, longest: int) -> tuple[list[int], int]:
        """What followed the end of a row in one of them, at most ``count`` tokens, and the length of the match."""
        if longest < POOL_KEY:
            return [], 0
        found, length = list[int](), 0
        places = self._places.get(tuple(ending[-POOL_KEY:]), ())
        for at in range(len(places) - 1, max(len(places) - 1 - PLACES, -1), -1):
            text, place = places[at]
            if (matched := common_end(text, place, ending, longest)) > length:
                found, length = list(text[place : place + count]), matched
        return found, length

    def _forget_oldest(self) -> None:
        text = self._texts.popleft()
        self.count -= len(text)
        for place in range(POOL_KEY, len(text)):
            key = text[place - POOL_KEY : place]
            places = self._places[key]
            places.popleft()  # they are in the order of the texts
            if not places:
                del self._places[key]


class LookupSource:
    """Drafts for the rows of a call from what they and earlier texts say.

    Args:
        prompts: int64 ``[tokens]`` on the CPU, of each row.
        longest: tokens of a match that count.
        texts: earlier ones, to which these are added in the end; None: the rows' own alone.
        most: tokens of earlier texts that are kept.
    """

    classes = len(CLASSES) + 1
    is_free = True  # next to a step
    key = "lookup"

    def __init__(
        self, prompts: Sequence[torch.Tensor], longest: int, texts: Texts | None = None, most: int = 0
    ) -> None:
        self.rows = [Lookup(longest) for _ in prompts]
        for row, prompt in zip(self.rows, prompts, strict=True):
            row.extend(prompt.tolist())
        self._texts, self._most = texts, most

    def draft(self, going: Sequence[int], count: int) -> Mapping[int, Draft]:
        """Drafts of at most ``count`` tokens for rows, by number."""
        found = {}
        for number in going:
            row = self.rows[number]
            tokens, length = row.draft(count)
            if self._texts is not None and length < row.longest:
                earlier, matched = self._texts.draft(row.tokens[-row.longest :], count, row.longest)
                tokens, length = (earlier, matched) if matched > length else (tokens, length)
            if tokens:
                found[number] = Draft(tokens, [sum(length >= bound for bound in CLASSES)] * len(tokens))
        return found

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Let a row go on."""
        self.rows[number].extend(tokens)

    def close(self) -> None:
        """Keep the rows' texts for the next calls."""
        for row in self.rows:
            if self._texts is not None:
                self._texts.add(row.tokens, self._most)


def common_end(text: Sequence[int], place: int, ending: Sequence[int], most: int) -> int:
    """How many tokens before a place in a text are those that a row ends with, ``most`` at most."""
    matched, most = 0, min(most, place, len(ending))
    while matched < most and text[place - 1 - matched] == ending[-1 - matched]:
        matched += 1
    return matched
