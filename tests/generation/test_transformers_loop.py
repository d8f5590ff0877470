"""transformers' loops over the engine: its logits, not those of the eager forward, and the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import LEFT
from transformers import LogitsProcessorList

from fastllama import StaticCache
from fastllama.integrations.transformers import accelerate, unaccelerate
from fastllama.model.cache import CacheOverflowError
from fastllama.model.llama import Llama

PLAIN = {"max_new_tokens": 6, "pad_token_id": 0}


def plus_one(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor: what follows the last token in the vocabulary is likelier."""
    return scores.scatter_add(1, (ids[:, -1:] + 1) % scores.shape[1], torch.full((len(ids), 1), 5.0))


CALLS: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [41, 42]},
    {"num_beams": 2, "do_sample": True, "no_repeat_ngram_size": 2, "suppress_tokens": [3]},
    {"logits_processor": LogitsProcessorList([plus_one]), "eos_token_id": 7},
    {"epsilon_cutoff": 0.01, "typical_p": 0.9, "do_sample": True, "num_return_sequences": 3},
    {"attention_mask": LEFT, "encoder_repetition_penalty": 1.3, "suppress_tokens": [3, 4]},
    {"attention_mask": LEFT, "num_beams": 4, "repetition_penalty": 1.3},
    {"max_time": 60.0, "cache_implementation": "static", "use_cache": False},
]


@pytest.fixture
def eager_is_refused(monkeypatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the eager forward was called")

    monkeypatch.setattr(Llama, "forward", refused)


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: "+".join(asked))
def test_the_engine_gives_the_logits(pair, ids, asked, eager_is_refused) -> None:
    results = []
    for model in pair:
        torch.manual_seed(3)
        results.append(model.generate(ids, **PLAIN | asked).tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: "+".join(asked))
def test_the_engine_gives_an_accelerated_model_its_logits(make_pair, ids, asked, monkeypatch) -> None:
    theirs = make_pair()[1]
    calls, forward = [], theirs.model.forward
    torch.manual_seed(3)
    expected = theirs.generate(ids, **PLAIN | asked).tolist()
    fast = accelerate(theirs)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(theirs.model), "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
        )
        patch.setattr("fastllama.integrations.transformers.check_as_described", lambda model: None)
        assert fast.generate(ids, **PLAIN | asked).tolist() == expected
    assert not calls
    assert unaccelerate(fast).generate(ids, **PLAIN).shape == (2, 13)


@pytest.mark.parametrize("mask", [None, LEFT])
def test_the_result_has_the_cache_that_it_would_have(pair, ids, mask) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "attention_mask": mask, **PLAIN}
    ours, theirs = (model.generate(ids, **asked) for model in pair)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    kept = torch.ones(2, ids.shape[1] + 5, dtype=torch.bool)
    kept[:, : ids.shape[1]] = LEFT.bool() if mask is not None else True
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == kept.shape[1]
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            pairs = [getattr(layer, name).transpose(1, 2)[kept] for layer in (mine, other)]
            torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)


def test_the_cache_of_several_sequences_of_padded_prompts_is_returned(pair, ids) -> None:
    asked = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2, "attention_mask": LEFT, **PLAIN}
    done = pair[0].generate(ids, return_dict_in_generate=True, **asked)
    assert done.sequences.shape == (4, 13)
    assert done.past_key_values.get_seq_length() == 12
    assert pair[0].generate(ids, return_dict_in_generate=True, num_beams=2, **PLAIN).past_key_values is None


def test_right_padded_rows_equal_single_rows(pair, ids) -> None:
    ours, mask = pair[0], LEFT.flip(1)
    asked = {"encoder_no_repeat_ngram_size": 2, **PLAIN}
    together = ours.generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :]
    for row, new in enumerate(together):
        prompt = ids[row][mask[row] == 1][None]
        assert ours.generate(prompt, **asked)[0, prompt.shape[1] :].tolist() == new.tolist()


def test_a_processor_may_decode_with_the_same_model(pair, ids) -> None:
    ours = pair[0]
    seen = []

    def asks(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ours.generate(ids.flip(1), **PLAIN).tolist())
        return scores

    expected, inner = ours.generate(ids, **PLAIN).tolist(), ours.generate(ids.flip(1), **PLAIN).tolist()
    assert ours.generate(ids, logits_processor=[asks], **PLAIN).tolist() == expected
    assert seen == [inner] * 6


# ---- a cache of the caller's, in the step --------------------------------------------------------------------------


def test_a_static_cache_goes_from_turn_to_turn_in_the_step(pair, ids, eager_is_refused) -> None:
    ours, theirs = pair
    cache = StaticCache(ours.config, 2, 40)
    text = ids
    for turn in range(3):
        text = torch.cat((text, torch.randint(1, 96, (2, 2 + turn))), dim=1)
        everything = {"attention_mask": torch.ones_like(text)}
        expected = theirs.generate(text, **everything, **PLAIN)
        assert ours.generate(text, past_key_values=cache, **everything, **PLAIN).tolist() == expected.tolist()
        assert cache.get_seq_length() == expected.shape[1] - 1
        text = expected


