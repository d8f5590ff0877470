"""LlamaConfig and GenerationConfig: both spellings of the JSON files, as transformers reads them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re

import pytest
import torch
import transformers

from fastllama.config import GenerationConfig, LlamaConfig, RopeParameters
from fastllama.config.settings import OUTSIDE_THE_STEP
from fastllama.ops import ACTIVATIONS

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
SHARED_FIELDS = sorted({field.name for field in dataclasses.fields(LlamaConfig)} - {"rope", "dtype", "quantization"})


def same_values(ours: LlamaConfig, hf: transformers.LlamaConfig) -> None:
    """Every field equals that of transformers' config."""
    for name in SHARED_FIELDS:
        mine = getattr(ours, name)
        assert (list(mine) if isinstance(mine, tuple) else mine) == getattr(hf, name), name
    for name, value in hf.rope_parameters.items():
        mine = getattr(ours.rope, name) if name != "type" else ours.rope.rope_type
        assert (list(mine) if isinstance(mine, tuple) else mine) == value, name


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"head_dim": 8, "num_key_value_heads": 2},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"pretraining_tp": 4},
        {"tie_word_embeddings": True},
        {"eos_token_id": [2, 5, 7], "pad_token_id": 0},
        {"bos_token_id": None, "eos_token_id": None},
        {"rms_norm_eps": 1e-5, "initializer_range": 0.01, "attention_dropout": 0.1, "use_cache": False},
        {"output_hidden_states": True, "return_dict": False},
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LONGROPE},
        {"rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": None, "head_dim": None, "num_key_value_heads": None},
        *({"hidden_act": name} for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_a_config_reads_as_in_transformers(fields):
    ours = LlamaConfig.from_dict(SHAPE | fields)
    same_values(ours, transformers.LlamaConfig(**copy.deepcopy(SHAPE | fields)))


def test_the_defaults_are_those_of_transformers():
    same_values(LlamaConfig(), transformers.LlamaConfig())
    assert LlamaConfig.from_dict({}) == LlamaConfig(dtype="auto")


def test_both_spellings_of_one_rope_are_one_config():
    v4 = LlamaConfig.from_dict(SHAPE | {"rope_theta": 500000.0, "rope_scaling": LLAMA3})
    v5 = LlamaConfig.from_dict(SHAPE | {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    spellings = {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3}
    both = LlamaConfig.from_dict(SHAPE | spellings)
    assert v4 == v5 == both


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "auto"),
        ({"dtype": "auto"}, "auto"),
        ({"torch_dtype": "half"}, "float16"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "float8_e4m3fn"}, "auto"),
    ],
)
def test_the_dtype_is_read_under_both_names(fields, dtype):
    assert LlamaConfig.from_dict(SHAPE | fields).dtype == dtype


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": LLAMA3}, {"rope_scaling": LONGROPE}, {"eos_token_id": [2, 3]}])
def test_a_transformers_config_object_reads_as_its_file(fields, tmp_path):
    hf = transformers.LlamaConfig(**copy.deepcopy(SHAPE | fields), dtype="bfloat16")
    hf.save_pretrained(tmp_path)
    ours = LlamaConfig.from_hf(hf)
    assert ours == LlamaConfig.from_pretrained(tmp_path) == LlamaConfig.from_pretrained(tmp_path / "config.json")
    assert ours.dtype == "bfloat16"
    same_values(ours, hf)


def test_the_original_length_beside_the_rope_parameters_wins_as_in_transformers():
    fields = SHAPE | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128}
    hf = transformers.LlamaConfig(**copy.deepcopy(fields))
    hf.standardize_rope_params()
    ours = LlamaConfig.from_dict(fields)
    assert ours.rope.original_max_position_embeddings == 128
    same_values(ours, hf)


def test_minus_one_as_padding_token_means_none():
    assert LlamaConfig.from_dict(SHAPE | {"pad_token_id": -1}).pad_token_id is None


