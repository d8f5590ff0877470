"""What changes logits: the reference, the C++ kernel and the n-grams in Triton against Python and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from fastllama_kernels.common import build
from fastllama_kernels.sampling import ngrams
from fastllama_kernels.sampling.processing import (
    MAX_NGRAM,
    Processing,
    allowed_by,
    ban_ngrams_ref,
    processed_ref,
    token_mask,
    words,
)

VOCABULARY, SLOTS, BIASES, LENGTH = 70, 40, 6, 4  # the last word of a mask has bits that belong to no token
INFINITY = float("inf")
Process = Callable[..., torch.Tensor]


def plain(rows: int) -> Processing:
    """What changes nothing."""
    return Processing(
        repetition_penalty=torch.ones(rows),
        presence_penalty=torch.zeros(rows),
        frequency_penalty=torch.zeros(rows),
        no_repeat_ngram_size=torch.zeros(rows, dtype=torch.long),
        forced_first=torch.full((rows,), -1),
        forced_last=torch.full((rows,), -1),
        bias_tokens=torch.full((rows, BIASES, LENGTH), -1),
        bias_values=torch.zeros(rows, BIASES),
        bias_until=torch.zeros(rows, BIASES, dtype=torch.long),
        allowed=torch.full((rows, words(VOCABULARY)), -1, dtype=torch.int32),
        tokens=torch.zeros(rows, SLOTS, dtype=torch.long),
        counts=torch.zeros(rows, VOCABULARY, dtype=torch.int32),
    )


@pytest.fixture(params=["reference", "C++"], scope="module")
def process(request: pytest.FixtureRequest) -> Process:
    def in_cpp(*args: Any) -> torch.Tensor:
        return torch.ops.fastllama.processed(*args)

    if request.param == "C++" and (reason := build.load()):
        pytest.skip(reason)
    return {"reference": processed_ref, "C++": in_cpp}[request.param]


def state_of(positions: list[int], steps: list[int], limits: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.tensor, (positions, steps, limits)))


token = st.integers(0, 11)  # few, so that they come again
sequences = st.lists(st.lists(token, min_size=1, max_size=LENGTH).map(tuple), max_size=4, unique=True)
row_of = st.fixed_dictionaries(
    {
        "prompt": st.lists(token, min_size=1, max_size=15),
        "new": st.lists(token, max_size=15),
        "penalty": st.sampled_from([1.0, 0.5, 1.7]),
        "ngram": st.integers(0, 4) | st.just(MAX_NGRAM),
        "biases": sequences,
        "banned": sequences,
        "kept_back": st.lists(token, max_size=2, unique=True),
        "min_new": st.integers(0, 12),
        "suppressed": st.lists(st.integers(0, VOCABULARY - 1), max_size=9),
        "left": st.integers(1, 3),
        "last": st.none() | token,
    }
)


def with_one_before(processor):
    """A processor of sequences that sees one more token: transformers asked for one too many until 5.24."""
    return lambda ids, scores: processor(torch.nn.functional.pad(ids, (1, 0), value=VOCABULARY - 1), scores)


def by_transformers(row: dict, logits: torch.Tensor) -> torch.Tensor:
    """The same of one row, by transformers' processors."""
    ids = torch.tensor([row["prompt"] + row["new"]])
    limit = ids.shape[1] + row["left"]
    values = {tokens: float(number - 2) for number, tokens in enumerate(row["biases"])}
    steps = [
        with_one_before(theirs.SequenceBiasLogitsProcessor(values)) if values else None,
        theirs.RepetitionPenaltyLogitsProcessor(row["penalty"]),
        theirs.NoRepeatNGramLogitsProcessor(row["ngram"]) if row["ngram"] else None,
        with_one_before(theirs.NoBadWordsLogitsProcessor([list(tokens) for tokens in row["banned"]]))
        if row["banned"]
        else None,
        theirs.MinNewTokensLengthLogitsProcessor(len(row["prompt"]), row["min_new"], row["kept_back"])
        if row["kept_back"]
        else None,
        theirs.SuppressTokensLogitsProcessor(row["suppressed"]) if row["suppressed"] else None,
        None if row["last"] is None else theirs.ForcedEOSTokenLogitsProcessor(limit, row["last"]),
    ]
    scores = logits[None].float().clone()
    for step in filter(None, steps):
        scores = step(ids, scores)
    return scores[0]


