"""Samples of the reference, the C++ and the Triton kernel: by their definition in float64, and by their shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fastllama_kernels.common import build
from fastllama_kernels.sampling import triton as triton_sample
from fastllama_kernels.sampling.op import SamplingParams, sample_ref, uniform, warped_probabilities

Sample = Callable[[torch.Tensor, SamplingParams, torch.Tensor], torch.Tensor]
SETTINGS = settings(deadline=None, max_examples=100)
EDGE = 2e-5  # of probability: a token this near to the edge of the nucleus may fall on either side


def params_of(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, typical_p=1.0) -> SamplingParams:
    return SamplingParams(
        torch.full((rows,), float(temperature)),
        torch.full((rows,), top_k),
        torch.full((rows,), float(top_p)),
        torch.full((rows,), float(min_p)),
        torch.full((rows,), float(typical_p)),
        torch.arange(seed, seed + rows),
    )


@pytest.fixture(params=["reference", "C++", pytest.param("Triton", marks=pytest.mark.triton)], scope="module")
def sample(request: pytest.FixtureRequest, device: str) -> Sample:
    """An implementation, taking and giving tensors of the CPU."""

    def on_cpu(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastllama.sample(logits, *params, position)

    def in_triton(logits: torch.Tensor, params: SamplingParams, position: torch.Tensor) -> torch.Tensor:
        moved = (x.to(device) for x in params)
        return triton_sample.sample(logits.to(device), *moved, position.to(device)).cpu()

    if request.param == "C++" and (reason := build.load()):
        pytest.skip(reason)
    return {"reference": sample_ref, "C++": on_cpu, "Triton": in_triton}[request.param]


# ---- the definition, in float64 and Python's integers ----------------------------------------------------------------


def splitmix64(state: int) -> int:
    """The generator's finaliser as its authors publish it."""
    bits = 2**64 - 1
    z = state & bits
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
    return z ^ (z >> 31)


def scores(logits_v: torch.Tensor, temperature: float, seed: int, position: int) -> torch.Tensor:
    """What the sampled token has the highest of, float64 ``[v]``, whether or not it is kept."""
    if temperature == 0:
        return logits_v.double()
    golden = 0x9E3779B97F4A7C15
    key = splitmix64(seed + position * golden)
    u = torch.tensor([((splitmix64((key + v) * golden) >> 32) + 0.5) / 2**32 for v in range(len(logits_v))])
    return logits_v.double() / temperature - torch.log(-torch.log1p(-u.double()))


def kept(logits_v: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, edge: float):
    """Which tokens may be sampled, when the edges of nucleus and min-p are moved outwards by ``edge``."""
    scaled_v = logits_v.double() / (temperature or 1.0)
    by_rank_v = scaled_v >= scaled_v.sort(descending=True).values[min(top_k or len(scaled_v), len(scaled_v)) - 1]
    share_v = scaled_v.masked_fill(~by_rank_v, -torch.inf).softmax(0)
    above_v = torch.stack([share_v[scaled_v > x].sum() for x in scaled_v])
    likely_v = share_v >= share_v.max() * (min_p - edge)
    return (by_rank_v & (above_v < top_p + edge) & likely_v) | (scaled_v == scaled_v.max())


