"""What generate() does outside the compiled step, against transformers' generate in float32, argument by argument."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import LEFT
from transformers import LogitsProcessorList, StoppingCriteriaList, WatermarkingConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastllama import GenerationConfig, StaticCache
from fastllama.generation import outside

EOS = 41
SAMPLED = {"do_sample": True, "temperature": 1.7, "top_k": 20}


def both(pair: Any, ids: torch.Tensor | None, **asked: Any) -> tuple[Any, ...]:
    """What fastllama and transformers return, from one state of torch's generator."""
    results = []
    for model in pair:
        torch.manual_seed(3)
        results.append(model.generate(ids, **({"max_new_tokens": 8, "pad_token_id": 0} | asked)))
    return tuple(results)


def shifted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor: every token makes the one after it likelier."""
    return scores.scatter_add(1, (ids[:, -1:] + 1) % scores.shape[1], torch.full((len(ids), 1), 5.0))


def has_five(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A stopping criterion: rows of twelve tokens have ended."""
    return torch.full((len(ids),), ids.shape[1] >= 12)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True, "num_return_sequences": 2, "eos_token_id": EOS},
        {"num_beams": 2, **SAMPLED},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 1.4, "epsilon_cutoff": 0.02, "attention_mask": LEFT, **SAMPLED},
        {"encoder_repetition_penalty": 1.2},
        {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": [30, 31], "begin_suppress_tokens": [8]},
        {"sequence_bias": [[[5], 4.0], [[17, 3], -2.0]]},
        {"forced_bos_token_id": 4, "forced_eos_token_id": 6},
        {"min_new_tokens": 5, "eos_token_id": list(range(96))[::2]},
        {"min_length": 12, "eos_token_id": list(range(96))[::2]},
        {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": EOS},
        {"typical_p": 0.7, "epsilon_cutoff": 0.01, **SAMPLED},
        {"epsilon_cutoff": 0.02, **SAMPLED},
        {"eta_cutoff": 0.02, "min_p": 0.05, "top_p": 0.9, **SAMPLED},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[3, 4], [5, 6]])},
        {"remove_invalid_values": True, "max_time": 60.0},
        {"watermarking_config": WatermarkingConfig(bias=3.0)},
        {"logits_processor": LogitsProcessorList([shifted])},
        {"stopping_criteria": StoppingCriteriaList([has_five])},
        {"prefix_allowed_tokens_fn": lambda row, ids: [row + 4, len(ids), 90]},
        {"max_length": 11, "max_new_tokens": None, "repetition_penalty": 1.1},
        {"eos_token_id": None, "num_beams": 2, "use_cache": False},
    ],
    ids=lambda asked: "+".join(asked)[:40],
)
def test_tokens_equal_transformers(pair, ids, asked) -> None:
    ours, theirs = both(pair, ids, **asked)
    assert ours.tolist() == theirs.tolist()


def test_scores_logits_states_and_attentions_equal_transformers(pair, ids) -> None:
    outputs = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    asked = {"repetition_penalty": 1.2, "renormalize_logits": True, "attention_mask": LEFT, **SAMPLED, **outputs}
    ours, theirs = both(pair, ids, return_dict_in_generate=True, **asked)
    assert type(ours) is type(theirs)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for name in ("hidden_states", "attentions"):
        for step, others in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            for mine, other in zip(step, others, strict=True):
                for kept in ((0, ..., -1, slice(None)), 1):  # of a padded row the last query: padding is anything
                    torch.testing.assert_close(mine[kept], other[kept], rtol=1e-4, atol=1e-5)


def test_embeddings_and_caches_are_taken(pair, ids) -> None:
    asked = {"max_new_tokens": 6, "pad_token_id": 0}
    ours, theirs = (model.generate(inputs_embeds=model.get_input_embeddings()(ids), **asked) for model in pair)
    assert ours.tolist() == theirs.tolist()
    expected = pair[1].generate(ids, **asked).tolist()
    for name, kind in itertools.product(("past_key_values", "cache"), (transformers.DynamicCache, StaticCache)):
        cache = kind() if kind is transformers.DynamicCache else kind(pair[0].config, 2, 20)
        first = pair[0].generate(ids, **{name: cache}, **asked | {"max_new_tokens": 3})
        assert cache.get_seq_length() == ids.shape[1] + 2
        everything = torch.ones_like(first)  # or pad ids among the new tokens would be padding
        rest = {"attention_mask": everything, name: cache, "max_new_tokens": 3, "pad_token_id": 0}
        assert pair[0].generate(first, **rest).tolist() == expected


tokens = st.integers(0, 95)
numbers = st.floats(0.05, 1.0)
arguments = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 7), "do_sample": st.booleans()},
    optional={
        "temperature": st.floats(0.3, 2.0),
        "top_k": st.none() | st.integers(1, 96),
        "top_p": numbers,
        "min_p": st.floats(0.0, 0.4),
        "typical_p": numbers,
        "epsilon_cutoff": st.floats(0.001, 0.3),
        "eta_cutoff": st.floats(0.001, 0.3),
        "repetition_penalty": st.floats(0.6, 1.9),
        "no_repeat_ngram_size": st.integers(0, 3),
        "num_beams": st.integers(1, 3),
        "length_penalty": st.floats(-1.0, 2.0),
        "early_stopping": st.booleans(),
        "min_new_tokens": st.none() | st.integers(0, 4),
        "min_length": st.integers(0, 14),
        "suppress_tokens": st.lists(tokens, max_size=9),
        "bad_words_ids": st.none() | st.lists(st.lists(tokens, min_size=1, max_size=2), min_size=1, max_size=4),
        "renormalize_logits": st.booleans(),
        "eos_token_id": st.none() | tokens | st.lists(tokens, min_size=1, max_size=40),
    },
)