def test_keys_without_effect_are_accepted():
    inert = {
        "transformers_version": "4.31.0",
        "_name_or_path": "somewhere",
        "auto_map": {"AutoModel": "modeling.LlamaModel"},
        "id2label": {"0": "LABEL_0"},
        "sliding_window": None,
        "use_sliding_window": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention", "full_attention"],
        "pruned_heads": {},
        "rope_interleaved": False,
        "max_length": 20,
        "do_sample": False,
        "num_beams": 1,
        "some_future_option": None,
        "is_causal": True,
        "no_rope_layers": [1, 1],
        "mlp_multipliers": [1.0, 1.0],
        "norm_type": "RmsNorm",
        "experts_implementation": "grouped",
        "prefill_chunk_size": 512,
        "window_size": -1,
    }
    assert LlamaConfig.from_dict(SHAPE | inert, strict=True) == LlamaConfig.from_dict(SHAPE)


def test_every_key_that_transformers_writes_is_accounted_for():
    assert LlamaConfig.from_dict(transformers.LlamaConfig().to_dict(), strict=True) == LlamaConfig(dtype="auto")
    generation = GenerationConfig.from_dict(transformers.GenerationConfig().to_dict(), strict=True)
    assert generation == GenerationConfig()


# ---- refusing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 would rotate a part of each head only"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        (
            {"logit_scale": 0.5, "qk_norm": True},
            "logit_scale=0.5 would scale what the network computes; qk_norm=True would",
        ),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
        ({"hidden_size": 66}, "hidden_size is 66"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim is 15; expected an even number"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0"),
        ({"pretraining_tp": -1}, "pretraining_tp is -1; expected an integer of at least 1"),
        ({"vocab_size": 10**30}, "expected at most 2147483647"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
        ({"use_cache": "yes"}, "use_cache is 'yes'; expected true or false"),
        ({"pad_token_id": "<pad>"}, "pad_token_id is '<pad>'; expected an integer of at least 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"dtype": "complex64"}, "dtype is 'complex64'"),
        ({"is_causal": False}, "is_causal=False would let tokens see those after them"),
        ({"use_moe": True}, "use_moe=True would replace the MLP"),
        ({"embed_scale": True}, "embed_scale=True would scale"),
        ({"n_shared_experts": 1}, "n_shared_experts=1 would replace the MLP"),
        ({"no_rope_layers": True}, "no_rope_layers=True would leave the rotary embedding out"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] would leave the rotary embedding out"),
        ({"attn_logit_softcap": 30.0}, "bound scores or logits smoothly"),
        ({"mlp_multipliers": [1.0, 0.5]}, "mlp_multipliers=[1.0, 0.5] would scale"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type is 'su'; expected one of default"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type is"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None; expected a value"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7}}, "length of long_factor is 7"),
        ({"rope_scaling": {**LONGROPE, "short_factor": "1.0"}}, "short_factor is '1.0'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope parameter full_attention would change",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}, "rope parameter mrope_section"),
    ],
    ids=str,
)
def test_what_fastllama_does_not_compute_is_an_error_that_names_it(fields, message):
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        LlamaConfig.from_dict(SHAPE | fields)


def test_a_file_that_is_no_json_is_left_out_with_a_warning_where_it_holds_defaults(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"eos_token_id": [2, 3]}))
    (tmp_path / "generation_config.json").write_text('{"top_k": 5,}')
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == (2, 3)
    assert "a comma before a closing bracket" in caplog.text
    with pytest.raises(ValueError, match="a comma before a closing bracket"):
        GenerationConfig.from_pretrained(tmp_path, strict=True)


def test_a_rope_parameter_of_another_type_is_left_out_with_a_warning(caplog):
    ours = LlamaConfig.from_dict(SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}})
    assert ours.rope == RopeParameters(rope_type="linear", factor=2.0)
    assert "'linear' does not read beta_fast" in caplog.text


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "holds a JSON list")])
def test_a_file_that_is_no_json_object_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        LlamaConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_bad_field_is_reported_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'gpt2'"):
        LlamaConfig.from_pretrained(tmp_path)