@SETTINGS
@given(
    vocab=st.sampled_from([1, 5, 123, 130, 700]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 9, 40, 699, 5000]),
    top_p=st.sampled_from([1e-6, 0.2, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    kind=st.sampled_from(["any", "tied", "equal", "masked"]),
    seed=st.integers(-(2**62), 2**62),
)
def test_the_token_is_the_winner_among_the_kept(
    sample, vocab, dtype, temperature, top_k, top_p, min_p, kind, seed
) -> None:
    rows, generator = 3, torch.Generator().manual_seed(seed % 2**32)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.zeros(rows, vocab)
    elif kind == "masked":
        logits[:, 1::2] = -torch.inf
    logits, position = logits.to(dtype), torch.tensor([0, 77, 2**33])
    params = params_of(rows, temperature, top_k, top_p, min_p, seed)
    for row, token in enumerate(sample(logits, params, position).tolist()):
        logits_v, choice = logits[row], (temperature, top_k, top_p, min_p)
        score_v = scores(logits_v, temperature, seed + row, int(position[row]))
        assert kept(logits_v, *choice, EDGE)[token]
        best = score_v[kept(logits_v, *choice, -EDGE)].max()
        assert score_v[token] >= best - 1e-5 * max(1, abs(best)), "another kept token has a higher score"
        if temperature == 0:
            assert token == score_v.tolist().index(best), "the first of those that tie"


def transformers_probabilities(logits, temperature, top_k, top_p, min_p, typical_p=1.0) -> torch.Tensor:
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@SETTINGS
@given(
    temperature=st.floats(0.05, 5), top_k=st.integers(0, 60), top_p=st.floats(0.01, 1), min_p=st.floats(0, 0.9),
    typical_p=st.just(1.0) | st.floats(0.01, 1), seed=st.integers(0, 999),
)  # fmt: skip
def test_warping_equals_transformers(temperature, top_k, top_p, min_p, typical_p, seed) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 3
    ours = warped_probabilities(logits, params_of(3, temperature, top_k, top_p, min_p, typical_p=typical_p))
    theirs = transformers_probabilities(logits, temperature, min(top_k, 50), top_p, min_p, typical_p)
    # A token exactly at the edge of the nucleus may fall on either side by rounding; then so little is at stake.
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


@SETTINGS
@given(
    temperature=st.floats(0.3, 3), top_k=st.integers(0, 60), top_p=st.just(1.0) | st.floats(0.3, 1),
    min_p=st.just(0.0) | st.floats(0, 0.2), typical_p=st.floats(0.05, 0.999), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_kernel_samples_the_typical_tokens_that_the_reference_samples(
    temperature, top_k, top_p, min_p, typical_p, seed
) -> None:
    if reason := build.load():
        pytest.skip(reason)
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(seed)) * 3
    params, position = params_of(8, temperature, top_k, top_p, min_p, seed, typical_p), torch.arange(8)
    found = torch.ops.fastllama.sample(logits, *params, position)
    expected = sample_ref(logits, params, position)
    edges = [params_of(8, temperature, top_k, top_p + by, min_p, seed, typical_p + by) for by in (-1e-4, 1e-4)]
    for row in (found != expected).nonzero().flatten().tolist():  # at an edge, by rounding
        assert len({int(sample_ref(logits, edge, position)[row]) for edge in edges} | {int(expected[row])}) > 1
    assert (found == expected).sum() >= 6


def test_zero_and_minus_zero_are_equally_likely(sample) -> None:
    logits = torch.tensor([[0.0, -0.0, -3.0, -0.0, 0.0]]).expand(64, 5).contiguous()
    params = params_of(64, 0.05, 0, 1e-6)
    token = sample(logits, params, torch.arange(64))
    assert torch.equal(token, sample_ref(logits.abs() * torch.tensor([1, 1, -1, 1, 1]), params, torch.arange(64)))
    assert set(token.tolist()) == {0, 1, 3, 4}


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (10, 1.0, 0.0), (0, 0.7, 0.0), (20, 0.8, 0.05)])
def test_tokens_are_drawn_with_their_probabilities(top_k, top_p, min_p) -> None:
    draws, vocab = 20_000, 200  # of the reference, which the kernels agree with
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    choice = (0.8, top_k, top_p, min_p)
    token = sample_ref(logits.expand(draws, vocab), params_of(draws, *choice), torch.arange(draws))
    expected = transformers_probabilities(logits[None], *choice)[0] * draws
    counts = torch.bincount(token, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    often = expected > 5  # the rest together, for a chi-square needs some of each
    seen, due = (torch.cat((x[often], x[~often].sum()[None])) for x in (counts, expected))
    degrees = int((due > 0).sum()) - 1
    chi_square = ((seen - due).square()[due > 0] / due[due > 0]).sum()
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations; the seeds are fixed


def test_kernels_draw_what_the_reference_draws_from_a_real_vocabulary(sample) -> None:
    logits = (torch.randn(4, 32003, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    position = torch.arange(4)
    for choice in (
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 0.9, 0.0),
        (1.0, 50, 0.95, 0.0),
        (1.5, 0, 1.0, 0.1),
    ):
        params = params_of(4, *choice)
        assert torch.equal(sample(logits, params, position), sample_ref(logits, params, position))


def test_the_compiled_reference_draws_the_same() -> None:
    logits, params, position = torch.randn(4, 97), params_of(4, 0.8, 20, 0.9), torch.arange(4)
    compiled = torch.compile(sample_ref, fullgraph=True)
    assert torch.equal(compiled(logits, params, position), sample_ref(logits, params, position))


def test_logits_that_are_no_numbers_give_some_token(sample) -> None:
    logits = torch.randn(3, 300)
    logits[0, 7], logits[1], logits[2, 9] = torch.nan, torch.nan, torch.inf
    logits[1, :40] = 0.0  # fewer numbers than the top-k below asks for
    for choice in ((0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1), (1.0, 299, 0.9, 0.0)):
        token = sample(logits, params_of(3, *choice), torch.arange(3))
        assert ((token >= 0) & (token < 300)).all()


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    for seed in (0, 1, 2**62, -1):
        u = uniform(torch.tensor([seed]), torch.tensor([3]), 100_000)[0]
        assert 0 < u.min() < 1e-4
        assert 1 - 1e-4 < u.max() < 1
        assert abs(u.mean() - 0.5) < 0.005
        assert abs(u.var() - 1 / 12) < 0.002
        next_seed, next_position = (
            uniform(torch.tensor([seed + step]), torch.tensor([4 - step]), 100_000)[0] for step in (1, 0)
        )
        for other in (u.roll(1), next_seed, next_position):
            assert abs(torch.corrcoef(torch.stack((u, other)))[0, 1]) < 0.02


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.randn(40, 2).T}, "logits has strides"),
        ({"logits": torch.randn(2, 40, dtype=torch.float64)}, "float64, expected float32, bfloat16 or float16"),
        ({"logits": torch.randn(2, 3, 4)}, "logits has shape"),
        ({"logits": torch.empty(2, 0)}, "no empty one"),
        ({"temperature": torch.ones(3)}, "temperature has shape"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, "top_k is torch.int32, expected torch.int64"),
        ({"position": torch.ones(2)}, "positions is torch.float32"),
    ],
)
def test_triton_refuses_what_it_would_misread(device, change, said) -> None:
    values = {"logits": torch.randn(2, 40), **params_of(2)._asdict(), "position": torch.arange(2)} | change
    with pytest.raises(ValueError, match=said):
        triton_sample.sample(*(x.to(device) for x in values.values()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.randn(40, 2).T}, "logits is strided"),
        ({"logits": torch.randn(2, 40, dtype=torch.float64)}, "expected float32, bfloat16 or float16"),
        ({"logits": torch.randn(2)}, "logits have 1 dimensions"),
        ({"temperature": torch.ones(3)}, "dimension 0 of temperature is 3, expected 2"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, "top_k has dtype number"),
    ],
)
def test_cpp_refuses_what_it_would_misread(change, said) -> None:
    if reason := build.load():
        pytest.skip(reason)
    values = {"logits": torch.randn(2, 40), **params_of(2)._asdict(), "position": torch.arange(2)} | change
    with pytest.raises(RuntimeError, match=said):
        torch.ops.fastllama.sample(*values.values())


def test_schema_and_fake_are_right() -> None:
    if reason := build.load():
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.fastllama.sample.default, (torch.randn(2, 40), *params_of(2), torch.arange(2)))