THRESHOLDS = {"typical_p", "top_p", "min_p", "epsilon_cutoff", "eta_cutoff"}


def replayed(theirs: Any, ids: torch.Tensor, logits: tuple[torch.Tensor, ...], **asked: Any) -> Any:
    """What transformers makes of logits that are given, step by step."""
    twin, steps = copy.copy(theirs), iter(logits)
    twin.__dict__ |= {
        "forward": lambda **_: CausalLMOutputWithPast(logits=next(steps)[:, None]),
        "prepare_inputs_for_generation": lambda ids, **_: {},
    }
    return both((twin,), ids, **asked)[0]


def check_drawn(pair: Any, asked: dict[str, Any], width: int) -> None:
    """Tokens and scores of any such call equal those of transformers, over the eager forward and over the engine.

    The engine's logits may differ in the last bit, and a token at a threshold then lies on its other side. So with
    thresholds its tokens and scores are compared with what transformers makes of the very same logits, and these with
    transformers' forward.
    """
    ids = torch.randint(1, 96, (2, width), generator=torch.Generator().manual_seed(width))
    asked = asked | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "why_not", lambda *_: "the test wants the eager forward")
        ours, theirs = both(pair, ids, **asked)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    (engine,) = both(pair[:1], ids, **asked)
    again = replayed(pair[1], ids, engine.logits, **asked)
    assert engine.sequences.tolist() == again.sequences.tolist()
    for mine, other in zip(engine.scores, again.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    if not THRESHOLDS & asked.keys():
        assert engine.sequences.tolist() == theirs.sequences.tolist()
    if asked.get("num_beams", 1) == 1:
        logits_btv = pair[1](engine.sequences).logits[:, width - 1 : -1].detach()
        for step, mine_bv in enumerate(engine.logits):
            torch.testing.assert_close(mine_bv, logits_btv[:, step], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=arguments, width=st.integers(1, 9))
def test_drawn_calls_equal_transformers(pair, asked, width) -> None:
    check_drawn(pair, asked, width)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=arguments, width=st.integers(1, 9))
def test_many_drawn_calls_equal_transformers(pair, asked, width) -> None:
    check_drawn(pair, asked, width)


def test_a_seed_draws_the_same_and_leaves_torchs_generator_alone(pair, ids) -> None:
    ours, _ = pair
    asked = {"max_new_tokens": 8, "epsilon_cutoff": 0.01, "pad_token_id": 0, **SAMPLED}
    state = torch.random.get_rng_state()
    first = ours.generate(ids, seed=1, **asked)
    assert torch.equal(ours.generate(ids, seed=1, **asked), first)
    assert not torch.equal(ours.generate(ids, seed=2, **asked), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_models_own_config_counts_and_null_in_a_call_is_off(pair, ids) -> None:
    ours, theirs = pair
    config = GenerationConfig(max_new_tokens=16, pad_token_id=0)
    config.repetition_penalty, config.length_penalty = 9.0, 2.0
    expected = theirs.generate(ids, max_new_tokens=16, pad_token_id=0, repetition_penalty=9.0).tolist()
    plain = theirs.generate(ids, max_new_tokens=16, pad_token_id=0).tolist()
    assert ours.generate(ids, generation_config=config).tolist() == expected != plain
    assert ours.generate(ids, generation_config=config, repetition_penalty=None).tolist() == plain


def test_the_log_says_once_what_goes_outside_the_step_and_why_the_forward_is_eager(pair, ids, caplog) -> None:
    outside._say_outside.cache_clear()
    asked = {"max_new_tokens": 2, "encoder_repetition_penalty": 1.1, "pad_token_id": 0}
    with caplog.at_level(logging.INFO, "fastllama"):
        for _ in range(2):
            pair[0].generate(ids, **asked)
            pair[0].generate(ids, output_attentions=True, **asked)
    said = "the compiled step does not do encoder_repetition_penalty: transformers' loop does, "
    assert [record.levelname for record in caplog.records if said in record.message] == ["INFO", "WARNING"]
    assert caplog.text.count(said + "with the engine's logits") == 1
    assert caplog.text.count(said + "over the eager forward, which is slower: output_attentions is given") == 1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1, 2]], TypeError, "input_ids is a list; expected a tensor"),
        (torch.tensor([1, 2]), ValueError, r"input_ids must be integers \[batch, tokens\]"),
        (torch.tensor([[1, 96]]), ValueError, "token id 96, outside the vocabulary of 96"),
    ],
)
def test_bad_ids_are_named_here_too(pair, bad, error, message) -> None:
    with pytest.raises(error, match=message):
        pair[0].generate(bad, num_beams=2, max_new_tokens=2)


def test_without_transformers_the_error_names_what_needs_it(pair, ids, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotImplementedError, match=r"does num_beams=4 with transformers' code.*pip install"):
        pair[0].generate(ids, num_beams=4)
