"""Sampling against transformers' logits processors, and draws against the distribution they should follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastllama.sampling import (
    SamplingParams,
    candidates_needed,
    row_seeds,
    sample,
    uniform,
    warped_probabilities,
)


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingParams:
    return SamplingParams(
        torch.full((rows,), float(temperature)),
        torch.full((rows,), top_k),
        torch.full((rows,), float(top_p)),
        torch.full((rows,), float(min_p)),
        row_seeds(seed, rows),
    )


def transformers_probabilities(logits, temperature, top_k, top_p, min_p) -> torch.Tensor:
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@settings(deadline=None, max_examples=100)
@given(
    temperature=st.floats(0.05, 5), top_k=st.integers(0, 60), top_p=st.floats(0.01, 1), min_p=st.floats(0, 0.9),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_warping_equals_transformers(temperature, top_k, top_p, min_p, seed) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 3
    top, token = logits.sort(dim=-1, descending=True)
    ours = warped_probabilities(top, params(3, temperature, top_k, top_p, min_p))
    theirs = transformers_probabilities(logits, temperature, min(top_k, 50), top_p, min_p).gather(1, token)
    # A token exactly at the edge of the nucleus may fall on either side by rounding; then so little is at stake.
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_each_row_has_settings_of_its_own() -> None:
    logits = torch.randn(1, 40).expand(3, 40)
    mixed = SamplingParams(
        torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0, 5, 0]), torch.tensor([0.5, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.2]), torch.zeros(3, dtype=torch.long),
    )  # fmt: skip
    top = logits.sort(dim=-1, descending=True).values
    together = warped_probabilities(top, mixed)
    for row in range(3):
        alone = SamplingParams(*(x[row : row + 1] for x in mixed))
        torch.testing.assert_close(together[row : row + 1], warped_probabilities(top[row : row + 1], alone))


@pytest.mark.parametrize("candidates", [16, 64])
def test_draws_follow_the_distribution(candidates) -> None:
    draws, top_k = 40_000, 10
    logits = torch.randn(64) * 2
    settings_b = params(draws, temperature=0.8, top_k=top_k)
    tokens = sample(logits.expand(draws, 64), settings_b, torch.arange(draws), candidates)
    expected = transformers_probabilities(logits[None], 0.8, top_k, 1.0, 0.0)[0] * draws
    counts = torch.bincount(tokens, minlength=64)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = ((counts - expected).square()[live] / expected[live]).sum()
    assert chi_square < 33.7  # 9 degrees of freedom, one in ten thousand; the seed is fixed


def test_candidates_beyond_top_k_change_nothing() -> None:
    logits, position = torch.randn(5, 200), torch.arange(5)
    settings_b = params(5, top_k=20, seed=7)
    few, all_of_them = (sample(logits, settings_b, position, n) for n in (64, 200))
    assert torch.equal(few, all_of_them)


def test_greedy_takes_the_most_likely_token_also_beside_sampled_rows() -> None:
    logits = torch.randn(4, 100)
    greedy = params(4, temperature=0.0)
    for candidates in (1, 64, 100):
        assert torch.equal(sample(logits, greedy, torch.arange(4), candidates), logits.argmax(-1))


def test_a_draw_depends_on_seed_and_position_not_on_the_batch() -> None:
    logits = torch.randn(1, 100).expand(8, 100)
    position = torch.full((8,), 5)
    whole = sample(logits, params(8, seed=3), position, 100)
    assert torch.equal(sample(logits[:2], params(2, seed=3), position[:2], 100), whole[:2])
    assert len(set(whole.tolist())) > 1
    assert not torch.equal(sample(logits, params(8, seed=4), position, 100), whole)
    assert not torch.equal(sample(logits, params(8, seed=3), position + 1, 100), whole)


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    position = torch.arange(100_000)
    for seed in (0, 1, 2**62, -1):
        u = uniform(torch.tensor(seed), position)
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(u.mean() - 0.5) < 0.005
        assert abs(u.var() - 1 / 12) < 0.002
        assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("temperature", "top_k", "needed"),
    [(0, 50, 1), (1, 50, 64), (1, 64, 64), (1, 65, 1024), (1, 1025, 32000), (0.5, 0, 32000)],
)
def test_few_candidates_are_looked_at_where_they_suffice(temperature, top_k, needed) -> None:
    assert candidates_needed(temperature, top_k, 32000) == needed


def test_candidates_never_exceed_the_vocabulary() -> None:
    assert candidates_needed(1, 50, 40) == 40
