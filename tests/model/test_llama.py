"""The eager network against transformers in float32, over the grid of configurations."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

from fastllama import CacheOverflowError, LlamaConfig, LlamaForCausalLM, StaticCache
from fastllama.config import RopeParameters
from fastllama.model.cache import DynamicCache
from fastllama.ops import ACTIVATIONS

SHAPES = {
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "own head_dim": {"head_dim": 24},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "sliced head": {"pretraining_tp": 4},
    **{name: {"hidden_act": name} for name in ACTIVATIONS if name != "silu"},
    "rope theta": {"rope": RopeParameters(rope_theta=500000.0)},
    "rope linear": {"rope": RopeParameters("linear", factor=4.0)},
    "rope dynamic": {"rope": RopeParameters("dynamic", factor=2.0), "max_position_embeddings": 8},
    "rope yarn": {"rope": RopeParameters("yarn", factor=4.0, original_max_position_embeddings=16)},
    "rope longrope": {
        "rope": RopeParameters(
            "longrope", factor=64.0, original_max_position_embeddings=8, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8
        )
    },
    "rope llama3": {
        "rope": RopeParameters(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        )
    },
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> None:
    """Largest difference within ``bound`` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_loss_hidden_states_and_attentions_equal_transformers(overrides, make_pair) -> None:
    if overrides.get("hidden_act", "silu") not in ACT2FN:
        pytest.skip(f"this version of transformers has no {overrides['hidden_act']}")
    ours, theirs = make_pair(**overrides)
    ids = torch.randint(0, 96, (2, 13))
    labels = ids.clone()
    labels[0, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    args = {
        "attention_mask": mask, "labels": labels, "output_attentions": True, "output_hidden_states": True,
    }  # fmt: skip
    with torch.no_grad():
        ours_out, theirs_out = ours(ids, **args), theirs(ids, **args)
    assert ours_out.logits.dtype == torch.float32
    assert_close(ours_out.logits, theirs_out.logits)
    torch.testing.assert_close(ours_out.loss, theirs_out.loss, rtol=1e-5, atol=0)
    for name in ("hidden_states", "attentions"):
        assert len(ours_out[name]) == len(theirs_out[name])
        for ours_layer, theirs_layer in zip(ours_out[name], theirs_out[name], strict=True):
            assert_close(ours_layer, theirs_layer)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_attention_without_weights_equals_attention_with_them(padding, make_pair) -> None:
    ours, _ = make_pair()
    ids, mask = torch.randint(0, 96, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 4) if padding == "left" else slice(5, 9)] = 0
    with torch.no_grad():
        plain = ours(ids, attention_mask=mask).logits
        with_weights = ours(ids, attention_mask=mask, output_attentions=True).logits
    assert_close(plain[mask == 1], with_weights[mask == 1])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache, transformers.DynamicCache])
def test_decoding_token_by_token_over_a_cache_equals_one_forward(kind, make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (2, 10))
    cache = StaticCache(ours.config, 2, 16) if kind is StaticCache else kind()
    with torch.no_grad():
        whole = ours(ids, use_cache=False)
        assert whole.past_key_values is None
        parts = [ours(ids[:, :4], past_key_values=cache).logits]
        parts += [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, 10)]
    assert cache.get_seq_length() == 10
    assert_close(torch.cat(parts, dim=1), whole.logits)


def test_a_cache_is_made_when_the_config_asks_for_one(make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (1, 6))
    with torch.no_grad():
        first = ours(ids[:, :5])
        second = ours(ids[:, 5:], past_key_values=first.past_key_values)
        assert_close(second.logits[:, -1], ours(ids).logits[:, -1])
    assert isinstance(first.past_key_values, DynamicCache)