def test_an_absent_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LlamaConfig.from_pretrained(tmp_path)


# ---- writing and changing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "eos_token_id": [2, 3]},
        {"rope_scaling": LONGROPE},
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"head_dim": 32, "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_saved_config_reads_the_same_here_and_in_transformers(fields, tmp_path):
    ours = LlamaConfig.from_dict(SHAPE | fields)
    ours.save_pretrained(tmp_path / "new")
    assert LlamaConfig.from_pretrained(tmp_path / "new") == ours
    hf = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    same_values(ours, hf)
    assert str(hf.dtype) == ("None" if ours.dtype == "auto" else f"torch.{ours.dtype}")
    assert LlamaConfig.from_hf(hf) == ours


def test_a_saved_config_holds_the_v4_and_the_v5_spelling(tmp_path):
    LlamaConfig.from_dict(SHAPE | {"rope_scaling": LLAMA3, "rope_theta": 5e5, "dtype": "bfloat16"}).save_pretrained(
        tmp_path
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] == LLAMA3
    assert written["rope_theta"] == 5e5
    assert written["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["model_type"] == "llama"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_default_rope_is_written_without_rope_scaling():
    assert LlamaConfig().to_dict()["rope_scaling"] is None


def test_replacing_a_field_keeps_derived_fields_in_step():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert config.replace(num_attention_heads=8).head_dim == 8
    assert config.replace(num_attention_heads=8).num_key_value_heads == 8
    chosen = config.replace(head_dim=32, num_key_value_heads=2)
    assert chosen.replace(num_attention_heads=8).head_dim == 32
    assert chosen.replace(num_attention_heads=8).num_key_value_heads == 2


def test_a_config_is_frozen_and_hashable():
    config = LlamaConfig.from_dict(SHAPE | {"rope_scaling": LONGROPE, "eos_token_id": [1, 2]})
    assert hash(config) == hash(config.replace())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]


def test_fields_of_a_generation_config_can_be_set_and_are_checked():
    config = GenerationConfig()
    config.top_k, config.eos_token_id, config.num_beams = -1, torch.tensor([3, 4]), 4
    assert config == GenerationConfig(top_k=0, eos_token_id=(3, 4), other={"num_beams": 4})
    assert (config.num_beams, config.repetition_penalty, GenerationConfig().num_beams) == (4, 1.0, 1)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="top_p is 2"):
        config.top_p = 2
    with pytest.raises(AttributeError, match="no field 'num_bears'"):
        config.num_bears = 4
    assert not hasattr(config, "num_bears")


# ---- GenerationConfig --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eos", "held"), [(None, ()), (-1, ()), ([2, -1], (2,)), (2, (2,)), ([2, 3], (2, 3)), ((5,), (5,)), ([], ())]
)
def test_eos_ids_are_held_as_a_tuple(eos, held):
    assert GenerationConfig(eos_token_id=eos).eos_token_id == held
    assert GenerationConfig.from_dict({"eos_token_id": eos}).eos_token_id == held


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"some_key": 1, "other_key": 2}, "unknown config keys other_key, some_key"),
        ({"ffn_dim_multiplier": 1.3, "loss_chunk_size": 8}, "unknown config keys ffn_dim_multiplier, loss_chunk_size"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype is 'float16' and torch_dtype is 'bfloat16'"),
        ({"rope_scaling": {**LLAMA3, "ramp": 1}}, "unknown rope parameters ramp"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic' and",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map names code of its own, modeling.Model"),
    ],
    ids=str,
)
def test_what_changes_nothing_is_one_warning_and_an_error_if_strict(fields, message, caplog):
    LlamaConfig.from_dict(SHAPE | fields)
    assert [record.getMessage().startswith(message) for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=re.escape(message)):
        LlamaConfig.from_dict(SHAPE | fields, strict=True)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4},
        {"encoder_repetition_penalty": 1.3},
        {"guidance_scale": 1.5},
        {"max_time": 5.0},
        {"penalty_alpha": 0.6},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_a_generation_setting_that_the_step_does_not_do_is_kept_and_refused_by_the_step_alone(setting, caplog):
    [(name, value)] = setting.items()
    config = GenerationConfig.from_dict({"temperature": 0.7, **setting})
    assert config == GenerationConfig(temperature=0.7, other=setting)
    assert not caplog.text
    assert config.left_to_loops({}) == setting
    with pytest.raises(NotImplementedError, match=re.escape(f"{name}={value!r}")):
        config.check_usable({})
    for off in (OUTSIDE_THE_STEP[name], None):
        config.check_usable({name: off})
        assert not config.left_to_loops({name: off})
    assert GenerationConfig.from_dict(setting, strict=True).to_dict()[name] == value


