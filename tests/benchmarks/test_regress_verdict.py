"""From times to verdicts: on recorded rounds, on rounds made of them, and on any numbers."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_benchmarks.regress import MIN_ROUNDS, ROUNDS_TO_FAIL
from fastllama_benchmarks.regress.rounds import HEAD, HEAD_AGAIN, ORDERS, Metric, step_seconds
from fastllama_benchmarks.regress.verdict import (
    ARMS,
    SIGHT,
    THRESHOLD,
    Estimate,
    Outcome,
    Verdict,
    estimate,
    interval,
    judge,
)

RECORDED = json.loads((Path(__file__).parent / "data" / "regress_rounds.json").read_text())
METRICS = ("tpot-b1", "ttft-b1", "tpot-b4")
Times = dict[str, list[list[float]]]


def recorded(kind: str, metric: str) -> list[list[Times]]:
    """Every recorded invocation of one kind: its rounds' times of one metric."""
    return [[times[metric] for times in rounds] for rounds in RECORDED[kind]]


def verdict_on(rounds: list[Times], threshold: float | None = None) -> Verdict:
    return judge([estimate(times) for times in rounds], threshold)


def slowed(times: Times, factor: float) -> Times:
    """The same round, had the head been slower."""
    return times | {arm: [[seconds * factor for seconds in turn] for turn in times[arm]] for arm in (HEAD, HEAD_AGAIN)}


def steady(change: float = 0.0, noise: float = 0.0, error: float = 0.0) -> Estimate:
    return Estimate(math.log1p(change), (math.log1p(noise), -math.log1p(noise)), error)


def changes(*values: float) -> list[Estimate]:
    return [steady(value) for value in values]


@pytest.mark.parametrize("metric", METRICS)
def test_recorded_runs_of_equal_revisions_pass(metric: str) -> None:
    for rounds in recorded("equal", metric):
        assert verdict_on(rounds).outcome is Outcome.NO_SLOWER


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_rounds_with_a_tenth_added_to_the_head_fail(metric: str) -> None:
    rounds = [times for invocation in recorded("equal", metric) for times in invocation]
    assert verdict_on(rounds).outcome is Outcome.NO_SLOWER
    assert verdict_on([slowed(times, 1.1) for times in rounds]).outcome is Outcome.SLOWER


@pytest.mark.parametrize("metric", METRICS)
def test_recorded_runs_of_a_head_whose_steps_took_a_tenth_longer_fail(metric: str) -> None:
    for rounds in recorded("slowed", metric):
        assert verdict_on(rounds).outcome is Outcome.SLOWER


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("factor", "wrong"), [(1.0, Outcome.SLOWER), (1.1, Outcome.NO_SLOWER)])
def test_no_sample_of_recorded_rounds_comes_out_wrong(metric: str, factor: float, wrong: Outcome) -> None:
    pool = [estimate(slowed(times, factor)) for rounds in recorded("equal", metric) for times in rounds]
    draw = random.Random(0)
    for count in (MIN_ROUNDS, ROUNDS_TO_FAIL, 8):
        assert all(judge(draw.sample(pool, k=count)).outcome is not wrong for _ in range(100))


def test_a_steady_slowdown_beyond_the_threshold_is_slower() -> None:
    verdict = judge(changes(0.09, 0.10, 0.11, 0.10, 0.10))
    assert verdict.outcome is Outcome.SLOWER
    assert "slower by at least 9.1 %, in every round" in verdict.reason


def test_one_round_that_disagrees_prevents_failure() -> None:
    estimates = changes(0.10, 0.10, 0.10, 0.10, -0.001, *[0.10] * 20)
    verdict = judge(estimates)
    assert verdict.change.low > math.log1p(verdict.threshold)
    assert verdict.outcome is not Outcome.SLOWER


def test_one_outlying_round_of_equal_revisions_does_not_fail() -> None:
    assert judge(changes(0.0, 0.01, 0.5, 0.0, 0.01)).outcome is Outcome.UNDECIDED


