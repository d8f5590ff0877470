"""The parity gate: do base and head decode the same tokens?

The speed of different outputs cannot be compared. In float32 the greedy tokens of two correct implementations are
equal, so there equality is required. In 16-bit precision they part wherever two logits all but tie, so there a
difference is only told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..harness import Contender, Unavailable, Workload

Rows = tuple[tuple[int, ...], ...]

PROMPT_LENGTHS = (1, 17)  # beside the one that is timed
NEW_TOKENS = 48


@dataclass(frozen=True)
class Difference:
    """Where two decodes part first.

    Attributes:
        token: index of the first new token that differs.
        row: of the batch.
        batch: rows of the batch.
        prompt_len: tokens of each prompt.
        base: the base's token; None where it has none.
        head: the head's.
    """

    token: int
    row: int
    batch: int
    prompt_len: int
    base: int | None
    head: int | None

    def __str__(self) -> str:
        where = f"row {self.row + 1} of {self.batch}, " if self.batch > 1 else ""
        return (
            f"outputs differ from token {self.token} ({where}prompt of {self.prompt_len} tokens): "
            f"base {self.base}, head {self.head}"
        )


def prompts(vocab_size: int, batches: Sequence[int], prompt_len: int) -> list[Workload]:
    """What base and head decode to be compared."""
    cases = [(1, length) for length in PROMPT_LENGTHS] + [(batch, prompt_len) for batch in batches]
    return [Workload.random(vocab_size, batch, length, NEW_TOKENS) for batch, length in dict.fromkeys(cases)]


def compare(base: Contender, head: Contender, workloads: Sequence[Workload]) -> Difference | None:
    """Decode with both and tell where they part first; None where they do not.

    Raises:
        Unavailable: one of them cannot decode, or does not tell its tokens.
    """
    for workload in workloads:
        found = [contender.run(workload).tokens for contender in (base, head)]
        if found[0] is None or found[1] is None:
            raise Unavailable("a worker did not tell its tokens")
        difference = first_difference(found[0], found[1], workload.prompt_len)
        if difference:
            return difference
    return None


def first_difference(base: Rows, head: Rows, prompt_len: int) -> Difference | None:
    """The earliest token that differs between two batches of equal size."""
    differences = []
    for row, (ours, theirs) in enumerate(zip(base, head, strict=True)):
        length = max(len(ours), len(theirs))
        pairs = zip(_padded(ours, length), _padded(theirs, length), strict=True)
        at = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        if at is not None:
            tokens = (_padded(ours, length)[at], _padded(theirs, length)[at])
            differences.append(Difference(at, row, len(base), prompt_len, *tokens))
    return min(differences, key=lambda difference: difference.token, default=None)


def _padded(tokens: tuple[int, ...], length: int) -> tuple[int | None, ...]:
    return tokens + (None,) * (length - len(tokens))
