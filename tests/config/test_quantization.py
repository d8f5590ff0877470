"""QuantizationConfig: what it takes, and what it says of each module."""

from __future__ import annotations

import json

import pytest

from fastllama.config import LlamaConfig
from fastllama.config.quantization import QuantizationConfig, Scheme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits is 3; expected one of 4, 8"),
        ({"group_size": 48}, "group_size is 48; expected a multiple of 32"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 64.0}, "group_size is 64.0"),
        ({"head_bits": 2}, "head_bits is 2"),
        ({"activations": "int4"}, "activations is 'int4'"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"exclude": [3]}, "exclude"),
    ],
    ids=str,
)
def test_values_are_checked(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**changes)


def test_schemes_by_name() -> None:
    assert QuantizationConfig.of(None) is None
    assert QuantizationConfig.of("int4") == QuantizationConfig(bits=4, group_size=32, head_bits=8)
    int8 = QuantizationConfig.of("int8")
    assert int8 is not None
    assert (int8.bits, int8.group_size) == (8, None)
    assert QuantizationConfig.of(int8) is int8
    with pytest.raises(
        ValueError, match="quantize is 'int3'; expected None, 'none', 'int8', 'int4' or a QuantizationConfig"
    ):
        QuantizationConfig.of("int3")


@pytest.mark.parametrize(
    ("changes", "module", "expected"),
    [
        ({}, "model.layers.0.mlp.up_proj", (4, 32, True)),
        ({"symmetric": True}, "model.layers.0.mlp.up_proj", (4, 32, False)),
        ({"group_size": None}, "model.layers.0.mlp.up_proj", (4, 256, True)),
        ({"group_size": 64}, "lm_head", (8, 256, False)),
        ({"group_size": 64, "head_bits": 4}, "model.embed_tokens", (4, 64, True)),
        ({"head_bits": None}, "lm_head", None),
        ({"exclude": ["down_proj"]}, "model.layers.3.mlp.down_proj", None),
        ({"exclude": ["layers.3.mlp.down_proj"]}, "model.layers.13.mlp.down_proj", (4, 32, True)),
        ({"exclude": "model.layers.3.mlp.down_proj"}, "model.layers.3.mlp.down_proj", None),
    ],
    ids=str,
)
def test_the_scheme_of_a_module(changes, module, expected) -> None:
    assert QuantizationConfig(**changes).scheme_of(module, 256) == expected


def test_a_group_that_does_not_divide_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"q_proj has 96 columns, which groups of 64 do not divide.*exclude"):
        QuantizationConfig(group_size=64).scheme_of("q_proj", 96)
    with pytest.raises(ValueError, match="q_proj has 40 columns, which groups of 40"):
        QuantizationConfig(bits=8, group_size=None).scheme_of("q_proj", 40)


def test_it_is_read_as_it_is_written() -> None:
    config = QuantizationConfig(bits=8, group_size=64, exclude=("lm_head",))
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    whole = LlamaConfig(quantization=config)
    assert whole.to_dict()["quantization_config"]["quant_method"] == "fastllama"
    assert LlamaConfig.from_dict(whole.to_dict()) == whole
    assert "quantization_config" not in LlamaConfig().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version of quantization_config is 2; expected at most 1; update fastllama"),
        ({"version": None}, "version of quantization_config is None"),
        ({"bits": 5}, "bits is 5"),
        ({"rows": 5}, "unknown keys in quantization_config: rows"),
    ],
    ids=str,
)
def test_a_folder_of_a_newer_version_or_a_damaged_one_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(LlamaConfig(quantization=QuantizationConfig()).to_dict() | {
            "quantization_config": QuantizationConfig().to_dict() | changes
        })  # fmt: skip


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_methods_that_are_not_read_are_refused(key) -> None:
    with pytest.raises(NotImplementedError, match=f"{key}: quant_method 'hqq' is not read, only gptq, awq.*original"):
        LlamaConfig.from_dict({"model_type": "llama", key: {"quant_method": "hqq", "bits": 4}})
    with pytest.raises(ValueError, match=r"quantization_config\.quant_method is None; expected one of gptq"):
        LlamaConfig.from_dict({"model_type": "llama", "quantization_config": {"bits": 4}})


def test_how_others_store_weights_is_not_the_models_config() -> None:
    config = LlamaConfig.from_dict({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert config.quantization is None


SCHEMES = {"a.q_proj": Scheme(4, 64, True), "a.o_proj": Scheme(4, 64, True), "a.down_proj": Scheme(8, 128, False)}
COLUMNS = {"a.q_proj": 64, "a.o_proj": 128, "a.down_proj": 128, "lm_head": 64}


def test_modules_can_differ() -> None:
    config = QuantizationConfig.holding(SCHEMES, COLUMNS)
    for each in (config, QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))):
        assert {name: each.scheme_of(name, k) for name, k in COLUMNS.items()} == {**SCHEMES, "lm_head": None}


@pytest.mark.parametrize("scheme", [(3, 32, True), (4, 48, True), (4, 32, 1), (4, 32), {"bits": 4}, None])
def test_schemes_that_there_are_not_are_refused(scheme) -> None:
    with pytest.raises(ValueError, match="modules"):
        QuantizationConfig(modules=(("lm_head", scheme),))
