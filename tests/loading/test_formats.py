"""Checkpoints that others have quantized are read as what they stand for, or kept as codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import (
    CT,
    FORMATS,
    GPTQ,
    GROUP,
    MODIFIED,
    SHAPE,
    Format,
    Q,
    configure,
    edit,
    fill,
    gptq,
    groups,
    one_group,
    write,
)

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM
from fastllama.config.stored_quantization import declared_in
from fastllama.loading.coded import unpacked_words
from fastllama.loading.formats import decoded
from fastllama.loading.formats.gptq import AWQ_ORDER
from fastllama.loading.safetensors import find_tensors
from fastllama.quantization.linear import Packed, exact, packed_modules

IDS = torch.tensor([[5, 1, 90, 33, 7]])


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path) -> tuple[Format, Path, dict[str, torch.Tensor]]:
    return FORMATS[request.param], tmp_path, write(request.param, tmp_path)


def test_weights_are_those_that_the_codes_stand_for(checkpoint) -> None:
    _, folder, weights = checkpoint
    model = LlamaForCausalLM.from_pretrained(folder, "float64", quantize="none")
    assert not packed_modules(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=2e-6, atol=1e-8)


def test_codes_stay_codes_and_give_the_logits_of_the_weights(checkpoint) -> None:
    form, folder, weights = checkpoint
    model = LlamaForCausalLM.from_pretrained(folder)
    modules = packed_modules(model)
    assert {module.bits for module in modules.values()} == ({form.bits} if form.bits else set())
    for name, module in modules.items():
        assert isinstance(module, Packed)
        step = module.scales.float().abs().max()
        rounding = 2.0 ** (module.bits - 11)  # of an offset, at most 2^bits times the scale, to 11 bits
        assert (module.weight.double() - weights[f"{name}.weight"]).abs().max() <= rounding * step
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE | {"dtype": "float64"})).double()
    dense.load_state_dict(weights)
    with torch.inference_mode(), exact(model):
        logits, wanted = model.eval()(IDS).logits, dense.eval()(IDS).logits
    assert (logits - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    assert model.generate(IDS, max_new_tokens=3).shape == (1, 8)


def test_what_is_kept_as_codes_is_written_and_read_again(tmp_path) -> None:
    write("gptq", tmp_path / "gptq")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "gptq")
    model.save_pretrained(tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, module in packed_modules(model).items():
        assert torch.equal(module.weight, packed_modules(again)[name].weight)
    assert again.config == model.config


def test_stored_codes_can_be_quantized_otherwise(tmp_path) -> None:
    write("awq", tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="int8")
    assert {module.bits for module in packed_modules(model).values()} == {8}


IN_ORDER = list(range(8))
VECTORS = [
    (IN_ORDER, 0x76543210, 4, None),
    (IN_ORDER, 0x75316420, 4, AWQ_ORDER),
    ([0, 1, 2, 3], 0x03020100, 8, None),
    ([0, 1, 2, 3] * 4, -0x1B1B1B1C, 2, None),  # 0xE4E4E4E4
    ([7] * 8, 0x77777777, 4, None),
]


@pytest.mark.parametrize(("numbers", "word", "bits", "order"), VECTORS)
def test_words_are_unpacked_as_published(numbers, word, bits, order) -> None:
    assert unpacked_words(torch.tensor([[word]], dtype=torch.int32), bits, 1, order).tolist() == [numbers]


def of_words(words: list[int], rows: int) -> torch.Tensor:
    """Words below 2^32, as int32 of a shape."""
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(rows, -1)


ONES = torch.ones(1, 8, dtype=torch.float16)
EIGHT_ROWS = {"qweight": of_words([0x76543210] * 8, 1), "scales": ONES}
ALL_ROWS = [[float(value) for value in range(-8, 0)]] * 8
SCALE = {"weight_scale": ONES[:, :1], "weight_shape": torch.tensor([1, 8])}
MAP = {"weight.quant_map": torch.arange(16.0), "weight.absmax": torch.ones(1)}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 2]}
NF4 = MAP | {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(STATE).encode()), dtype=torch.uint8)}
MATRICES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], list[list[float]]]] = {
    "gptq": (EIGHT_ROWS | {"qzeros": of_words([0x77777777], 1)}, {"quant_method": "gptq", "bits": 4}, ALL_ROWS),
    "gptq, version 2": (
        EIGHT_ROWS | {"qzeros": of_words([0x88888888], 1)},
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        ALL_ROWS,
    ),
    "gptq, zero points in order": (
        EIGHT_ROWS | {"qzeros": of_words([0x76543210], 1)},
        {"quant_method": "gptq"},
        [[float(value - row - 1) for value in range(8)] for row in range(8)],
    ),
    "awq": (
        {"qweight": of_words([0x75316420, 0], 2), "qzeros": of_words([0x75316420], 1), "scales": 2 * ONES},
        {"quant_method": "awq"},
        [[0.0, -2.0 * row] for row in range(8)],
    ),
    "pack-quantized": (SCALE | {"weight_packed": of_words([0x76543210], 1)}, {}, ALL_ROWS[:1]),
    "pack-quantized with zero points": (
        SCALE | {"weight_packed": of_words([0x76543210], 1), "weight_zero_point": of_words([0x00000003], 1)},
        {},
        [[float(value) for value in range(-3, 5)]],
    ),
    "int-quantized, 3 bits": (
        {"weight": torch.arange(-4, 4, dtype=torch.int8).view(1, 8), "weight_scale": 2 * ONES[:, :1]},
        CT | {"config_groups": groups(3)},
        [[float(value) for value in range(-8, 8, 2)]],
    ),
    "mlx": (
        {
            "weight": of_words([0x76543210], 1).view(torch.uint32),
            "scales": 2 * ONES[:, :1],
            "biases": ONES[:, :1],
        },
        {"group_size": 8, "bits": 4},
        [[1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]],
    ),
    "bitsandbytes": (NF4 | {"weight": torch.tensor([[0x12]], dtype=torch.uint8)}, {}, [[1.0, 2.0]]),
    "torchao int4": (
        {
            "_weight_qdata": torch.tensor([[0x21, -0x78]], dtype=torch.int8),  # 0x88
            "_weight_scale": ONES[:, :1],
            "_weight_zero_point": 0.5 * ONES[:, :1],
        },
        {"quant_method": "torchao"},
        [[1.5, 2.5, -7.5, -7.5]],
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_small_matrices_are_read_as_published(name, tmp_path) -> None:
    parts, config, weight = MATRICES[name]
    header = {"m.weight": json.dumps({"_type": "Int4Tensor"})}
    save_file({f"m.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors", header)
    key = "quantization" if name == "mlx" else "quantization_config"
    (tmp_path / "config.json").write_text(json.dumps({key: config}))
    stored = decoded(find_tensors(tmp_path), declared_in(tmp_path), LlamaConfig())
    assert torch.cat([block for _, block in stored["m.weight"].blocks()]).tolist() == weight


def test_a_field_that_was_zero_borrows_where_gptqmodel_wrote_it(tmp_path) -> None:
    weights = {}
    for name, config in {"ours": {}, "gptqmodel": MODIFIED}.items():
        folder = tmp_path / name
        write("gptq", folder)
        edit(folder, lambda tensors: fill(tensors, "qzeros", -1))  # 0xFFFFFFFF
        configure(folder, GPTQ | config)
        weights[name] = LlamaForCausalLM.from_pretrained(folder, quantize="none").model.layers[0].mlp.up_proj.weight
    scale = load_file(tmp_path / "ours" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].float().T
    spread = scale.repeat_interleave(GROUP, 1)
    # each field plus one: 0; the whole word plus 0x11111111: 0, then 1 more for what was carried
    zero = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]).repeat(16).unsqueeze(1)
    torch.testing.assert_close(weights["ours"] - spread * zero, weights["gptqmodel"])


@pytest.mark.parametrize("less", [0, 1])
def test_symmetric_codes_whose_config_says_little_are_told_apart_by_their_zero_points(
    less, tmp_path, monkeypatch
) -> None:
    form = Format(lambda *at: gptq(*at, sym=True, less=less), {"quant_method": "gptq", "meta": "x"}, 4)
    monkeypatch.setitem(FORMATS, "gptq, little said", form)
    weights = write("gptq, little said", tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), weights[name], rtol=1e-3, atol=1e-4)


def test_a_group_size_that_is_not_said_is_that_of_the_zero_points(tmp_path) -> None:
    weights = write("awq gemv", tmp_path)
    configure(tmp_path, {"quant_method": "awq", "bits": 4, "version": "gemv"})
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), weights[name], rtol=1e-3, atol=1e-4)


def test_mlx_writes_its_config_under_two_keys(tmp_path) -> None:
    weights = write("mlx", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization"]}))
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none").get_parameter(f"{Q}.weight")
    torch.testing.assert_close(found.detach(), weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


def test_what_is_written_out_is_named_with_the_dtype(tmp_path, caplog) -> None:
    write("fp8", tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path, "bfloat16")
    assert "written out in bfloat16, as their codes cannot be kept: model.layers.0.mlp.down_proj" in caplog.text
    caplog.clear()
    LlamaForCausalLM.from_pretrained(tmp_path, "bfloat16", quantize="none")
    assert not caplog.text


def test_scales_may_be_powers_of_two(tmp_path) -> None:
    write("fp8", tmp_path)
    key = f"{Q}.weight_scale_inv"
    edit(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e8m0fnu)}))
    stored = load_file(tmp_path / "model.safetensors")
    spread = stored[key].float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float32").get_parameter(f"{Q}.weight").detach()
    assert torch.equal(found, stored[f"{Q}.weight"].float() * spread)


def test_biases_of_zeros_that_no_config_names_are_left_out(tmp_path) -> None:
    write("gptq", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(64)}))
    assert LlamaForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.bias is None
    edit(tmp_path, lambda tensors: tensors[f"{Q}.bias"].fill_(1))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: unexpected"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.down_proj", ".*down_proj"])
def test_auto_round_has_bits_of_single_modules(key, tmp_path) -> None:
    weights = write("auto-round", tmp_path)
    name = "model.layers.0.mlp.down_proj"
    written = gptq(64, 128, 3, bits=8)
    edit(tmp_path, lambda tensors: tensors.update({f"{name}.{part}": each for part, each in written.parts.items()}))
    configure(tmp_path, FORMATS["auto-round"].config | {"extra_config": {key: {"bits": 8}}})
    model = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none")
    torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), written.weight, rtol=2e-6, atol=1e-8)
    found = model.get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)
    assert packed_modules(LlamaForCausalLM.from_pretrained(tmp_path))[name].bits == 8


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_a_product_of_matrices_with_other_groups_is_written_out(name, tmp_path) -> None:
    write("gptq", tmp_path)
    config = dict(GPTQ)
    del config["group_size"]
    configure(tmp_path, config)
    edit(tmp_path, lambda tensors: one_group(tensors, f"model.layers.0.self_attn.{name}"))
    expected = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not [module for module in packed_modules(model) if module.endswith(("q_proj", "k_proj", "v_proj"))]
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    with torch.inference_mode(), exact(model), exact(again):
        assert torch.equal(model(IDS).logits, again(IDS).logits)
        assert (model(IDS).logits - expected(IDS).logits).abs().max() <= 2e-3 * expected(IDS).logits.abs().max()


def test_groups_that_panels_do_not_have_are_written_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("stored_formats.GROUP", 16)
    weights = write("gptq", tmp_path)
    configure(tmp_path, GPTQ | {"group_size": 16})
    model = LlamaForCausalLM.from_pretrained(tmp_path, "float64")
    assert not packed_modules(model)
    found = model.get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


def test_bitsandbytes_may_store_bytes_as_another_dtype(tmp_path) -> None:
    weights = write("bitsandbytes nf4", tmp_path)
    key = f"{Q}.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: tensors[key].flatten().view(torch.bfloat16).unsqueeze(1)}))
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float64").get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


def test_an_older_file_of_its_own_says_how_weights_are_quantized(tmp_path) -> None:
    weights = write("gptq", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(
        json.dumps(config.pop("quantization_config") | {"quant_method": None})
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none")
    found = model.get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)
