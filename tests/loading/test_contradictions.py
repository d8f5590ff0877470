"""Checkpoints whose config and tensors contradict each other, or that are not read: what is said, and how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_formats import (
    CT,
    FORMATS,
    GPTQ,
    SHAPE,
    Edit,
    Q,
    Tensors,
    configure,
    drop,
    edit,
    fill,
    groups,
    packed,
    write,
)

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM
from fastllama.config.stored_quantization import Declared
from fastllama.quantization.linear import packed_modules


def torchao(name: str, **values: Any) -> dict[str, Any]:
    """torchao's config of a class, as ``core/config.py`` of its source writes it."""
    return {"quant_type": {"default": {"_type": name, "_version": 2, "_data": values}}}


def only(module: str, name: str) -> dict[str, Any]:
    """torchao's config of a class for one module, and Int4WeightOnlyConfig for the others."""
    default, other = (torchao(each)["quant_type"]["default"] for each in ("Int4WeightOnlyConfig", name))
    return torchao("FqnToConfig", fqn_to_config={rf"re:model\..*\.{module}": other, "_default": default})


def of_3_bits(tensors: Tensors) -> None:
    """Give a matrix of 64 rows and columns the shapes of 3 bits."""
    tensors[f"{Q}.qweight"], tensors[f"{Q}.qzeros"] = torch.zeros(6, 64).int(), torch.zeros(2, 6).int()


