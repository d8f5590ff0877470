"""From times to verdicts: on recorded rounds, on rounds made of them, and on any numbers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_benchmarks.regress import MIN_ROUNDS, ROUNDS_TO_FAIL
from fastllama_benchmarks.regress.rounds import ORDERS, step_seconds
from fastllama_benchmarks.regress.verdict import ARMS, SIGHT, THRESHOLD, Estimate, Outcome, Verdict, estimate, judge

RECORDED = json.loads((Path(__file__).parent / "data" / "regress_rounds.json").read_text())
METRICS = ("tpot-b1", "ttft-b1", "tpot-b4")
Times = dict[str, list[list[float]]]


def recorded(kind: str, metric: str) -> list[list[Times]]:
    """Every recorded invocation of one kind: its rounds' times of one metric."""
    return [[times[metric] for times in rounds] for rounds in RECORDED[kind]]


def verdict_on(rounds: list[Times], threshold: float | None = None) -> Verdict:
    return judge([estimate(times) for times in rounds], threshold)


def steady(change: float = 0.0, noise: float = 0.0, error: float = 0.0) -> Estimate:
    return Estimate(math.log1p(change), (math.log1p(noise), -math.log1p(noise)), error)


def changes(*values: float) -> list[Estimate]:
    return [steady(value) for value in values]


@pytest.mark.parametrize("metric", METRICS)
def test_recorded_runs_of_equal_revisions_pass(metric: str) -> None:
    for rounds in recorded("equal", metric):
        assert verdict_on(rounds).outcome is Outcome.NO_SLOWER


@pytest.mark.parametrize("metric", METRICS)
def test_recorded_runs_of_a_head_whose_steps_took_a_tenth_longer_fail(metric: str) -> None:
    for rounds in recorded("slowed", metric):
        assert verdict_on(rounds).outcome is Outcome.SLOWER


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


@pytest.mark.parametrize("count", range(MIN_ROUNDS, ROUNDS_TO_FAIL))
def test_to_pass_takes_fewer_rounds_than_to_fail(count: int) -> None:
    assert judge(changes(*[0.01] * count)).outcome is Outcome.NO_SLOWER
    assert judge(changes(*[-0.10] * count)).outcome is Outcome.FASTER
    assert judge(changes(*[0.10] * count)).outcome is Outcome.UNDECIDED
    assert judge(changes(*[0.10] * ROUNDS_TO_FAIL)).outcome is Outcome.SLOWER


def test_each_revision_is_as_fast_as_its_faster_process() -> None:
    seconds = {"base": 1.0, "head": 4.0, "head again": 2.0, "base again": 3.0}
    found = estimate({arm: [[each]] * 2 for arm, each in seconds.items()})
    assert found.change == pytest.approx(math.log(2))
    assert found.noises == pytest.approx((math.log(3), -math.log(2)))
    assert found.error == pytest.approx(0.0, abs=1e-9)


positive = st.floats(1e-5, 10.0)
turns = st.lists(st.tuples(positive, positive, positive, positive), min_size=1, max_size=8)
logs = st.floats(-0.5, 0.5)
many = st.lists(st.builds(Estimate, logs, st.tuples(logs, logs), st.floats(0, 0.2)), max_size=14)
thresholds = st.none() | st.floats(0.005, 0.5)


def by_arm(rounds: list[tuple[float, ...]], factor: float = 1.0) -> Times:
    """Turns of one time each."""
    return {arm: [[turn[place] * factor] for turn in rounds] for place, arm in enumerate(ARMS)}


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


def test_every_arm_is_once_in_each_place_and_follows_each_other_once() -> None:
    for place in range(len(ARMS)):
        assert {order[place] for order in ORDERS} == set(ARMS)
    pairs = [pair for order in ORDERS for pair in pairwise(order)]
    assert len(set(pairs)) == len(pairs) == 12


def test_what_happens_every_few_steps_is_in_every_time_of_a_step() -> None:
    assert step_seconds(([1.0] * 7 + [9.0]) * 2) == [2.0, 2.0]
    assert step_seconds([*[1.0] * 8, 700.0]) == [1.0]  # too few to count with the others
    assert step_seconds([2.0, 4.0]) == [3.0]
