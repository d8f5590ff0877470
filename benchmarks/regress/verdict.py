"""From times to a verdict: has a metric become slower? Functions of numbers alone.

Everything is computed on natural logarithms of ratios: exchanging base and head changes the sign and nothing else. One
round is one sample of four fresh processes, two of each revision, interleaved. The time of a process is the
``QUANTILE`` of all its times; that of a revision is its faster process's, for now and then one of equal code is a
third slower from its first token to its last. The round's *change* is the head's time to the base's, its *noises* are
what the two processes of each revision differ by. Rounds are independent, turns of a round are not: so a confidence
interval is Student's over the rounds, and a bootstrap of its turns shows how far a round can be relied on.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

from . import MIN_ROUNDS, ROUNDS_TO_FAIL

QUANTILE = 0.05  # of an arm's times in a round
RESAMPLES = 200  # of a round's turns

THRESHOLD = 0.03  # a smaller slowdown is never called one, unless asked for
SIGHT = 0.10  # a slowdown that the gate must be able to see before it says that there is none
ARMS = ("base", "head", "head again", "base again")

# The mean change of n rounds of equal code stays within this many times the median noise, over √n, 95 times of 100.
# Of a normal distribution of standard deviation 1, the median difference of two values is 0.954, and the smaller ones
# of two pairs of values differ with a standard deviation of 1.17; 1.96 · 1.17 / 0.954 = 2.4, and a little to spare.
NOISE_TO_THRESHOLD = 2.5


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
    """One metric in one round, in logarithms of ratios."""

    change: float  # of the head to the base; above zero where the head is slower
    noises: tuple[float, float]  # between the two processes of the base, and of the head
    error: float  # standard error of ``change``, from how the round's turns differ


@dataclass(frozen=True)
class Verdict:
    """What was found for one metric, and why."""

    outcome: Outcome
    change: Interval  # of head to base over the rounds that count
    noise: float  # the median of what two processes of one revision differ by
    threshold: float  # slowdown, as a fraction, beyond which the head would be called slower
    rounds: int  # that count
    disturbed: int  # rounds that do not
    reason: str


def estimate(times: Mapping[str, Sequence[Sequence[float]]]) -> Estimate:
    """One metric of one round."""
    logs = np.log([times[arm] for arm in ARMS])  # [arms, turns, times of a turn]
    change, noises = _contrasts(logs)
    turns = np.random.default_rng(0).integers(logs.shape[1], size=(RESAMPLES, logs.shape[1]))
    error = float(np.std([_contrasts(logs[:, chosen])[0] for chosen in turns]))
    return Estimate(change, noises, error)


def _contrasts(logs: np.ndarray) -> tuple[float, tuple[float, float]]:
    base, head, head_again, base_again = np.quantile(logs.reshape(len(logs), -1), QUANTILE, axis=1).tolist()
    return min(head, head_again) - min(base, base_again), (base_again - base, head_again - head)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval; of fewer than two values without bounds."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def judge(estimates: Sequence[Estimate], threshold: float | None = None) -> Verdict:
    """The verdict on one metric, given its estimate in every round.

    *Slower*: the whole interval of the change lies beyond the threshold, and the head was slower in each of at least
    ``ROUNDS_TO_FAIL`` rounds. *Faster*: the mirror image, where fewer rounds will do. *No slower*: the interval
    excludes a slowdown of ``SIGHT`` (or of the threshold, where that is larger) and the mean is within the threshold as
    it would be without noise. *Inconclusive*: anything else. A round whose turns differ so much that it could not see
    ``SIGHT`` does not count; the change is not looked at, so this favours no outcome.
    """
    counted = [each for each in estimates if counts(each, threshold)]
    change = interval([each.change for each in counted])
    noise = statistics.median(abs(value) for each in counted for value in each.noises) if counted else math.nan
    quiet = threshold or THRESHOLD
    if threshold is None:
        expected = NOISE_TO_THRESHOLD * noise / math.sqrt(len(counted)) if counted else 0.0
        threshold = max(THRESHOLD, math.expm1(min(expected, 1.0)))
    limits = [math.log1p(fraction) for fraction in (quiet, threshold, max(SIGHT, quiet))]
    outcome, reason = _decide([each.change for each in counted], change, *limits)
    return Verdict(outcome, change, noise, threshold, len(counted), len(estimates) - len(counted), reason)


def counts(each: Estimate, threshold: float | None = None) -> bool:
    """Whether a round was quiet enough to see a slowdown of ``SIGHT``, or of the threshold where that is larger."""
    return 2 * each.error <= math.log1p(max(SIGHT, threshold or 0.0))


def _decide(
    changes: Sequence[float], change: Interval, to_pass: float, to_fail: float, sight: float
) -> tuple[Outcome, str]:
    if len(changes) < MIN_ROUNDS:
        return Outcome.UNDECIDED, f"only {len(changes)} rounds were quiet enough to count, {MIN_ROUNDS} are needed"
    if change.low > to_fail and min(changes) > 0:
        if len(changes) < ROUNDS_TO_FAIL:
            return Outcome.UNDECIDED, f"slower in all of {len(changes)} rounds, {ROUNDS_TO_FAIL} are needed"
        return Outcome.SLOWER, f"slower by at least {percent(change.low)}, in every round"
    if change.high < -to_fail and max(changes) < 0:
        return Outcome.FASTER, f"faster by at least {percent(-change.high)}, in every round"
    if to_fail > sight or change.high >= sight:
        return Outcome.UNDECIDED, f"too noisy to exclude a slowdown of {percent(sight)}"
    if change.mean > to_pass:
        return Outcome.UNDECIDED, f"slower by {percent(change.mean)} on average, but not surely or not in every round"
    return Outcome.NO_SLOWER, f"a slowdown of more than {percent(max(change.high, 0.0))} is excluded"


def percent(log_ratio: float) -> str:
    """A logarithm of a ratio as a change in percent: ``+9.5 %`` without the sign of plus."""
    return f"{100 * math.expm1(log_ratio):.1f} %"