INTX = torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype={"_type": "torch.dtype", "_data": "int8"})
BAD: list[tuple[str, dict[str, Any], Edit, str]] = [
    ("gptq", {"bits": 3}, lambda t: None, "its codes have 4 bits, but the config's bits is 3; correct the config"),
    ("gptq", {"bits": 3}, lambda t: of_3_bits(t), "q_proj: codes of 3 bits are not read; expected 2 or 4 or 8"),
    ("gptq", {"group_size": 64}, lambda t: None, "its groups have 32 columns, but the config's group_size is 64; corr"),
    ("gptq", {"group_size": -1}, lambda t: None, "its groups have 32 columns, but the config's group_size is -1"),
    ("gptq", {"quant_method": "awq"}, lambda t: None, "tensors are those of gptq, but quant_method is 'awq'"),
    ("gptq", {"is_marlin_format": True}, lambda t: None, "in an order for GPUs"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.scales"), "scales is missing"),
    ("gptq", {}, lambda t: t[f"{Q}.g_idx"].fill_(9), "g_idx names groups from 9 to 9, there are 2"),
    ("gptq", {}, lambda t: fill(t, "scales", float("nan")), "holds NaN or infinity"),
    ("gptq", {"bits": 8}, lambda t: None, "6 more: its codes have 4 bits, but the config's bits is 8; correct"),
    ("awq", {"version": "gemv_fast"}, lambda t: None, "in an order for GPUs"),
    (
        "awq",
        {"modules_to_not_convert": ["down_proj"]},
        lambda t: None,
        "quantized, but .*modules_to_not_convert has 'down",
    ),
    (
        "fp8",
        {"ignored_layers": ["model.layers.0"]},
        lambda t: None,
        "6 more: its weights are quantized, but .*ignored_l",
    ),
    ("fp8", {"exclude_modules": ["model.layers.0.mlp*"]}, lambda t: None, "2 more: .*exclude_modules has"),
    ("fp8", {"ignore": ["model.layers.0.mlp*"]}, lambda t: None, "2 more: .*ignore has"),
    ("fp8", {"ignored_layers": "re:.*mlp.*"}, lambda t: None, "2 more: .*ignored_layers has 're:"),
    ("awq", {"modules_to_not_convert": [r"model\.layers\.0\..*"]}, lambda t: None, "6 more: .*not_convert has"),
    ("bitsandbytes int8", {"llm_int8_skip_modules": ["q_proj"]}, lambda t: None, "q_proj: .*llm_int8_skip_modules has"),
    ("awq", {"bits": 8}, lambda t: None, "its codes have 4 bits, but the config's bits is 8; correct the config"),
    ("pack-quantized", {"transform_config": {"a": 1}}, lambda t: None, "weights are rotated"),
    ("pack-quantized", {"config_groups": groups(8)}, lambda t: None, "have 4 bits, but config_groups.group_0 says 8"),
    (
        "int-quantized",
        {"config_groups": groups(4)},
        lambda t: None,
        "codes go from -1.. to 1.., which are more than the c",
    ),
    ("int-quantized", {"config_groups": groups(16)}, lambda t: None, "have 8 bits, but config_groups.group_0 says 16"),
    ("int-quantized", {"sparsity_config": {"format": "sparse-24"}}, lambda t: None, "stored sparsely"),
    (
        "fp8",
        {"weight_block_size": [64, 64]},
        lambda t: None,
        r"but weight_block_size \[64, 64\] makes it \[1, 1\]; corr",
    ),
    (
        "fp8",
        {"weight_block_size": None},
        lambda t: None,
        r"shape \[2, 2\] for a weight of \[64, 64\]; where the config names",
    ),
    (
        "bitsandbytes nf4",
        {"bnb_4bit_quant_type": "fp4"},
        lambda t: None,
        "stored as nf4, but bnb_4bit_quant_type is fp4",
    ),
    ("bitsandbytes int8", {}, lambda t: t[f"{Q}.weight_format"].fill_(1), "an order for GPUs"),
    ("gptq", {"checkpoint_format": "bitblas"}, lambda t: None, "checkpoint_format is 'bitblas'; expected 'gptq' or"),
    ("gptq", {"sym": "false"}, lambda t: None, "sym is 'false'; expected true or false"),
    ("awq gemv", {"group_size": 64}, lambda t: None, "4 words a row fit 64 columns in groups of 32, and the config's"),
    ("gptq", {"desc_act": True}, lambda t: drop(t, "g_idx"), "g_idx is missing, and desc_act is true"),
    ("gptq", {"dynamic": [1]}, lambda t: None, "values are damaged"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.qweight"), "the rest of this matrix"),
    ("awq", {}, lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    ("awq gemv", {"group_size": 0}, lambda t: None, "the config's group_size is 0"),
    ("pack-quantized", {"config_groups": groups(4, group_size=64)}, lambda t: None, "groups have 32 columns, but"),
    ("pack-quantized", {"config_groups": groups(4, "float")}, lambda t: None, "codes are integers, but"),
    ("pack-quantized", {"config_groups": groups(4, symmetric=False)}, lambda t: None, "weight_zero_point is missing"),
    ("pack-quantized", {"config_groups": groups(4, actorder="group")}, lambda t: None, "weight_g_idx is missing"),
    ("pack-quantized", {}, lambda t: fill(t, "weight_scale", 1e-8), "scales do not fit float16"),
    ("pack-quantized", {}, lambda t: fill(t, "weight_scale", 1e8), "scales do not fit float16"),
    ("bitsandbytes nf4", {}, lambda t: t.update({f"{Q}.weight.nested_absmax": torch.ones(9)}), "nested_absmax has the"),
    ("fp8", {}, lambda t: t.pop(f"{Q}.weight_scale_inv"), "q_proj.weight: 8-bit floating point without its scale"),
    ("fp8", {}, lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}), r"\[32, 32\] makes it \[2, 2\]"),
    ("fp8", {}, lambda t: t[f"{Q}.weight_scale_inv"].fill_(float("inf")), "holds NaN"),
    ("fp8", {"weight_block_size": 128}, lambda t: None, "values are damaged"),
    ("torchao float8", {}, lambda t: t.update({f"{Q}._weight_qdata": torch.zeros(64, 64).char()}), "stored as I8"),
    ("bitsandbytes fp4", {}, lambda t: t[f"{Q}.weight.absmax"].fill_(float("inf")), "holds NaN"),
    ("mlx", {"bits": 8}, lambda t: None, "8 more: its tensors have 4 bits in groups of 32, or 8 .*config says 8 bits"),
    (
        "mlx",
        {"group_size": 64},
        lambda t: None,
        "or 4 bits in groups of 32, but the config says 4 bits in groups of 64",
    ),
    (
        "mlx",
        {"bits": 8, "group_size": 16},
        lambda t: None,
        r"\[64, 32\], expected \[64, 64\]; read as MLX with 8 bits: are",
    ),
    (
        "bitsandbytes nf4",
        {"load_in_4bit": False, "load_in_8bit": True},
        lambda t: None,
        "codes have 4 bits, but .*load_in_8",
    ),
    (
        "bitsandbytes int8",
        {"load_in_4bit": True, "load_in_8bit": False},
        lambda t: None,
        "have 8 bits, but .*load_in_4bit",
    ),
    (
        "bitsandbytes nf4",
        {"bnb_4bit_use_double_quant": False},
        lambda t: None,
        "maxima are stored in 8 bits, but bnb_4bit",
    ),
    (
        "bitsandbytes fp4",
        {"bnb_4bit_use_double_quant": True},
        lambda t: None,
        "maxima are stored in float32, but bnb_4bit",
    ),
    (
        "torchao int4",
        torchao("Int8WeightOnlyConfig"),
        lambda t: None,
        "codes are int4, but .*Int8WeightOnlyConfig says int8",
    ),
    (
        "torchao int4",
        {"quant_type": "int8_weight_only"},
        lambda t: None,
        "codes are int4, but .*int8_weight_only says int8",
    ),
    (
        "torchao int4",
        torchao("Int4WeightOnlyConfig", group_size=64),
        lambda t: None,
        "have 32 columns, but .* says 64; corr",
    ),
    (
        "torchao int8",
        torchao("Int4WeightOnlyConfig"),
        lambda t: None,
        "6 more: its codes are int8, but .* says int4; corr",
    ),
    ("torchao int8", torchao("Float8WeightOnlyConfig"), lambda t: None, "its codes are int8, but .* says float8; corr"),
    (
        "torchao int8",
        torchao("Int8WeightOnlyConfig", group_size=32),
        lambda t: None,
        "groups have 64 columns, but .* says 32",
    ),
    ("torchao intx", INTX, lambda t: None, "its codes are int4, but .*Int8DynamicActivationIntxWeightConfig says int8"),
    (
        "torchao intx",
        torchao("IntxWeightOnlyConfig", granularity={"_type": "PerAxis"}),
        lambda t: None,
        "columns, .* says 64",
    ),
    (
        "torchao intx",
        {},
        lambda t: t[f"{Q}._weight_qdata"].fill_(9),
        "q_proj: it has codes from 9 to 9, which int4 does",
    ),
    ("torchao float8", torchao("Int8WeightOnlyConfig"), lambda t: None, "its codes are float8, but .* says int8; corr"),
    (
        "torchao int4",
        only("o_proj", "Int8WeightOnlyConfig"),
        lambda t: None,
        "o_proj: its codes are int4, but .* says int8",
    ),
    ("torchao int4", {"quant_method": "gptq"}, lambda t: None, "those of torchao"),
]


@pytest.mark.parametrize(
    ("name", "config", "change", "message"), BAD, ids=[f"{each[0]}: {each[3][:20]}" for each in BAD]
)
def test_what_is_not_read_is_named(name, config, change, message, tmp_path) -> None:
    write(name, tmp_path)
    configure(tmp_path, FORMATS[name].config | config)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def grouped(**targets: dict[str, Any]) -> dict[str, Any]:
    """A compressed-tensors config of groups by name, of 4 bits unless they say otherwise."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    made = {name: {"targets": each.pop("targets"), "weights": weights | each} for name, each in targets.items()}
    return CT | {"format": "pack-quantized", "config_groups": made}


DOWN = "model.layers.0.mlp.down_proj"
TARGETS: list[tuple[dict[str, Any], str | None]] = [
    (grouped(a={"targets": ["Linear"]}, b={"targets": ["re:.*down_proj"], "num_bits": 8}), None),
    (grouped(a={"targets": ["Linear"]}, b={"targets": [DOWN], "num_bits": 8}), None),
    (grouped(a={"targets": ["re:.*proj"]}, b={"targets": [DOWN], "num_bits": 8}, c={"targets": ["Linear"]}), None),
    (
        grouped(a={"targets": ["Linear"], "num_bits": 8}, b={"targets": ["re:.*down_proj"]}),
        "down_proj: .* 8 bits, .*b says 4",
    ),
    (
        grouped(a={"targets": ["Linear"]}, b={"targets": ["re:.*up_proj"], "num_bits": 8}),
        "up_proj: .*have 4 bits, .*b says 8",
    ),
    (
        grouped(a={"targets": ["Linear"]}, b={"targets": ["re:down_proj"], "num_bits": 8}),
        "8 bits, but config_groups.a says 4",
    ),
    (
        grouped(a={"targets": ["re:.*mlp.*"]}, b={"targets": [DOWN], "num_bits": 8}),
        "k_proj and 3 more: .*no target in config_gr",
    ),
    (
        grouped(a={"targets": ["Linear"]}) | {"ignore": ["re:.*self_attn.*"]},
        "3 more: .*but the config's ignore has 're:.*self",
    ),
    (
        grouped(a={"targets": ["Linear"]}) | {"ignore": [DOWN]},
        f"down_proj: its weights are quantized, but .*ignore has '{DOWN}'",
    ),
    (
        grouped(a={"targets": ["Linear"]}, b={"targets": [DOWN], "num_bits": 8, "strategy": "channel"}),
        "groups have 32 columns, but config_groups.b says strategy channel",
    ),
    (
        grouped(a={"targets": ["Linear"]}, b={"targets": [DOWN], "num_bits": 8, "symmetric": False}),
        "b says symmetric: false",
    ),
    (CT | {"config_groups": {"W4A16": ["Linear"]}}, None),
    (grouped(a={"targets": ["Linear"]}, b={"targets": [f"language_model.{DOWN}"], "num_bits": 8}), None),
    (grouped(a={"targets": ["Linear"]}, b={"targets": ["down_proj"], "num_bits": 8}), "but config_groups.a says 4"),
]


@pytest.mark.parametrize(("config", "message"), TARGETS)
def test_matrices_are_compared_with_their_own_group_of_the_config(config, message, tmp_path) -> None:
    write("pack-quantized", tmp_path)
    written = packed(64, 128, 3, bits=8)
    edit(tmp_path, lambda tensors: tensors.update({f"{DOWN}.{part}": each for part, each in written.parts.items()}))
    configure(tmp_path, config)
    if message is None:
        found = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none").get_parameter(f"{DOWN}.weight")
        torch.testing.assert_close(found.detach(), written.weight, rtol=2e-6, atol=1e-8)
    else:
        with pytest.raises(CheckpointError, match=message):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_list_of_others_that_are_not_quantized_contradicts_nothing(tmp_path) -> None:
    write("awq", tmp_path)
    configure(tmp_path, FORMATS["awq"].config | {"modules_to_not_convert": ["lm_head", "gate", "mlp.down", None]})
    assert len(packed_modules(LlamaForCausalLM.from_pretrained(tmp_path))) == 7


@pytest.mark.parametrize(
    ("values", "module", "is_out"),
    [
        ({"modules_to_not_convert": ["lm_head"], "include_input_output_embeddings": True}, "lm_head", False),
        ({"modules_to_not_convert": ["lm_head"]}, "lm_head", True),
        ({"modules_to_not_convert": ["model.layers.1"]}, "model.layers.10.mlp.up_proj", False),
        ({"modules_to_not_convert": ["model.layers.1."]}, "model.layers.10.mlp.up_proj", False),
        ({"modules_to_not_convert": ["gate", "visual", "(", None]}, "model.layers.1.mlp.gate_proj", False),
        ({"modules_to_not_convert": "lm_head"}, "model.layers.1.mlp.gate_proj", False),
        ({"modules_to_not_convert": "lm_head"}, "lm_head", True),
        ({"ignored_layers": ["model.layers.1"]}, "model.layers.10.mlp.up_proj", False),
        ({"ignored_layers": ["model.layers.1."]}, "model.layers.1.mlp.up_proj", True),
    ],
)
def test_a_name_leaves_modules_out_as_in_the_projects_that_write_it(values, module, is_out) -> None:
    assert (Declared("fp8", values).left_out(module) is not None) == is_out
    assert Declared("compressed-tensors", values).left_out(module) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 8, "type": "int"}, "8-bit floating point, but config_groups.group_0 says int with 8 bits"),
        (
            {"num_bits": 8, "type": "float", "strategy": "tensor"},
            r"shape \[64, 1\], but config_groups.group_0 says str",
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]},
            r"\[64, 1\] for a weight of \[64, 64\], but config_groups.group_0.weights.block_structure \[64, 64\] makes",
        ),
    ],
)
def test_floats_are_compared_with_their_group_too(weights, message, tmp_path) -> None:
    write("float-quantized", tmp_path)
    configure(tmp_path, CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_bits_of_gptq_that_no_config_says_are_those_of_the_tensors(tmp_path) -> None:
    weights = write("gptq, 8 bits", tmp_path)
    configure(tmp_path, {})
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none").get_parameter(f"{Q}.weight")
    torch.testing.assert_close(found.detach(), weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


def test_a_config_without_quantized_weights_is_refused(tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    configure(tmp_path, GPTQ)
    with pytest.raises(
        CheckpointError, match="says quant_method gptq in quantization_config, but no weight is stored so"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)