def test_past_key_values_and_cache_are_two_names(make_pair) -> None:
    ours, _ = make_pair()
    ids, cache = torch.randint(0, 96, (1, 6)), StaticCache(ours.config, 1, 8)
    with torch.no_grad():
        first = ours(ids[:, :5], cache=cache)
        assert first.cache is first["cache"] is first.past_key_values is cache
        assert_close(ours(ids[:, 5:], cache=cache).logits[:, -1], ours(ids).logits[:, -1])
        with pytest.raises(ValueError, match="past_key_values and cache, which are two names"):
            ours(ids, past_key_values=cache, cache=cache)


@pytest.mark.parametrize("name", ["num_logits_to_keep", "logits_to_keep"])
def test_only_the_last_logits_are_computed_when_asked(name, make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (2, 7))
    with torch.no_grad():
        assert_close(ours(ids, **{name: 2}).logits, ours(ids).logits[:, -2:])
        assert ours(ids, **{name: 0}).logits.shape == (2, 7, 96)


def test_tuples_hold_what_was_asked_for_in_order(make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (1, 5))
    with torch.no_grad():
        full = ours(
            ids, labels=ids, use_cache=True, output_attentions=True, output_hidden_states=True, return_dict=False
        )
        assert [type(x) for x in full] == [torch.Tensor, torch.Tensor, DynamicCache, tuple, tuple]
        assert full[0].dim() == 0
        logits, cache = ours(ids, return_dict=False)
        assert logits.shape == (1, 5, 96)
        assert isinstance(cache, DynamicCache)
        assert len(ours(ids, use_cache=False, return_dict=False)) == 1
        output = ours(ids, labels=ids, use_cache=False)
    assert output[0] is output.loss is output["loss"]
    assert output.to_tuple()[1] is output.logits
    assert list(output) == list(output.keys()) == ["loss", "logits"]


def test_output_defaults_come_from_the_config(make_pair) -> None:
    ours, _ = make_pair(output_attentions=True, output_hidden_states=True, return_dict=False, use_cache=False)
    with torch.no_grad():
        out = ours(torch.randint(0, 96, (1, 5)))
    assert isinstance(out, tuple)
    assert [len(x) for x in out[1:]] == [3, 2]


def test_embeddings_in_place_of_ids_give_the_same_logits(make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (1, 5))
    with torch.no_grad():
        assert_close(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, ours(ids).logits)


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_of_ids_and_embeddings_is_demanded(both, make_pair) -> None:
    ours, _ = make_pair()
    args = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "inputs_embeds": torch.zeros(1, 1, 32)} if both else {}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours(**args)


@pytest.mark.parametrize("bad", [-1, 96, 32000])
def test_ids_outside_the_vocabulary_are_named(bad, make_pair) -> None:
    ours, _ = make_pair()
    with pytest.raises(IndexError, match=f"input_ids hold {bad}; expected 0 to 95"):
        ours(torch.tensor([[1, bad, 2]]))


def test_a_4d_mask_is_taken_as_it_is(make_pair) -> None:
    ours, _ = make_pair()
    ids = torch.randint(0, 96, (1, 6))
    everything = torch.zeros(1, 1, 6, 6)
    with torch.no_grad():
        seeing_all = ours(ids, attention_mask=everything).logits
        assert (seeing_all[:, 0] - ours(ids).logits[:, 0]).abs().max() > 1e-3
        assert_close(seeing_all[:, -1], ours(ids).logits[:, -1], 10.0)


