"""From timed runs to the figures of one contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastllama.measure import Quantiles, quantiles

from .harness import Run
from .parity import Parity


@dataclass(frozen=True)
class Figures:
    """What the runs of one contender come to.

    Attributes:
        name: the contender.
        ttft_ms: milliseconds to the first token.
        tpot_ms: milliseconds per decode step after it; None where there was no second token.
        tokens_per_second: new tokens of all rows after the first ones, over all rounds.
        bandwidth_gb_s: bytes per step over the median step, in GB (10⁹ bytes) per second.
        mbu: that as a fraction of the memory bandwidth measured in the run.
        first_run_s: seconds of the whole first run in this process, compiling what the caches on disk lack.
        parity: whether the tokens are right; None where the contender does not tell them.
        same_tokens: tokens of the first row that equal fastllama's before one differs; None likewise.
    """

    name: str
    ttft_ms: Quantiles
    tpot_ms: Quantiles | None
    tokens_per_second: float
    bandwidth_gb_s: float
    mbu: float
    first_run_s: float
    parity: Parity | None
    same_tokens: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of ``ttft_ms`` the median, of ``parity`` whether it passed; all of them beside."""
        plain = asdict(self)
        return plain | {
            "ttft_ms": self.ttft_ms.p50,
            "ttft_ms_quantiles": plain["ttft_ms"],
            "parity": None if self.parity is None else self.parity.passed,
            "parity_detail": plain["parity"],
        }


def figures(
    name: str,
    runs: Sequence[Run],
    first_run_s: float,
    *,
    batch: int,
    bytes_per_step: int,
    bytes_per_second: float,
    parity: Parity | None,
    reference: Sequence[int],
) -> Figures:
    """Sum up one contender.

    Args:
        name: of the contender.
        runs: its timed runs.
        first_run_s: seconds of its first run of all.
        batch: rows decoded together.
        bytes_per_step: what a step reads.
        bytes_per_second: memory bandwidth measured in the run.
        parity: of its tokens.
        reference: fastllama's tokens of the first row.
    """
    steps = [seconds for run in runs for seconds in run.tpot]
    tpot_ms = quantiles([1e3 * seconds for seconds in steps]) if steps else None
    achieved = bytes_per_step / (tpot_ms.p50 / 1e3) if tpot_ms else 0.0
    tokens = runs[0].tokens
    return Figures(
        name=name,
        ttft_ms=quantiles([1e3 * run.ttft for run in runs]),
        tpot_ms=tpot_ms,
        tokens_per_second=batch * len(steps) / sum(steps) if steps else 0.0,
        bandwidth_gb_s=achieved / 1e9,
        mbu=achieved / bytes_per_second,
        first_run_s=first_run_s,
        parity=parity,
        same_tokens=None if tokens is None else common_prefix(tokens[0], reference),
    )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two decodes share before the first that differs."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
