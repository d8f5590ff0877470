"""What the compiled step changes of logits: calls against transformers in float32, none of which leaves the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shapes import LEFT

from fastllama import GenerationConfig
from fastllama.causal_lm import engine_of
from fastllama.engine.row import MAX_BIAS_TOKENS, MAX_BIASES, NO_CHANGES
from fastllama.generation.request import requests_of

PLAIN = {"max_new_tokens": 9, "pad_token_id": 0}
INFINITY = float("inf")


@pytest.fixture
def step_alone(monkeypatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the call left the step")

    monkeypatch.setattr("fastllama.causal_lm.generate_outside", refused)


def likely(pair, ids) -> list[list[int]]:
    """What greedy decoding gives where nothing is asked for."""
    return pair[0].generate(ids, **PLAIN)[:, ids.shape[1] :].tolist()


CALLS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
    {"suppress_tokens": list(range(20, 90))},
    {"begin_suppress_tokens": list(range(10, 96))},
    {"bad_words_ids": [[5], [7, 8], *([token] for token in range(30, 80))]},
    {"sequence_bias": {(5,): 3.0, (9,): -4.0, (0,): 2.0}},
    {"sequence_bias": [[[5], 3.0], [[5, 5], -INFINITY]]},
    {"forced_eos_token_id": 6, "eos_token_id": 6},
    {"forced_eos_token_id": [7], "min_new_tokens": 20, "eos_token_id": 7},
    {"min_new_tokens": 7, "eos_token_id": list(range(96))[::2]},
    {"min_length": 12, "eos_token_id": list(range(96))[::2]},
    {"attention_mask": LEFT, "suppress_tokens": [3], "min_new_tokens": 4, "eos_token_id": [3, 5, 7, 9, 11]},
    {"prefix_allowed_tokens_fn": lambda row, ids: [row + 4, len(ids), 90]},
    {"prefix_allowed_tokens_fn": lambda row, ids: torch.arange(96)[ids[-1] % 7 :: 3], "suppress_tokens": [9, 10, 11]},
    {"eos_token_id": 2**20, "min_new_tokens": 3},
]


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: "+".join(asked))
def test_tokens_equal_transformers(pair, ids, asked, step_alone) -> None:
    ours, theirs = (model.generate(ids, **PLAIN | asked) for model in pair)
    assert ours.tolist() == theirs.tolist()


def test_sequences_that_would_come_do_not(pair, ids, step_alone) -> None:
    (first, second, third, *_), other = likely(pair, ids)
    for asked in (
        {"bad_words_ids": [[first, second], [second, third], other[:3]]},
        {"sequence_bias": {(first, second): -50.0, (other[0],): -INFINITY, tuple(other[:4]): -3.0}},
    ):
        ours, theirs = (model.generate(ids, **PLAIN | asked) for model in pair)
        assert ours.tolist() == theirs.tolist()
        assert ours[:, 7:].tolist() != likely(pair, ids)


def test_a_row_that_is_one_token_long_begins_as_it_is_forced_to(pair, step_alone) -> None:
    one = torch.tensor([[3], [9]])
    for asked in ({"forced_bos_token_id": 33}, {"forced_bos_token_id": 33, "forced_eos_token_id": 4}):
        ours, theirs = (model.generate(one, **PLAIN | asked) for model in pair)
        assert ours.tolist() == theirs.tolist()
        assert ours[:, 1].tolist() == [33, 33]


ROWS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1, "sequence_bias": {(5,): 3.0}},
    {"suppress_tokens": list(range(30, 80)), "presence_penalty": 1.5},
    {"bad_words_ids": [[4], [6, 7]], "frequency_penalty": 0.8, "repetition_penalty": 1.3},
    {"begin_suppress_tokens": list(range(50)), "eos_token_id": list(range(0, 96, 3)), "min_new_tokens": 4},
    {},
]


@pytest.mark.parametrize("kind", ["native", "compiled"])
def test_rows_of_a_batch_may_ask_for_different_things(make_pair, monkeypatch, step_alone, kind) -> None:
    monkeypatch.setenv("FASTLLAMA_CPU_STEP", kind)
    pair = make_pair()
    ids, plain = torch.randint(3, 90, (len(ROWS), 7)), GenerationConfig()
    names = sorted({name for row in ROWS for name in row})
    listed = {name: [row.get(name, getattr(plain, name)) for row in ROWS] for name in names}
    listed["sequence_bias"] = [value or {} for value in listed["sequence_bias"]]
    together = pair[0].generate(ids, **PLAIN | listed)
    compiled = pair[0].engine.compiled_steps
    for at, asked in enumerate(ROWS):
        alone = pair[0].generate(ids[at : at + 1], **PLAIN | asked)[0]
        assert together[at, : len(alone)].tolist() == alone.tolist()
        assert not together[at, len(alone) :].any()
        if not {"presence_penalty", "frequency_penalty"} & asked.keys():
            assert pair[1].generate(ids[at : at + 1], **PLAIN | asked)[0].tolist() == alone.tolist()
    if kind == "compiled":
        rows_of_one = {("decode", 1, 1), ("decode_processed", 1, 1)}
        assert {*pair[0].engine.compiled_steps} == {*compiled} | rows_of_one, "values compile nothing"


def test_a_row_leaves_nothing_to_the_next_one_in_its_slot(pair, ids) -> None:
    free = pair[0].generate(ids, **PLAIN)
    for asked in ROWS:
        pair[0].generate(ids, **PLAIN | asked)
        assert pair[0].generate(ids, **PLAIN).tolist() == free.tolist()
        assert not engine_of(pair[0])._ready._processed


def test_presence_and_frequency_penalties_are_those_of_a_processor(pair, ids) -> None:
    for asked in ({"presence_penalty": -50.0}, {"frequency_penalty": -20.0, "repetition_penalty": 1.2}):
        plain = pair[0].generate(ids, **PLAIN | asked)
        stopped = pair[0].generate(
            ids, stopping_criteria=[lambda ids, _: torch.zeros(len(ids)).bool()], **PLAIN | asked
        )
        assert plain.tolist() == stopped.tolist() != pair[0].generate(ids, **PLAIN).tolist()


def test_pads_beyond_the_vocabulary_count_as_no_token(pair, ids) -> None:
    ends = likely(pair, ids)[0][1]
    asked = {"frequency_penalty": 2.0, "eos_token_id": ends, **PLAIN, "pad_token_id": 200}
    plain = pair[0].generate(ids, **asked)
    assert pair[0].generate(ids, max_time=60.0, **asked).tolist() == plain.tolist()


def test_a_token_mask_follows_each_row(pair, ids) -> None:
    seen: list[tuple[int, list[int]]] = []

    def third(row: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        seen.append((row, tokens.tolist()))
        mask &= 0x11111111 if len(tokens) % 2 else 0x22222222  # every fourth token, from 0 or from 1 on

    out = pair[0].generate(ids, token_mask=third, bad_words_ids=[[4], [5]], **PLAIN)
    assert (out[:, 7:] % 4).tolist() == [[0, 1] * 4 + [0]] * 2
    assert not {4, 5} & {*out[:, 7:].flatten().tolist()}
    assert [row for row, _ in seen] == [0, 1] * 9
    assert [tokens for row, tokens in seen if row == 1] == [out[1, :end].tolist() for end in range(7, 16)]
    beams = pair[0].generate(ids, token_mask=third, num_beams=2, **PLAIN)
    assert (beams[:, 7:] % 4).tolist() == [[0, 1] * 4 + [0]] * 2


def test_token_masks_and_bans_count_together(pair, ids) -> None:
    def only(row: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        mask.zero_()
        mask[0] = 0b111000

    for asked in ({"suppress_tokens": [3]}, {"bad_words_ids": [[3]]}, {"prefix_allowed_tokens_fn": lambda *_: [4, 9]}):
        for elsewhere in ({}, {"max_time": 60.0}):
            out = pair[0].generate(ids, token_mask=only, **PLAIN, **asked, **elsewhere)
            assert {*out[:, 7:].flatten().tolist()} <= {4, 5}
    with pytest.raises(ValueError, match="no token may follow in row 0"):
        pair[0].generate(ids, token_mask=only, suppress_tokens=[3, 4, 5], **PLAIN)
    for elsewhere in ({}, {"max_time": 60.0}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="no token may follow in row 0"):
            pair[0].generate(ids, token_mask=lambda row, tokens, mask: mask.zero_(), **PLAIN, **elsewhere)
    with pytest.raises(TypeError, match="token_mask is 5; expected one function"):
        pair[0].generate(ids, token_mask=5, **PLAIN)


@pytest.mark.parametrize("elsewhere", [{}, {"max_time": 60.0}])
def test_rows_that_have_ended_are_not_asked_about(pair, ids, elsewhere) -> None:
    ends, asked = likely(pair, ids)[0][1], []

    def fill(row: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        asked.append(row)

    out = pair[0].generate(ids, token_mask=fill, eos_token_id=ends, **PLAIN, **elsewhere)
    first = out[0, 7:].tolist().index(ends)
    assert asked.count(0) == first + 1


def test_what_fills_a_mask_may_raise(pair, ids) -> None:
    expected = likely(pair, ids)
    with pytest.raises(ValueError, match="no token for row 1"):
        pair[0].generate(ids, prefix_allowed_tokens_fn=lambda row, ids: [] if row and len(ids) > 8 else [3], **PLAIN)
    with pytest.raises(ValueError, match="token id 96, outside the vocabulary of 96"):
        pair[0].generate(ids, prefix_allowed_tokens_fn=lambda row, ids: [96], **PLAIN)
    assert likely(pair, ids) == expected


def test_padding_is_no_part_of_sequences(pair, ids, step_alone) -> None:
    asked = {"no_repeat_ngram_size": 1, "bad_words_ids": [[3, 4]], **PLAIN}
    out = pair[0].generate(ids, attention_mask=LEFT, **asked)
    for at, row in enumerate(ids):
        alone = pair[0].generate(row[LEFT[at] == 1][None], **asked)[0]
        assert out[at, 7:].tolist() == alone[int(LEFT[at].sum()) :].tolist()


@pytest.mark.parametrize(
    "asked",
    [
        {"no_repeat_ngram_size": 17},
        {"bad_words_ids": [list(range(MAX_BIAS_TOKENS + 1))]},
        {"sequence_bias": {(token, other): 1.0 for token in range(23) for other in range(23)}},
        {"forced_eos_token_id": [3, 4]},
        {"forced_bos_token_id": 3, "begin_suppress_tokens": [5]},
        {"min_new_tokens": 2, "eos_token_id": list(range(MAX_BIASES + 1))},
    ],
    ids=lambda asked: "+".join(asked),
)
def test_what_does_not_fit_in_the_step_is_done_outside(pair, ids, asked, monkeypatch) -> None:
    def noted(*args: Any) -> str:
        return "outside"

    with monkeypatch.context() as patch:
        patch.setattr("fastllama.causal_lm.generate_outside", noted)
        assert pair[0].generate(ids, **PLAIN | asked) == "outside"
    if "eos_token_id" not in asked:
        ours, theirs = (model.generate(ids, **PLAIN | asked) for model in pair)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bad_words_ids": [[96]]}, "token id 96, outside the vocabulary of 96"),
        ({"sequence_bias": {(3, 200): 1.0}}, "token id 200"),
        ({"sequence_bias": {(3,): INFINITY}}, "numbers below infinity"),
        ({"sequence_bias": {(): 1.0}}, "none of them empty"),
        ({"sequence_bias": [3, 4]}, "sequence_bias is"),
        ({"bad_words_ids": [3]}, "a list of lists of token ids"),
        ({"suppress_tokens": [-2]}, "suppress_tokens is -2"),
        ({"suppress_tokens": 5}, "a list of token ids"),
        ({"forced_eos_token_id": 300}, "token id 300"),
        ({"forced_eos_token_id": 7, "suppress_tokens": [7]}, "token 7 is forced, and in suppress_tokens"),
        ({"presence_penalty": 1000, "num_beams": 2}, "presence_penalty is 1000"),
        ({"presence_penalty": 200}, "presence_penalty is 200"),
        ({"no_repeat_ngram_size": [1, 2, 3]}, "3 values for 2 prompts"),
    ],
    ids=str,
)
def test_wrong_values_are_named(pair, ids, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        pair[0].generate(ids, **PLAIN | asked)


def test_lists_that_nobody_does_are_named(pair, ids) -> None:
    with pytest.raises(NotImplementedError, match="eta_cutoff by prompt is not done"):
        pair[0].generate(ids, do_sample=True, eta_cutoff=[0.1, 0.2], **PLAIN)
    with pytest.raises(
        NotImplementedError, match="top_k by prompt is done by the compiled step, which does not do num_beams"
    ):
        pair[0].generate(ids, do_sample=True, top_k=[1, 2], num_beams=2, **PLAIN)


def test_values_may_come_as_tensors_arrays_and_tuples(pair, ids) -> None:
    for name, plain, others in (
        ("begin_suppress_tokens", [5, 6], (torch.tensor([5, 6]), np.array([5, 6]), (5, 6), {5, 6}, range(5, 7))),
        ("suppress_tokens", [5, 6], (torch.tensor([5, 6]), [np.int64(5), torch.tensor(6)], [5, -1, 6])),
        ("bad_words_ids", [[5, 6]], (torch.tensor([[5, 6]]), ((5, 6),))),
        ("forced_eos_token_id", [5], (torch.tensor([5]), np.array([5]), 5)),
        ("no_repeat_ngram_size", 2, (torch.tensor(2), np.int64(2))),
        ("repetition_penalty", 2.0, (2, torch.tensor(2.0))),
        ("sequence_bias", {(0,): 3.0}, ([[[0], 3.0]], {(0,): 3})),
    ):
        expected = requests_of(ids, None, GenerationConfig(), {name: plain}, 96)[0]
        loop = pair[0].generate(ids, max_time=60.0, **PLAIN, **{name: plain}).tolist()
        for other in others:
            assert requests_of(ids, None, GenerationConfig(), {name: other}, 96)[0].changes == expected.changes
            assert pair[0].generate(ids, **PLAIN, **{name: other}).tolist() == loop
            assert pair[0].generate(ids, max_time=60.0, **PLAIN, **{name: other}).tolist() == loop


@pytest.mark.parametrize(
    ("name", "listed", "each"),
    [
        ("forced_eos_token_id", [[5], [6]], (5, 6)),
        ("forced_eos_token_id", [None, 6], (None, 6)),
        ("suppress_tokens", [None, None], (None, None)),
        ("suppress_tokens", torch.tensor([[5], [6]]), ([5], [6])),
        ("bad_words_ids", [[], []], (None, None)),
        ("bad_words_ids", [[[5]], None], ([[5]], None)),
        ("sequence_bias", [[[[5], 1.0]], [[[6, 7], 2.0], [[8], 1.0]]], ([[[5], 1.0]], {(6, 7): 2.0, (8,): 1.0})),
        ("eos_token_id", [[5, 6], None], ([5, 6], None)),
        ("no_repeat_ngram_size", np.array([2, 3]), (2, 3)),
    ],
    ids=str,
)
def test_a_list_has_a_value_for_each_prompt(ids, name, listed, each) -> None:
    together = requests_of(ids, None, GenerationConfig(), {name: listed}, 96)
    for at, value in enumerate(each):
        alone = requests_of(ids[at : at + 1], None, GenerationConfig(), {name: value}, 96)[0]
        assert (together[at].changes, together[at].eos_token_ids) == (alone.changes, alone.eos_token_ids)
        assert (together[at].allowed is None) == (alone.allowed is None)


def test_a_config_says_the_same_as_a_call(ids) -> None:
    asked = {"sequence_bias": {(5,): 3.0}, "suppress_tokens": [4], "no_repeat_ngram_size": 2, "presence_penalty": 0.5}
    config = GenerationConfig(**asked)
    by_call = requests_of(ids, None, GenerationConfig(), asked, 96)
    for again in (config, GenerationConfig.from_dict(config.to_dict())):
        for mine, other in zip(requests_of(ids, None, again, {}, 96), by_call, strict=True):
            assert mine.changes == other.changes != NO_CHANGES
            assert torch.equal(mine.allowed, other.allowed)
    off = requests_of(ids, None, config, dict.fromkeys(asked), 96)[0]
    assert off.changes == NO_CHANGES
    assert off.allowed is None
