"""generate() and stream() against transformers' generate in float32."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from shapes import LEFT

from fastllama import GenerationConfig, LlamaForCausalLM


def theirs_greedy(theirs, ids, new, **kwargs) -> list:
    return theirs.generate(ids, max_new_tokens=new, do_sample=False, **({"pad_token_id": 0} | kwargs)).tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"head_dim": 24, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        {"head_dim": 2, "hidden_act": "quick_gelu", "pretraining_tp": 4},
    ],
    ids=["multi-query", "biases", "own head_dim", "head_dim 2"],
)
def test_greedy_tokens_equal_transformers_over_configurations(overrides, make_pair, ids) -> None:
    ours, theirs = make_pair(**overrides)
    assert ours.generate(ids, max_new_tokens=12).tolist() == theirs_greedy(theirs, ids, 12)


def test_left_padded_batches_equal_transformers(pair, ids) -> None:
    ours, theirs = pair
    out = ours.generate(ids, attention_mask=LEFT, max_new_tokens=12)
    assert out.tolist() == theirs_greedy(theirs, ids, 12, attention_mask=LEFT)


def test_right_padding_and_left_padding_and_none_decode_alike(pair, ids) -> None:
    ours, _ = pair
    short = ids[:1, 3:]
    bare = ours.generate(short, max_new_tokens=8)[0, 4:]
    left = ours.generate(ids, attention_mask=LEFT, max_new_tokens=8)[0, 7:]
    right_ids = torch.cat((short, ids[:1, :3]), dim=1)
    right = ours.generate(right_ids, attention_mask=LEFT[:1].flip(1), max_new_tokens=8)[0, 7:]
    assert bare.tolist() == left.tolist() == right.tolist()


def test_pad_ids_are_padding_when_no_mask_says_otherwise_as_in_transformers(pair, ids) -> None:
    ours, theirs = pair
    padded = ids.masked_fill(LEFT == 0, 0)
    out = ours.generate(padded, max_new_tokens=8, pad_token_id=0).tolist()
    assert out == theirs_greedy(theirs, padded, 8)
    eos_too = ours.generate(padded, max_new_tokens=8, pad_token_id=0, eos_token_id=[0, 95]).tolist()
    assert eos_too == theirs_greedy(theirs, padded, 8, eos_token_id=[0, 95])


@pytest.mark.parametrize("several", [False, True])
def test_stopping_at_eos_equals_transformers(pair, ids, several) -> None:
    ours, theirs = pair
    free = ours.generate(ids, max_new_tokens=10)
    eos = [int(free[0, 9]), int(free[1, 12])] if several else int(free[0, 9])
    out = ours.generate(ids, max_new_tokens=10, eos_token_id=eos, pad_token_id=3)
    assert out.tolist() == theirs_greedy(theirs, ids, 10, eos_token_id=eos, pad_token_id=3)


def test_transformers_own_config_and_empty_arguments_of_its_generate_are_taken(pair, ids) -> None:
    ours, theirs = pair
    config = transformers.GenerationConfig(max_new_tokens=4)
    expected = theirs.generate(ids, generation_config=config, pad_token_id=0).tolist()
    neutral = {"logits_processor": [], "stopping_criteria": [], "synced_gpus": False, "assistant_model": None}
    assert ours.generate(ids, generation_config=config, **neutral).tolist() == expected
    eos = torch.tensor([expected[0][-2]])
    assert ours.generate(ids[:1], max_new_tokens=4, eos_token_id=eos).shape[1] == ids.shape[1] + 3
    with pytest.raises(NotImplementedError, match=r"step does not do logits_processor=\[.*pass logits_processor=\[\]"):
        ours.stream(ids, logits_processor=[print])
    with pytest.raises(TypeError, match="generation_config is a int"):
        ours.generate(ids, generation_config=3)
    with pytest.raises(TypeError, match=r"input_ids is a list; expected a tensor"):
        ours.generate([[1, 2]])


def test_eos_ids_come_from_the_generation_config(pair, ids) -> None:
    ours, _ = pair
    free = ours.generate(ids[:1], max_new_tokens=10)
    config = GenerationConfig(max_new_tokens=10, eos_token_id=(int(free[0, 9]),))
    assert ours.generate(ids[:1], generation_config=config).shape[1] <= 10
    assert ours.generate(ids[:1], generation_config=config, eos_token_id=[]).tolist() == free.tolist()


def test_no_eos_id_in_a_call_is_none_as_in_transformers(pair, ids) -> None:
    ours, theirs = pair
    eos = int(ours.generate(ids, max_new_tokens=3)[0, 9])
    config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    assert ours.generate(ids[:1], max_new_tokens=9, generation_config=config).shape[1] < 16
    free = ours.generate(ids[:1], max_new_tokens=9, generation_config=config, eos_token_id=None)
    assert free.tolist() == theirs_greedy(theirs, ids[:1], 9, eos_token_id=None)


def test_any_number_of_eos_ids_ends_rows_as_in_transformers(pair, ids) -> None:
    ours, theirs = pair
    eos = list(range(20, 96))
    expected = theirs_greedy(theirs, ids, 12, eos_token_id=eos, pad_token_id=3)
    assert ours.generate(ids, max_new_tokens=12, eos_token_id=eos, pad_token_id=3).tolist() == expected
    assert len(expected[0]) < 19


def test_null_in_a_call_is_off_as_in_transformers(pair, ids) -> None:
    ours, theirs = pair
    config = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "pad_token_id": 0}
    expected = theirs_greedy(theirs, ids, 4)
    mine = GenerationConfig(**config, temperature=3.0)
    assert ours.generate(ids, generation_config=mine, do_sample=None).tolist() == expected
    sampled = [ours.generate(ids, generation_config=mine, top_k=None, seed=seed).tolist() for seed in range(4)]
    assert expected not in sampled


def test_a_call_without_ids_begins_with_the_bos_id(make_pair) -> None:
    ours, theirs = make_pair(bos_token_id=7)
    for asked in ({}, {"num_beams": 2}):
        assert ours.generate(max_new_tokens=5, **asked).tolist() == theirs.generate(max_new_tokens=5, **asked).tolist()
    assert torch.equal(ours.generate(inputs=torch.tensor([[7]]), max_new_tokens=5), ours.generate(max_new_tokens=5))
    ids = torch.tensor([[5, 6]])
    assert torch.equal(ours.generate(ids, inputs=None, max_new_tokens=5), ours.generate(ids, max_new_tokens=5))
    with pytest.raises(ValueError, match="got input_ids and inputs"):
        ours.generate(ids, inputs=ids)
    with pytest.raises(ValueError, match="no bos_token_id to begin with"):
        ours.generate(max_new_tokens=5, generation_config=GenerationConfig(bos_token_id=None))


@pytest.mark.parametrize("step", ["native", "compiled"])
@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"repetition_penalty": 1.3, "min_new_tokens": 6, "eos_token_id": [20, 41, 60, 61, 62, 63, 64, 77]},
        {"min_length": 11, "eos_token_id": list(range(60, 76))},
        {"min_length": 12, "min_new_tokens": 3, "eos_token_id": list(range(0, 96, 6)), "attention_mask": LEFT},
    ],
    ids=lambda asked: "+".join(asked),
)
def test_what_changes_logits_in_the_step_equals_transformers(step, asked, pair, ids, request) -> None:
    if step == "compiled":
        request.getfixturevalue("compiled_steps")
    ours, theirs = copy.deepcopy(pair[0]), pair[1]
    mask = {"pad_token_id": 0, "attention_mask": asked.get("attention_mask")}
    plain = theirs_greedy(theirs, ids, 14, **mask)
    expected = theirs_greedy(theirs, ids, 14, **asked)
    for _ in range(2):  # the second call finds what the first one has left in the slots
        assert ours.generate(ids, max_new_tokens=14, pad_token_id=0, **asked).tolist() == expected != plain
    assert ours.generate(ids, max_new_tokens=14, **mask).tolist() == plain


@pytest.mark.parametrize("penalty", [0.5, 1.5])
@pytest.mark.parametrize("filler", [-100, 96, 81])
def test_padding_is_not_penalised(filler, penalty, pair, ids) -> None:
    ours, theirs = pair
    expected = theirs_greedy(theirs, ids[:1, 3:], 12, repetition_penalty=penalty)[0][4:]
    assert ours.generate(ids[:1, 3:], max_new_tokens=12, repetition_penalty=penalty)[0, 4:].tolist() == expected
    filled = ids[:1].masked_fill(LEFT[:1] == 0, filler)
    out = ours.generate(filled, attention_mask=LEFT[:1], max_new_tokens=12, repetition_penalty=penalty)
    assert out[0, 7:].tolist() == expected


def test_the_pad_id_is_the_first_eos_id_when_there_is_none(pair, ids) -> None:
    ours, _ = pair
    free = ours.generate(ids, max_new_tokens=10)
    eos = int(free[0, 7])
    out = ours.generate(ids, max_new_tokens=10, eos_token_id=eos)
    assert set(out[0, 8:].tolist()) <= {eos}


def test_max_length_counts_the_prompt_and_twenty_new_tokens_are_the_default(pair, ids) -> None:
    ours, theirs = pair
    assert ours.generate(ids, max_length=11).shape == (2, 11)
    assert ours.generate(ids).shape == theirs.generate(ids, do_sample=False, pad_token_id=0).shape == (2, 27)
    asked = {"max_length": 12, "do_sample": False, "pad_token_id": 0}
    for new in (3, None):  # of the config, which counts before the call's max_length
        expected = theirs.generate(ids, generation_config=transformers.GenerationConfig(max_new_tokens=new), **asked)
        ours_config = GenerationConfig(max_new_tokens=new)
        assert ours.generate(ids, generation_config=ours_config, max_length=12).shape == expected.shape
    with pytest.raises(ValueError, match="7 tokens and max_length is 7"):
        ours.generate(ids, max_length=7)


def test_sampling_follows_its_seed(pair, ids) -> None:
    ours, _ = pair
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    first = ours.generate(ids, seed=1, **settings)
    assert torch.equal(ours.generate(ids, seed=1, **settings), first)
    assert not torch.equal(ours.generate(ids, seed=2, **settings), first)
    torch.manual_seed(3)
    free = ours.generate(ids, **settings)
    assert not torch.equal(ours.generate(ids, **settings), free)
    torch.manual_seed(3)
    assert torch.equal(ours.generate(ids, **settings), free)


def test_sampled_first_tokens_follow_transformers_distribution(pair, ids) -> None:
    ours, theirs = pair
    draws, settings = 256, {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9}
    with torch.no_grad():
        logits = theirs(ids[:1]).logits[0, -1] / 0.9
    top = logits.topk(12)
    prob = top.values.softmax(-1)
    keep = prob.cumsum(-1) - prob < 0.9
    expected = torch.zeros(96).index_put((top.indices[keep],), prob[keep] / prob[keep].sum()) * draws
    tokens = torch.stack(
        [ours.generate(ids[:1].expand(8, 7), max_new_tokens=1, seed=s, **settings)[:, -1] for s in range(draws // 8)]
    )
    counts = torch.bincount(tokens.flatten(), minlength=96)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = ((counts - expected).square()[live] / expected[live]).sum()
    assert chi_square < 37.4  # 11 degrees of freedom at most, one in ten thousand; the seeds are fixed


def test_top_k_of_one_is_greedy(pair, ids) -> None:
    ours, _ = pair
    sampled = ours.generate(ids, max_new_tokens=6, do_sample=True, top_k=1)
    assert torch.equal(sampled, ours.generate(ids, max_new_tokens=6))


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end(pair, ids) -> None:
    ours, _ = pair
    streamer = Recorder()
    out = ours.generate(ids, max_new_tokens=5, streamer=streamer)
    assert torch.equal(streamer.values[0], ids)
    assert torch.equal(torch.stack(streamer.values[1:], 1), out[:, 7:])
    assert streamer.ended


def test_the_iterator_gives_the_tokens_of_generate(pair, ids) -> None:
    ours, _ = pair
    steps = list(ours.stream(ids, max_new_tokens=5))
    assert all(step.shape == (2,) and step.dtype == torch.long for step in steps)
    assert torch.equal(torch.stack(steps, 1), ours.generate(ids, max_new_tokens=5)[:, 7:])


def test_a_stream_that_is_left_early_lets_the_engine_go(pair, ids) -> None:
    ours, _ = pair
    for _ in ours.stream(ids, max_new_tokens=50):
        break
    assert ours.generate(ids, max_new_tokens=2).shape == (2, 9)


def test_a_streamer_that_fails_lets_the_engine_go(pair, ids) -> None:
    ours, _ = pair

    class Failing(Recorder):
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        ours.generate(ids, max_new_tokens=5, streamer=Failing())
    assert ours.generate(ids, max_new_tokens=2).shape == (2, 9)


def test_32_bit_ids_are_fine(pair, ids) -> None:
    ours, _ = pair
    out = ours.generate(ids.int(), max_new_tokens=3)
    assert out.tolist() == ours.generate(ids, max_new_tokens=3).tolist()


def test_a_text_beyond_the_models_positions_is_warned_about(make_pair, caplog) -> None:
    ours, _ = make_pair(max_position_embeddings=8)
    with caplog.at_level(logging.WARNING, "fastllama"):
        assert ours.generate(torch.randint(1, 96, (1, 6)), max_new_tokens=5).shape == (1, 11)
    assert "11" in caplog.text
    assert "8 positions" in caplog.text


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"num_bears": 4}, TypeError, "does not know num_bears"),
        ({"max_new_token": 4}, TypeError, "does not know max_new_token;"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"attention_mask": torch.ones(2, 6)}, ValueError, r"\(2, 6\), input_ids \(2, 7\)"),
        ({"attention_mask": torch.tensor([[0] * 7, [1] * 7])}, ValueError, "row 0 of attention_mask is all zeros"),
    ],
)
def test_bad_arguments_are_named(pair, ids, args, error, message) -> None:
    with pytest.raises(error, match=message):
        pair[0].generate(ids, **args)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 2), torch.zeros(1, 0, dtype=torch.long)]
)
def test_bad_ids_are_refused(pair, bad) -> None:
    with pytest.raises(ValueError, match=r"input_ids|prompt token"):
        pair[0].generate(bad, max_new_tokens=2)


# ---- rows that differ ----------------------------------------------------------------------------------------------


def test_rows_of_a_call_may_differ_in_every_setting(pair, ids) -> None:
    ours = pair[0]
    by_prompt = {
        "max_new_tokens": [3, 7],
        "do_sample": [True, False],
        "temperature": (0.7, 1.0),
        "top_k": [5, 50],
        "top_p": torch.tensor([0.5, 1.0], dtype=torch.float64),
        "repetition_penalty": [1.0, 1.7],
        "min_new_tokens": [None, 5],
        "eos_token_id": [[41, 42], list(range(50))[:16]],
        "seed": [4, 9],
    }
    together = ours.generate(ids, pad_token_id=0, **by_prompt)
    for row, prompt in enumerate(ids):
        own = {name: values[row] for name, values in by_prompt.items()}
        alone = ours.generate(prompt[None], pad_token_id=0, **own | {"top_p": float(own["top_p"])})[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert not together[row, len(alone) :].any()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"temperature": [0.5, 0.6, 0.7]}, ValueError, "temperature has 3 values for 2 prompts"),
        ({"top_k": [5, -3]}, ValueError, "top_k"),
        ({"seed": [1, 2], "num_beams": 2}, NotImplementedError, "seed by prompt is done by the compiled step"),
        ({"num_return_sequences": 2}, ValueError, "without do_sample all are equal"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences"),
    ],
)
def test_what_cannot_differ_is_named(pair, ids, asked, error, message) -> None:
    with pytest.raises(error, match=message):
        pair[0].generate(ids, max_new_tokens=2, **asked)


def test_several_sequences_of_a_prompt_are_sampled_with_seeds_of_their_own(pair, ids) -> None:
    ours, asked = pair[0], {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0}
    out = ours.generate(ids, num_return_sequences=3, seed=5, **asked)
    assert out.shape == (6, 15)
    assert out[:, :7].tolist() == ids.repeat_interleave(3, dim=0).tolist()
    assert out.tolist() == ours.generate(ids.repeat_interleave(3, dim=0), seed=5, **asked).tolist()
    assert len({tuple(row) for row in out.tolist()}) == 6
    columns = torch.stack(list(ours.stream(ids, num_return_sequences=3, seed=5, **asked)), dim=1)
    assert columns.tolist() == out[:, 7:].tolist()


# ---- configs -------------------------------------------------------------------------------------------------------


def test_what_a_config_does_not_set_is_as_in_the_models_own(make_pair, ids) -> None:
    ours, theirs = make_pair()
    free = theirs.generate(ids, max_new_tokens=6, pad_token_id=0)
    for model in (ours, theirs):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = int(free[0, 9]), 0
        if transformers.__version__ >= "5":  # before it what equals the default counts as not set
            model.generation_config.do_sample = True
    expected = theirs.generate(ids, generation_config=transformers.GenerationConfig(max_new_tokens=6, do_sample=False))
    for config in (GenerationConfig(max_new_tokens=6, do_sample=False), {"max_new_tokens": 6, "do_sample": False}):
        kept = config if isinstance(config, GenerationConfig) else transformers.GenerationConfig(**config)
        assert ours.generate(ids, generation_config=kept).tolist() == expected.tolist()
        assert ours.generate(ids, kept).tolist() == expected.tolist(), "as transformers' second argument"
    ours.generation_config = theirs.generation_config
    assert ours.generation_config.eos_token_id == (int(free[0, 9]),)


def test_a_generation_config_is_made_and_read_as_transformers_is() -> None:
    config = GenerationConfig(num_beams=3, max_new_tokens=4, use_cache=False)
    assert (config.num_beams, config.use_cache, config.cache_implementation) == (3, False, None)
    assert config.update(num_beams=2, top_k=7, unheard_of=1) == {"unheard_of": 1}
    assert (config.num_beams, config.top_k) == (2, 7)
    with pytest.raises(TypeError, match="has no field nobody_knows"):
        GenerationConfig(nobody_knows=1)


def test_greedy_calls_leave_torchs_generator_alone_and_say_things_once(pair, ids, caplog) -> None:
    state = torch.random.get_rng_state()
    pair[0].generate(ids, max_new_tokens=2, max_length=20, pad_token_id=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert caplog.text.count("the latter counts") == 1


@pytest.mark.parametrize("number", [np.int64(4), torch.tensor(4)])
def test_numbers_of_numpy_and_torch_are_numbers(pair, ids, number) -> None:
    assert pair[0].generate(ids, max_new_tokens=number, top_k=number, pad_token_id=number).shape == (2, 11)


class Louder(LlamaForCausalLM):
    """A model whose forward is not the network's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        done = super().forward(*args, **kwargs)
        done.logits = -done.logits
        return done


def test_what_the_engine_would_compute_otherwise_is_named(make_pair, ids) -> None:
    ours = make_pair()[0]
    with pytest.raises(NotImplementedError, match=r"is a Louder, with a forward\(\) of its own"):
        Louder(ours.config).generate(ids, max_new_tokens=2)
    ours.model.layers[1].input_layernorm.eps = 0.1
    with pytest.raises(NotImplementedError, match=r"layers\.1\.input_layernorm has eps 0\.1"):
        ours.generate(ids, max_new_tokens=2)