@pytest.mark.parametrize("reuses", [False, True])
def test_what_a_cache_holds_counts_as_in_transformers(make_pair, ids, reuses) -> None:
    ours, theirs = make_pair()
    ours.prefix_caching = reuses
    cache, everything = StaticCache(ours.config, 2, 40), {"attention_mask": torch.ones(2, 13)}
    text = ours.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **PLAIN)
    cache.crop(9)
    edited = text.clone()
    edited[:, 10:] = edited[:, 10:].flip(1)
    expected = theirs.generate(edited, **everything, **PLAIN).tolist()
    assert ours.generate(edited, past_key_values=cache, **everything, **PLAIN).tolist() == expected
    cache.crop(9)
    cache.reorder_cache(torch.tensor([1, 0]))
    expected = theirs.generate(text.flip(0), **everything, **PLAIN).tolist()
    assert ours.generate(text.flip(0), cache=cache, **everything, **PLAIN).tolist() == expected
    cache.reset()
    assert ours.generate(text, past_key_values=cache, **everything, **PLAIN)[:, :13].tolist() == text.tolist()


def test_what_a_callers_cache_held_is_not_taken_for_the_engines_own(make_pair, ids) -> None:
    ours, theirs = make_pair()
    text = torch.randint(1, 96, (2, 30))
    everything, cache = {"attention_mask": torch.ones_like(text)}, StaticCache(ours.config, 2, 60)
    ours.generate(text, past_key_values=cache, **everything, **PLAIN)
    other = (text + 1) % 95 + 1  # whose beginning is not what the cache holds
    ours.generate(other, past_key_values=cache, attention_mask=torch.ones_like(other), **PLAIN)
    expected = theirs.generate(other, attention_mask=torch.ones_like(other), **PLAIN)
    assert ours.generate(other, attention_mask=torch.ones_like(other), **PLAIN).tolist() == expected.tolist()


@pytest.mark.parametrize("hides_padding", [True, False])
def test_rows_that_ended_early_go_on_in_the_next_turn(pair, ids, hides_padding) -> None:
    ours, theirs = pair
    free = theirs.generate(ids, **PLAIN)
    eos = int(free[0, 9])
    cache = StaticCache(ours.config, 2, 60)
    text = ours.generate(ids, past_key_values=cache, eos_token_id=eos, attention_mask=torch.ones_like(ids), **PLAIN)
    assert (text[:, 7:] == 0).any(), "a row that has ended"
    turn = torch.cat((text, torch.randint(1, 96, (2, 3))), dim=1)
    mask = torch.ones_like(turn)
    if hides_padding:
        mask[:, 7 : text.shape[1]] = (text[:, 7:] != 0).long()
    expected = theirs.generate(turn, attention_mask=mask, **PLAIN).tolist()
    assert ours.generate(turn, past_key_values=cache, attention_mask=mask, **PLAIN).tolist() == expected


@pytest.mark.parametrize("asked", [{"return_dict_in_generate": True}, {"encoder_no_repeat_ngram_size": 2}])
def test_a_static_cache_is_used_outside_the_step_too(pair, ids, asked) -> None:
    ours, theirs = pair
    cache, everything = StaticCache(ours.config, 2, 60), {"attention_mask": torch.ones_like(ids)}
    got = ours.generate(ids, past_key_values=cache, **everything, **PLAIN, **asked)
    expected = theirs.generate(ids, **everything, **PLAIN, **asked)
    assert getattr(got, "sequences", got).tolist() == getattr(expected, "sequences", expected).tolist()
    assert cache.get_seq_length() == 12


def test_a_cache_that_holds_all_of_a_prompt_is_no_reason_to_fail(pair, ids) -> None:
    ours = pair[0]
    cache, everything = StaticCache(ours.config, 2, 60), {"attention_mask": torch.ones_like(ids)}
    expected = ours.generate(ids, past_key_values=cache, **everything, **PLAIN).tolist()
    assert ours.generate(ids, past_key_values=cache, **everything, **PLAIN).tolist() == expected


def test_a_cache_may_hold_more_than_the_engine_has_room_for(make_pair) -> None:
    ours, theirs = make_pair()
    ours.warmup(1, 64)
    long, cache = torch.randint(1, 96, (1, 300)), StaticCache(ours.config, 1, 512)
    with torch.no_grad():
        ours(long, past_key_values=cache, use_cache=True)
    prompt = long[:, :20]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **PLAIN).tolist()
    got = ours.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **PLAIN)
    assert got.tolist() == expected
    assert cache.get_seq_length() == 25


def test_a_cache_goes_from_the_step_to_the_forward(pair, ids) -> None:
    ours, cache = pair[0], StaticCache(pair[0].config, 2, 40)
    text = ours.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **PLAIN)
    with torch.no_grad():
        step = ours(text[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        whole = ours(text).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_shape_is_named(pair, ids, make_pair) -> None:
    other = make_pair(num_hidden_layers=3)[0].config
    with pytest.raises(ValueError, match="cache"):
        pair[0].generate(ids, past_key_values=StaticCache(other, 2, 60), **PLAIN)


def test_a_cache_that_is_too_small_is_named_before_anything_is_written(pair, ids) -> None:
    cache = StaticCache(pair[0].config, 2, 11)
    with pytest.raises(CacheOverflowError, match=r"come to 13, .* has 11 slots"):
        pair[0].generate(ids, past_key_values=cache, **PLAIN)
    assert cache.get_seq_length() == 0