def fill(processing: Processing, at: int, row: dict) -> None:
    """Set what a row asks for."""
    biases = [(tokens, float(number - 2), 2**60) for number, tokens in enumerate(row["biases"])]
    biases += [(tokens, -INFINITY, 2**60) for tokens in row["banned"]]
    biases += [((eos,), -INFINITY, row["min_new"]) for eos in row["kept_back"]]
    for entry, (tokens, value, until) in enumerate(biases):
        processing.bias_tokens[at, entry, -len(tokens) :] = torch.tensor(tokens)
        processing.bias_values[at, entry], processing.bias_until[at, entry] = value, until
    processing.repetition_penalty[at] = row["penalty"]
    processing.no_repeat_ngram_size[at] = row["ngram"]
    processing.forced_last[at] = -1 if row["last"] is None else row["last"]
    processing.allowed[at] = ~token_mask(torch.tensor(row["suppressed"], dtype=torch.long), VOCABULARY)
    tokens = torch.tensor(row["prompt"] + row["new"])
    processing.tokens[at, : len(tokens)] = tokens
    processing.counts[at, torch.tensor(row["prompt"])] = 1
    processing.counts[at] += 2 * torch.bincount(torch.tensor(row["new"], dtype=torch.long), minlength=VOCABULARY).int()


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(row_of, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_rows_equal_what_processors_of_transformers_make_of_them(process, rows, dtype, seed) -> None:
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(dtype)
    processing = plain(len(rows))._replace(
        bias_tokens=torch.full((len(rows), 10, LENGTH), -1),
        bias_values=torch.zeros(len(rows), 10),
        bias_until=torch.zeros(len(rows), 10, dtype=torch.long),
    )
    for at, row in enumerate(rows):
        fill(processing, at, row)
    lengths = [len(row["prompt"]) + len(row["new"]) for row in rows]
    steps = [len(row["new"]) for row in rows]
    limits = [step + row["left"] + (step == 0) for step, row in zip(steps, rows, strict=True)]
    rows = [row | {"left": limit - step} for row, limit, step in zip(rows, limits, steps, strict=True)]
    found = process(logits, [*processing], *state_of([length - 1 for length in lengths], steps, limits))
    assert found.dtype == torch.float32
    for at, row in enumerate(rows):
        expected = by_transformers(row, logits[at])
        if processing.forced_last[at] >= 0 and limits[at] - steps[at] == 1:
            expected = torch.full_like(expected, -INFINITY)  # there, a suppressed token is not forced
            expected[processing.forced_last[at]] = 0
        torch.testing.assert_close(found[at], expected, rtol=1e-6, atol=1e-6)


def test_presence_and_frequency_count_new_tokens(process) -> None:
    processing, logits = plain(1), torch.randn(1, VOCABULARY)
    processing.presence_penalty[0], processing.frequency_penalty[0] = 0.7, 0.25
    processing.counts[0, :4] = torch.tensor([1, 2, 7, 0], dtype=torch.int32)  # prompt; once; prompt and thrice; never
    found = process(logits, [*processing], *state_of([8], [5], [9]))
    expected = logits.clone()
    expected[0, 1] -= 0.7 + 0.25
    expected[0, 2] -= 0.7 + 3 * 0.25
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("step", "limit", "winner"), [(0, 5, 3), (1, 5, None), (4, 5, 6), (0, 1, 6)])
def test_forced_tokens_come_first_or_last(process, step, limit, winner) -> None:
    processing, logits = plain(2), torch.randn(2, VOCABULARY)
    processing.forced_first[0], processing.forced_last[0] = 3, 6
    found = process(logits, [*processing], *state_of([8, 8], [step] * 2, [limit] * 2))
    assert torch.equal(found[1], logits[1])
    if winner is None:
        assert torch.equal(found[0], logits[0])
    else:
        assert found[0].argmax() == winner
        assert found[0].isfinite().sum() == 1


def test_rows_that_ask_for_nothing_stay_as_they_are(process) -> None:
    logits = torch.randn(2, VOCABULARY).bfloat16()
    found = process(logits, [*plain(2)], *state_of([3, 4], [0, 1], [5, 6]))
    assert torch.equal(found, logits.float())
    assert found.data_ptr() != logits.data_ptr()


@given(st.sets(st.integers(0, VOCABULARY - 1)))
def test_a_token_mask_has_the_bits_of_its_tokens(tokens) -> None:
    mask = token_mask(torch.tensor([*tokens, *tokens], dtype=torch.long), VOCABULARY)
    assert mask.dtype == torch.int32
    assert {i for i in range(VOCABULARY) if int(mask[i // 32]) >> (i % 32) & 1} == tokens
    assert set(allowed_by(mask, VOCABULARY).nonzero().flatten().tolist()) == tokens
    assert set(allowed_by(~mask, VOCABULARY).nonzero().flatten().tolist()) == {*range(VOCABULARY)} - tokens


@pytest.mark.triton
@pytest.mark.parametrize("slots", [40, ngrams.BLOCK + 300])
def test_ngrams_in_triton_equal_the_reference(device, slots) -> None:
    sizes = torch.tensor([0, 1, 2, 3, 5, MAX_NGRAM])
    rows = len(sizes)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 4, (rows, slots), generator=generator)
        tokens[-1] = torch.arange(slots) % 5
        positions = torch.randint(slots // 2, slots, (rows,), generator=generator)
        logits = torch.zeros(rows, VOCABULARY)
        expected = logits.clone()
        ban_ngrams_ref(expected, tokens, sizes, positions)
        found = logits.to(device)
        ngrams.ban_ngrams(found, *(x.to(device) for x in (tokens, sizes, positions)))
        assert torch.equal(found.cpu(), expected)
        assert expected[0].isfinite().all()
        assert (expected[1:3] == -INFINITY).any(dim=1).all()