def test_the_threshold_that_was_asked_for_is_taken() -> None:
    estimates = changes(0.019, 0.020, 0.021, 0.020, 0.020)
    assert judge(estimates, 0.01).outcome is Outcome.SLOWER
    assert judge(estimates, 0.01).threshold == 0.01
    assert judge(changes(0.15, 0.16, 0.15), 0.5).outcome is Outcome.NO_SLOWER


def test_noise_between_processes_of_equal_code_raises_the_threshold() -> None:
    quiet = [steady(0.05, 0.002)] * 5
    noisy = [steady(0.05, 0.07)] * 5
    assert judge(quiet).threshold == THRESHOLD
    assert judge(quiet).outcome is Outcome.SLOWER
    assert judge(noisy).threshold == pytest.approx(math.expm1(2.5 * math.log(1.07) / math.sqrt(5)))
    assert judge(noisy).outcome is Outcome.UNDECIDED  # it is no reason to let pass what is beyond the usual threshold


def test_equal_code_stays_within_the_threshold_that_its_noise_asks_for() -> None:
    draw = random.Random(0)
    within = 0
    for _ in range(2000):
        processes = [[draw.gauss(0, 0.04) for _ in range(4)] for _ in range(4)]
        found = judge([Estimate(min(h, i) - min(b, c), (c - b, i - h), 0.0) for b, h, i, c in processes])
        within += abs(found.change.mean) <= math.log1p(found.threshold)
    assert within / 2000 > 0.93  # 95 % if the noise were known, which is itself measured in eight pairs


def test_noise_that_would_hide_a_tenth_is_inconclusive() -> None:
    scattered = changes(0.3, -0.3, 0.2, -0.25, 0.1)
    assert judge(scattered).outcome is Outcome.UNDECIDED
    assert "too noisy" in judge(scattered).reason
    apart = [steady(0.0, noise) for noise in (0.3, 0.3, 0.2, 0.25, 0.1)]
    assert judge(apart).outcome is Outcome.UNDECIDED


def test_rounds_whose_turns_differ_do_not_count_whatever_they_say() -> None:
    estimates = [*changes(*[0.10] * 5), steady(-0.5, 0.4, error=0.2), steady(0.5, 0.4, error=0.2)]
    verdict = judge(estimates)
    assert (verdict.rounds, verdict.disturbed) == (5, 2)
    assert verdict.outcome is Outcome.SLOWER


@pytest.mark.parametrize("count", range(MIN_ROUNDS))
def test_too_few_rounds_are_inconclusive(count: int) -> None:
    assert judge(changes(*[0.2] * count)).outcome is Outcome.UNDECIDED


@pytest.mark.parametrize("count", range(MIN_ROUNDS, ROUNDS_TO_FAIL))
def test_to_pass_takes_fewer_rounds_than_to_fail(count: int) -> None:
    assert judge(changes(*[0.01] * count)).outcome is Outcome.NO_SLOWER
    assert judge(changes(*[-0.10] * count)).outcome is Outcome.FASTER
    assert judge(changes(*[0.10] * count)).outcome is Outcome.UNDECIDED
    assert judge(changes(*[0.10] * ROUNDS_TO_FAIL)).outcome is Outcome.SLOWER


def test_each_revision_is_as_fast_as_its_faster_process() -> None:
    found = estimate(
        {"base": [[1.0], [1.0]], "head": [[4.0], [4.0]], "head again": [[2.0]] * 2, "base again": [[3.0]] * 2}
    )
    assert found.change == pytest.approx(math.log(2))
    assert found.noises == pytest.approx((math.log(3), -math.log(2)))
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_a_round_whose_turns_differ_has_a_large_error() -> None:
    steady, restless = [[1.0, 1.01]] * 12, [[1.0 + turn / 12] * 2 for turn in range(12)]
    assert estimate(dict.fromkeys(ARMS, steady)).error < 0.005
    assert estimate(dict.fromkeys(ARMS, steady) | {"head": restless, "head again": restless}).error > 0.03


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(4000):
        found = interval([draw.gauss(0.02, 0.01) for _ in range(5)])
        covered += found.low <= 0.02 <= found.high
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