def test_a_static_cache_that_is_too_small_is_refused_before_anything_is_written(make_pair) -> None:
    ours, _ = make_pair()
    cache = StaticCache(ours.config, 1, 4)
    with torch.no_grad(), pytest.raises(CacheOverflowError, match="4 slots"):
        ours(torch.randint(0, 96, (1, 5)), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert not cache.key_cache[0].any()


def test_the_head_follows_the_embedding_when_tied(make_pair) -> None:
    tied, _ = make_pair(tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    tied.set_input_embeddings(nn.Embedding(96, 32))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    untied, _ = make_pair()
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    head = nn.Linear(32, 96, bias=False)
    untied.set_output_embeddings(head)
    assert untied.get_output_embeddings() is head
    assert untied.get_decoder() is untied.model


def test_training_reaches_every_parameter(make_pair) -> None:
    ours, theirs = make_pair()
    ids = torch.randint(0, 96, (2, 9))
    ours.train().requires_grad_(True)(ids, labels=ids).loss.backward()
    theirs.train()(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, expected[name].grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_error_is_at_most_twice_transformers_own(dtype, make_pair) -> None:
    ours, theirs = make_pair()
    ids = torch.randint(0, 96, (4, 24))
    with torch.no_grad():
        reference = theirs(ids).logits
        ours_error = (ours.to(dtype)(ids).logits - reference).pow(2).mean()
        theirs_error = (theirs.to(dtype)(ids).logits.float() - reference).pow(2).mean()
    assert ours_error.sqrt() <= 2 * theirs_error.sqrt()


class TestPreparedInputs:
    """prepare_inputs_for_generation, point by point as transformers 4.46 does it, then as 5.x does."""

    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])

    @pytest.fixture
    def model(self, make_pair) -> LlamaForCausalLM:
        return make_pair()[0]

    def test_keeps_the_unprocessed_tokens_by_cache_position(self, model) -> None:
        cache = StaticCache(model.config, 2, 8)
        inputs = model.prepare_inputs_for_generation(
            self.ids, past_key_values=cache, attention_mask=self.mask, cache_position=torch.tensor([5])
        )
        assert inputs["input_ids"].tolist() == [[5], [11]]
        assert inputs["position_ids"].tolist() == [[5], [3]]
        assert inputs["past_key_values"] is cache

    def test_leaves_ids_alone_that_are_sliced_already(self, model) -> None:
        cache = StaticCache(model.config, 2, 8)
        inputs = model.prepare_inputs_for_generation(
            self.ids[:, -1:], past_key_values=cache, attention_mask=self.mask, cache_position=torch.tensor([5])
        )
        assert inputs["input_ids"].tolist() == [[5], [11]]

    def test_positions_count_unmasked_tokens_and_are_one_where_masked(self, model) -> None:
        inputs = model.prepare_inputs_for_generation(self.ids, attention_mask=self.mask)
        assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 3]]

    def test_all_positions_are_kept_without_a_cache(self, model) -> None:
        inputs = model.prepare_inputs_for_generation(
            self.ids, attention_mask=self.mask, cache_position=torch.tensor([5])
        )
        assert inputs["position_ids"].shape == inputs["input_ids"].shape == (2, 6)

    def test_ids_and_positions_are_contiguous_clones(self, model) -> None:
        wide = torch.arange(24).view(2, 12)
        inputs = model.prepare_inputs_for_generation(
            wide[:, ::2],
            past_key_values=StaticCache(model.config, 2, 8),
            attention_mask=self.mask,
            cache_position=torch.tensor([4, 5]),
        )
        for name in ("input_ids", "position_ids"):
            assert inputs[name].is_contiguous()
            assert inputs[name].stride() == (2, 1)
        inputs["input_ids"].zero_()
        assert wide[0, 8] == 8

    def test_embeddings_serve_the_first_step_only(self, model) -> None:
        embeds = torch.randn(2, 6, 32)
        cache = StaticCache(model.config, 2, 8)
        args = {"past_key_values": cache, "attention_mask": self.mask, "inputs_embeds": embeds}
        first = model.prepare_inputs_for_generation(self.ids, cache_position=torch.arange(6), **args)
        assert first["inputs_embeds"] is embeds
        assert first["input_ids"] is None
        later = model.prepare_inputs_for_generation(self.ids, cache_position=torch.tensor([6]), **args)
        assert later["inputs_embeds"] is None
        assert later["input_ids"].tolist() == [[5], [11]]

    def test_a_2d_mask_becomes_4d_over_the_whole_static_cache(self, model) -> None:
        cache = StaticCache(model.config, 2, 8)
        inputs = model.to(torch.bfloat16).prepare_inputs_for_generation(
            self.ids, past_key_values=cache, attention_mask=self.mask, cache_position=torch.arange(6)
        )
        mask = inputs["attention_mask"]
        assert mask.shape == (2, 1, 6, 8)
        assert mask.dtype == torch.bfloat16
        assert (
            mask[1, 0, 3].tolist()
            == [torch.finfo(torch.bfloat16).min] * 2 + [0.0] * 2 + [torch.finfo(torch.bfloat16).min] * 4
        )

    def test_the_mask_stays_2d_without_a_static_cache(self, model) -> None:
        inputs = model.prepare_inputs_for_generation(self.ids, attention_mask=self.mask)
        assert inputs["attention_mask"] is self.mask

    def test_num_logits_to_keep_is_passed_on_when_given(self, model) -> None:
        assert "num_logits_to_keep" not in model.prepare_inputs_for_generation(self.ids)
        assert model.prepare_inputs_for_generation(self.ids, num_logits_to_keep=1)["num_logits_to_keep"] == 1

    def test_a_cache_without_positions_is_an_error(self, model) -> None:
        with pytest.raises(ValueError, match="cache_position"):
            model.prepare_inputs_for_generation(self.ids, past_key_values=DynamicCache())

    def test_a_decoding_loop_over_it_equals_generate(self, model, make_pair) -> None:
        ids = torch.randint(0, 96, (2, 6))
        expected = model.generate(ids, attention_mask=self.mask, max_new_tokens=5)
        cache, mask, position = StaticCache(model.config, 2, 16), self.mask, torch.arange(6)
        with torch.no_grad():
            for _ in range(5):
                inputs = model.prepare_inputs_for_generation(
                    ids, past_key_values=cache, attention_mask=mask, cache_position=position
                )
                token = model(**inputs).logits[:, -1:].argmax(-1)
                ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
                position = position[-1:] + 1
        assert ids.tolist() == expected.tolist()

    @pytest.mark.parametrize("name", ["past_key_values", "cache"])
    @pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
    def test_the_slots_follow_the_cache_where_there_is_no_cache_position(self, model, name, kind) -> None:
        cache = StaticCache(model.config, 2, 8) if kind is StaticCache else kind()
        args = {name: cache, "attention_mask": self.mask, "logits_to_keep": 1}
        first = model.prepare_inputs_for_generation(
            self.ids[:, :5], is_first_iteration=True, **args | {"attention_mask": self.mask[:, :5]}
        )
        assert first["cache_position"].tolist() == [0, 1, 2, 3, 4]
        with torch.no_grad():
            model(**first)
        later = model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **args)
        assert later[name] is cache
        assert later["logits_to_keep"] == 1
        assert later["input_ids"].tolist() == [[5], [11]]
        assert later["position_ids"].tolist() == [[5], [3]]
        assert later["cache_position"].tolist() == [5]
        with torch.no_grad():
            whole = model(self.ids, attention_mask=self.mask, position_ids=(self.mask.cumsum(1) - 1).clamp(min=0))
            assert_close(model(**later).logits[:, -1], whole.logits[:, -1])

    def test_embeddings_serve_the_step_that_is_called_the_first(self, model) -> None:
        embeds = torch.randn(2, 6, 32)
        args = {"cache": StaticCache(model.config, 2, 8), "inputs_embeds": embeds, "next_sequence_length": 2}
        first = model.prepare_inputs_for_generation(self.ids[:, :0], is_first_iteration=True, **args)
        assert torch.equal(first["inputs_embeds"], embeds[:, -2:])
        assert first["cache_position"].tolist() == [0, 1]
        later = model.prepare_inputs_for_generation(self.ids, is_first_iteration=False, **args)
        assert later["inputs_embeds"] is None
        assert later["input_ids"].tolist() == [[4, 5], [10, 11]]


def test_a_config_without_ids_for_special_tokens_is_fine() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    assert LlamaForCausalLM(config).generation_config.eos_token_id == ()
