"""From times to a verdict: has a metric become slower? Functions of numbers alone.

Everything is computed on natural logarithms of ratios: there, twice as slow and twice as fast are equally far from
zero, and exchanging base and head changes the sign and nothing else.

One round is one draw of three fresh processes, ``base``, ``head`` and ``again`` (the base once more), that took turns.
An arm's time in a round is the ``QUANTILE`` of all its times there: how fast it goes while nothing else has the
processor. (Medians of turns that were compared pair by pair scattered two to three times as much between rounds of
equal code, on two cores that were shared with other work.) A round's *change* is ``log head - (log base + log again) /
2`` and its *noise* is ``log again - log base``. For equal revisions the two are uncorrelated, and both come from how
processes of one and the same code differ on this machine.

Rounds are independent, turns of a round are not (a process keeps the memory it was given). So a confidence interval is
Student's over the rounds: mean ± t · s / √n (Student, The Probable Error of a Mean, Biometrika 6, 1908). A bootstrap
over the handful of rounds that a gate can afford would come out too narrow. Within a round, where there are more turns,
it serves to tell how far the round can be relied on (Efron, Bootstrap Methods, Annals of Statistics 7, 1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

QUANTILE = 0.05  # of an arm's times in a round
RESAMPLES = 200  # of a round's turns

THRESHOLD = 0.03  # a smaller slowdown is never called one, unless asked for
SIGHT = 0.10  # a slowdown that the gate must be able to see before it says that there is none
MIN_ROUNDS = 3  # below, an interval says little

# 97.5 % quantiles of Student's distribution of 1, 2, … degrees of freedom (Abramowitz and Stegun, table 26.10).
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Outcome(str, Enum):
    """What can be said of a metric."""

    SLOWER = "slower"
    FASTER = "faster"
    NO_SLOWER = "no slower"
    UNDECIDED = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, of logarithms of ratios."""

    mean: float
    low: float
    high: float

    @property
    def farthest(self) -> float:
        """The distance of its farther end from zero."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Estimate:
    """One metric in one round, in logarithms of ratios.

    Attributes:
        change: of the head to the base; above zero where the head is slower.
        noise: of the second base process to the first.
        error: standard error of ``change`` within the round, from how its turns differ.
    """

    change: float
    noise: float
    error: float


@dataclass(frozen=True)
class Verdict:
    """What was found for one metric.

    Attributes:
        outcome: what can be said.
        change: of head to base over the rounds that count.
        noise: the same of base to base.
        threshold: slowdown, as a fraction, beyond which the head would be called slower.
        rounds: how many count.
        disturbed: how many do not, because their turns differed too much to see a slowdown of ``SIGHT``.
        reason: why, in one line.
    """

    outcome: Outcome
    change: Interval
    noise: Interval
    threshold: float
    rounds: int
    disturbed: int
    reason: str


def estimate(times: Mapping[str, Sequence[Sequence[float]]]) -> Estimate:
    """One metric of one round.

    Args:
        times: of ``base``, ``head`` and ``again``: for each turn the times that it gave, equally many in every turn, of
            one unit and above zero.
    """
    logs = np.log([times[arm] for arm in ("base", "head", "again")])  # [arms, turns, times of a turn]
    change, noise = _contrasts(logs)
    draws = np.random.default_rng(0).integers(logs.shape[1], size=(RESAMPLES, logs.shape[1]))
    error = float(np.std([_contrasts(logs[:, turns])[0] for turns in draws]))
    return Estimate(change, noise, error)


def _contrasts(logs: np.ndarray) -> tuple[float, float]:
    """Change and noise of these turns."""
    base, head, again = np.quantile(logs.reshape(len(logs), -1), QUANTILE, axis=1)
    return float(head - (base + again) / 2), float(again - base)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval; of fewer than two values without bounds."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    freedom = len(values) - 1
    quantile = T_975[freedom - 1] if freedom <= len(T_975) else statistics.NormalDist().inv_cdf(0.975)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def judge(estimates: Sequence[Estimate], threshold: float | None = None) -> Verdict:
    """The verdict on one metric, given its estimate in every round.

    *Slower*: the whole interval of the change lies beyond the threshold, and the head was slower in every round.
    *Faster*: the mirror image. *No slower*: the interval excludes a slowdown of ``SIGHT`` (or of the threshold, where
    that is larger) and the mean is within the threshold. *Inconclusive*: anything else.

    A round whose turns differ so much that it could not see a slowdown of ``SIGHT`` does not count. What is looked at
    is how its turns differ, never the change, so leaving a round out favours no outcome.

    Args:
        estimates: of every round so far.
        threshold: slowdown as a fraction; None: ``THRESHOLD`` or the farther end of the noise's interval, whichever is
            larger. Equal revisions differ by that much here.
    """
    limit = math.log1p(max(SIGHT, threshold or 0.0))
    counted = [each for each in estimates if 2 * each.error <= limit]
    disturbed = len(estimates) - len(counted)
    change, noise = (interval([getattr(each, name) for each in counted]) for name in ("change", "noise"))
    if threshold is None:
        threshold = max(THRESHOLD, math.expm1(min(noise.farthest, 1.0)))
    outcome, reason = _decide([each.change for each in counted], change, math.log1p(threshold), limit)
    return Verdict(outcome, change, noise, threshold, len(counted), disturbed, reason)


def _decide(changes: Sequence[float], change: Interval, threshold: float, limit: float) -> tuple[Outcome, str]:
    if len(changes) < MIN_ROUNDS:
        return Outcome.UNDECIDED, f"only {len(changes)} rounds were quiet enough to count, {MIN_ROUNDS} are needed"
    if change.low > threshold and min(changes) > 0:
        return Outcome.SLOWER, f"slower by at least {percent(change.low)}, in every round"
    if change.high < -threshold and max(changes) < 0:
        return Outcome.FASTER, f"faster by at least {percent(-change.high)}, in every round"
    if threshold >= limit or change.high >= limit:
        return Outcome.UNDECIDED, f"too noisy to exclude a slowdown of {percent(limit)}"
    if change.mean > threshold:
        return Outcome.UNDECIDED, "beyond the threshold on average, but not surely or not in every round"
    return Outcome.NO_SLOWER, f"a slowdown of more than {percent(max(change.high, 0.0))} is excluded"


def percent(log_ratio: float) -> str:
    """A logarithm of a ratio as a change in percent: ``+9.5 %`` without the sign of plus."""
    return f"{100 * math.expm1(log_ratio):.1f} %"