positive = st.floats(1e-5, 10.0)
turns = st.lists(st.tuples(positive, positive, positive, positive), min_size=1, max_size=8)
logs = st.floats(-0.5, 0.5)
many = st.lists(st.builds(Estimate, logs, st.tuples(logs, logs), st.floats(0, 0.2)), max_size=14)
thresholds = st.none() | st.floats(0.005, 0.5)


def by_arm(rounds: list[tuple[float, ...]], factor: float = 1.0) -> Times:
    """Turns of one time each."""
    return {arm: [[turn[place] * factor] for turn in rounds] for place, arm in enumerate(ARMS)}


@settings(deadline=None)
@given(turns, st.floats(1e-3, 1e3))
def test_a_machine_of_another_speed_changes_no_estimate(rounds: list[tuple[float, ...]], factor: float) -> None:
    one, other = estimate(by_arm(rounds)), estimate(by_arm(rounds, factor))
    for name in ("change", "noises", "error"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-9)


@settings(deadline=None)
@given(turns)
def test_exchanging_base_and_head_changes_the_sign_and_nothing_else(rounds: list[tuple[float, ...]]) -> None:
    exchanged = [(head, base, base_again, head_again) for base, head, head_again, base_again in rounds]
    one, other = estimate(by_arm(rounds)), estimate(by_arm(exchanged))
    assert other.change == pytest.approx(-one.change, abs=1e-9)
    assert other.noises == pytest.approx(one.noises[::-1], abs=1e-9)
    assert other.error == pytest.approx(one.error, abs=1e-9)


@given(many, thresholds)
def test_slower_and_faster_are_mirror_images(estimates: list[Estimate], threshold: float | None) -> None:
    mirrored = [Estimate(-each.change, each.noises[::-1], each.error) for each in estimates]
    one, other = judge(estimates, threshold), judge(mirrored, threshold)
    if one.outcome is Outcome.SLOWER:
        assert other.outcome is Outcome.FASTER
    if one.outcome is Outcome.FASTER and one.rounds >= ROUNDS_TO_FAIL:
        assert other.outcome is Outcome.SLOWER
    assert other.threshold == one.threshold


@given(many, thresholds)
def test_slower_means_beyond_the_threshold_and_in_every_round(
    estimates: list[Estimate], threshold: float | None
) -> None:
    verdict = judge(estimates, threshold)
    counted = [each.change for each in estimates if 2 * each.error <= math.log1p(max(SIGHT, threshold or 0))]
    assert (verdict.rounds, verdict.disturbed) == (len(counted), len(estimates) - len(counted))
    if verdict.outcome is Outcome.SLOWER:
        assert min(counted) > 0
        assert len(counted) >= ROUNDS_TO_FAIL
        assert verdict.change.low > math.log1p(verdict.threshold)
        assert verdict.threshold >= (threshold or THRESHOLD)


@given(many)
def test_passing_means_that_a_tenth_is_excluded(estimates: list[Estimate]) -> None:
    verdict = judge(estimates)
    if verdict.outcome is Outcome.NO_SLOWER:
        assert verdict.change.high < math.log1p(SIGHT)


def test_every_arm_is_once_in_each_place_and_follows_each_other_once() -> None:
    for place in range(len(ARMS)):
        assert {order[place] for order in ORDERS} == set(ARMS)
    pairs = [pair for order in ORDERS for pair in pairwise(order)]
    assert len(set(pairs)) == len(pairs) == 12


def test_what_happens_every_few_steps_is_in_every_time_of_a_step() -> None:
    assert step_seconds(([1.0] * 7 + [9.0]) * 2) == [2.0, 2.0]
    assert step_seconds([*[1.0] * 8, 700.0]) == [1.0]  # too few to stand beside the others
    assert step_seconds([2.0, 4.0]) == [3.0]


@pytest.mark.parametrize("name", ["", "tpot", "tpot-b0", "latency-b1", "tpot-b1 "])
def test_a_name_that_is_no_metric_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no metric"):
        Metric.parse(name)