def test_settings_of_sampling_ask_for_nothing_where_nothing_is_sampled():
    config = GenerationConfig(epsilon_cutoff=0.1, top_h=0.4)
    assert not config.left_to_loops({})
    assert config.left_to_loops({"do_sample": True}) == {"epsilon_cutoff": 0.1, "top_h": 0.4}


def test_generation_settings_that_ask_for_nothing_are_accepted():
    neutral = {
        "_from_model_config": True,
        "transformers_version": "4.40.0",
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": False,
        "cache_implementation": "static",
        "length_penalty": 1.0,
        "bad_words_ids": None,
        "suppress_tokens": [],
        "temperature": None,
        "max_length": None,
    }
    assert GenerationConfig.from_dict(neutral) == GenerationConfig()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"seed": -3}, "seed is -3"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'"),
    ],
    ids=str,
)
def test_a_generation_setting_out_of_range_is_an_error_here_and_a_warning_in_a_file(setting, message, caplog):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerationConfig(**setting)
    config = GenerationConfig.from_dict(setting)
    assert config.other == setting
    assert message in caplog.text
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check_usable({} if "do_sample" in setting else {"do_sample": True})
    if not {"do_sample", "eos_token_id"} & setting.keys():
        config.check_usable({"do_sample": False, "max_new_tokens": 2})  # which use none of them


def test_a_saved_generation_config_reads_the_same_here_and_in_transformers(tmp_path):
    ours = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[5, 6], pad_token_id=0)
    ours.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == ours
    hf = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (hf.do_sample, hf.temperature, hf.top_p, hf.eos_token_id, hf.pad_token_id) == (
        True,
        0.6,
        0.9,
        [5, 6],
        0,
    )
    assert GenerationConfig.from_hf(hf) == ours


def test_without_a_generation_config_the_settings_of_config_json_hold(tmp_path):
    settings = {"eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": None, "temperature": 0.7}
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | settings | {"rope_theta": 1e4}))
    ours = GenerationConfig.from_pretrained(tmp_path)
    assert ours == GenerationConfig(eos_token_id=(2, 3), bos_token_id=1, temperature=0.7)
    GenerationConfig(max_new_tokens=5).save_pretrained(tmp_path)  # with one, they do not
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(max_new_tokens=5)


def test_a_beam_search_in_config_json_is_kept_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"num_beams": 4}))
    assert GenerationConfig.from_pretrained(tmp_path).other == {"num_beams": 4}


def test_without_any_file_the_generation_defaults_hold(tmp_path):
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()


def test_replace_changes_generation_fields_and_checks_them():
    config = GenerationConfig.from_dict({"max_length": "x", "num_beams": 4}).replace(max_length=9)
    assert (config.max_length, config.other) == (9, {"num_beams": 4})
    assert GenerationConfig().replace(top_k=0, eos_token_id=7).eos_token_id == (7,)
    with pytest.raises(ValueError, match="top_k"):
        GenerationConfig().replace(top_k=-5)
