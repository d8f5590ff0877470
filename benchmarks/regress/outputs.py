"""The parity gate: do base and head decode the same tokens?

In float32 the greedy tokens of two correct implementations are equal, so there equality is required. In 16-bit
precision they part wherever two logits nearly tie, so there a difference is only reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..workload import Contender, Rows, Unavailable, Workload

PROMPT_LENGTHS = (1, 17)  # besides the one that is timed
NEW_TOKENS = 48


@dataclass(frozen=True)
class Difference:
    """Where two decodes part first."""

    token: int  # index of the first new token that differs
    row: int
    batch: int
    prompt_len: int
    base: int | None  # its token; None where it has none
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
    """Decode with both; where they part first, or None."""
    for workload in workloads:
        ours, theirs = (contender.run(workload).tokens for contender in (base, head))
        if ours is None or theirs is None:
            raise Unavailable("a worker did not report its tokens")
        if difference := first_difference(ours, theirs, workload.prompt_len):
            return difference
    return None


def first_difference(base: Rows, head: Rows, prompt_len: int) -> Difference | None:
    """The earliest token that differs between two batches of equal size."""
    found = [
        Difference(at, row, len(base), prompt_len, *pair)
        for row, both in enumerate(zip(base, head, strict=True))
        for at, pair in enumerate(zip_longest(*both))
        if pair[0] != pair[1]
    ]
    return min(found, key=lambda difference: difference.token, default=None)
