"""From times to a verdict: has a metric become slower? Functions of numbers alone.

Everything is computed on natural logarithms of ratios: there, twice as slow and twice as fast are equally far from
zero, and exchanging base and head changes the sign and nothing else.

One round is one draw of four fresh processes, two of each revision, that took turns. The time of a process is the
``QUANTILE`` of all its times: how fast it goes while nothing else has the processor. (Medians of turns that were
compared pair by pair scattered two to three times as much between rounds of equal code, on two cores that were shared
with other work.) The time of a revision is that of its faster process: one in twenty of equal code was up to a third
slower from its first token to its last, on the same machine. The round's *change* is the head's time to the base's,
its *noises* are what the two processes of each revision differ by.

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
from typing import NamedTuple

import numpy as np

QUANTILE = 0.05  # of an arm's times in a round
RESAMPLES = 200  # of a round's turns

THRESHOLD = 0.03  # a smaller slowdown is never called one, unless asked for
SIGHT = 0.10  # a slowdown that the gate must be able to see before it says that there is none
MIN_ROUNDS = 3  # below, an interval says little
ROUNDS_TO_FAIL = 5  # nobody should be stopped by less
ARMS = ("base", "head", "head again", "base again")

# The mean change of n rounds of equal code stays within this many times the median noise, over √n, 95 times of 100.
# Of a normal distribution of standard deviation 1, the median difference of two values is 0.954, and the smaller ones
# of two pairs of values differ with a standard deviation of 1.17; 1.96 · 1.17 / 0.954 = 2.4, and a little to spare.
NOISE_TO_THRESHOLD = 2.5

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


@dataclass(frozen=True)
class Estimate:
    """One metric in one round, in logarithms of ratios.

    Attributes:
        change: of the head to the base; above zero where the head is slower.
        noises: between the two processes of the base, and of the head.
        error: standard error of ``change`` within the round, from how its turns differ.
    """

    change: float
    noises: tuple[float, float]
    error: float


@dataclass(frozen=True)
class Verdict:
    """What was found for one metric.

    Attributes:
        outcome: what can be said.
        change: of head to base over the rounds that count.
        noise: by which two processes of one revision differ typically, the median of all rounds.
        threshold: slowdown, as a fraction, beyond which the head would be called slower.
        rounds: how many count.
        disturbed: how many do not, because their turns differed too much to see a slowdown of ``SIGHT``.
        reason: why, in one line.
    """

    outcome: Outcome
    change: Interval
    noise: float
    threshold: float
    rounds: int
    disturbed: int
    reason: str


def estimate(times: Mapping[str, Sequence[Sequence[float]]]) -> Estimate:
    """One metric of one round.

    Args:
        times: of each of ``ARMS``: for each turn the times that it gave, equally many in every turn, of one unit and
            above zero.
    """
    logs = np.log([times[arm] for arm in ARMS])  # [arms, turns, times of a turn]
    change, noises = _contrasts(logs)
    draws = np.random.default_rng(0).integers(logs.shape[1], size=(RESAMPLES, logs.shape[1]))
    error = float(np.std([_contrasts(logs[:, turns])[0] for turns in draws]))
    return Estimate(change, noises, error)


def _contrasts(logs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Change and noises of these turns."""
    base, head, head_again, base_again = np.quantile(logs.reshape(len(logs), -1), QUANTILE, axis=1).tolist()
    return min(head, head_again) - min(base, base_again), (base_again - base, head_again - head)


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

    *Slower*: the whole interval of the change lies beyond the threshold, and the head was slower in each of at least
    ``ROUNDS_TO_FAIL`` rounds. *Faster*: the mirror image, where fewer rounds will do. *No slower*: the interval
    excludes a slowdown of ``SIGHT`` (or of the threshold, where that is larger) and the mean is within the threshold as
    it would be without noise, for noise is no reason to let pass what it might not have caused. *Inconclusive*:
    anything else.

    A round whose turns differ so much that it could not see a slowdown of ``SIGHT`` does not count. What is looked at
    is how its turns differ, never the change, so leaving a round out favours no outcome.

    Args:
        estimates: of every round so far.
        threshold: slowdown as a fraction; None: ``THRESHOLD``, or where that is more, what the mean change of as many
            rounds of equal code would stay within, given the noise.
    """
    counted = [each for each in estimates if counts(each, threshold)]
    change = interval([each.change for each in counted])
    noise = statistics.median(abs(value) for each in counted for value in each.noises) if counted else math.nan
    quiet = threshold or THRESHOLD
    if threshold is None:
        expected = NOISE_TO_THRESHOLD * noise / math.sqrt(len(counted)) if counted else 0.0
        threshold = max(THRESHOLD, math.expm1(min(expected, 1.0)))
    limits = Limits(*map(math.log1p, (quiet, threshold, max(SIGHT, quiet))))
    outcome, reason = _decide([each.change for each in counted], change, limits)
    return Verdict(outcome, change, noise, threshold, len(counted), len(estimates) - len(counted), reason)


class Limits(NamedTuple):
    """What a change is held against: to pass, to fail, and what must be seen; logarithms of ratios."""

    to_pass: float
    to_fail: float
    sight: float


def counts(each: Estimate, threshold: float | None = None) -> bool:
    """Whether a round was quiet enough to see a slowdown of ``SIGHT``, or of the threshold where that is larger."""
    return 2 * each.error <= math.log1p(max(SIGHT, threshold or 0.0))


def _decide(changes: Sequence[float], change: Interval, limits: Limits) -> tuple[Outcome, str]:
    if len(changes) < MIN_ROUNDS:
        return Outcome.UNDECIDED, f"only {len(changes)} rounds were quiet enough to count, {MIN_ROUNDS} are needed"
    if change.low > limits.to_fail and min(changes) > 0:
        if len(changes) < ROUNDS_TO_FAIL:
            return Outcome.UNDECIDED, f"slower in all of {len(changes)} rounds, {ROUNDS_TO_FAIL} are needed"
        return Outcome.SLOWER, f"slower by at least {percent(change.low)}, in every round"
    if change.high < -limits.to_fail and max(changes) < 0:
        return Outcome.FASTER, f"faster by at least {percent(-change.high)}, in every round"
    if limits.to_fail > limits.sight or change.high >= limits.sight:
        return Outcome.UNDECIDED, f"too noisy to exclude a slowdown of {percent(limits.sight)}"
    if change.mean > limits.to_pass:
        return Outcome.UNDECIDED, f"slower by {percent(change.mean)} on average, but not surely or not in every round"
    return Outcome.NO_SLOWER, f"a slowdown of more than {percent(max(change.high, 0.0))} is excluded"


def percent(log_ratio: float) -> str:
    """A logarithm of a ratio as a change in percent: ``+9.5 %`` without the sign of plus."""
    return f"{100 * math.expm1(log_ratio):.1f} %"
