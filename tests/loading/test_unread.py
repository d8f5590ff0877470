"""Quantization that is not read, by name; and warnings about what is read in one of several ways."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from stored_formats import CT, GPTQ, SHAPE, Q, configure, edit, fill, write

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM
from fastllama.quantization.linear import packed_modules

METHODS = (
    "aqlm", "bitnet", "eetq", "fouroversix", "fp_quant", "higgs", "hqq", "metal", "mxfp4", "nvfp4", "quanto", "quark",
    "quip", "sinq", "spqr", "vptq",
)  # fmt: skip
UNREAD: list[tuple[str, dict[str, Any]]] = [
    *((f"quant_method '{method}' is not read, only gptq", {"quant_method": method, "bits": 4}) for method in METHODS),
    ("quant_algo 'NVFP4' is not read, only FP8", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    ("quant_algo 'W4A8_AWQ' is not read", {"quant_algo": "W4A8_AWQ"}),
    ("data_type 'nv_fp' is not read, only int", {"quant_method": "auto-round", "data_type": "nv_fp"}),
    ("format 'nvfp4-pack-quantized' is not read, only pack-quantized", CT | {"format": "nvfp4-pack-quantized"}),
    (
        "format 'mxfp8-quantized' is not",
        CT | {"format": "dense", "config_groups": {"a": {"format": "mxfp8-quantized"}}},
    ),
]


@pytest.mark.parametrize(("message", "config"), UNREAD, ids=[each[0] for each in UNREAD])
def test_methods_that_are_not_read_are_named(message, config, tmp_path) -> None:
    write("gptq", tmp_path)
    configure(tmp_path, config)
    with pytest.raises(
        NotImplementedError, match=f"config.json: quantization_config: {message}.*load the original, which"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_modes_of_mlx_that_are_not_read_are_named(tmp_path) -> None:
    write("mlx", tmp_path)
    configure(tmp_path, {"group_size": 32, "bits": 4, "mode": "mxfp4"})
    with pytest.raises(NotImplementedError, match="quantization: mode 'mxfp4' is not read, only affine; load the orig"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("is_said", [True, False])
def test_nvfp4_of_modelopt_is_named_by_its_file_or_by_its_tensors(is_said, tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    if is_said:
        file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    parts = {"weight": torch.zeros(64, 32).byte(), "weight_scale": torch.zeros(64, 4).to(torch.float8_e4m3fn)}
    parts |= {"weight_scale_2": torch.tensor(1.0)}
    edit(tmp_path, lambda tensors: tensors.update({f"{Q}.{part}": each for part, each in parts.items()}))
    message = (
        "hf_quant_config.json: quant_algo 'NVFP4' is not read, only FP8" if is_said else "(nvfp4) is not read; quant"
    )
    with pytest.raises(NotImplementedError if is_said else CheckpointError, match=re.escape(message)):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_zero_points_that_readers_take_differently_are_named(tmp_path, caplog) -> None:
    write("gptq", tmp_path)
    edit(tmp_path, lambda tensors: fill(tensors, "qzeros", -1))
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "zero points of 15 before 1 is added" in caplog.text


def test_zero_points_that_the_config_denies_are_named(tmp_path, caplog) -> None:
    write("gptq", tmp_path)
    configure(tmp_path, GPTQ | {"sym": True})
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "its zero points are not read, as the config says sym; 8 is taken" in caplog.text


def test_a_file_that_is_left_from_other_weights_is_passed_over(tmp_path, caplog) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert not packed_modules(LlamaForCausalLM.from_pretrained(tmp_path))
    assert "quantize_config.json is left from other weights" in caplog.text


def test_what_is_wrong_in_many_layers_is_said_once(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 20)
    write("gptq", tmp_path)
    configure(tmp_path, GPTQ | {"bits": 8})
    with pytest.raises(CheckpointError, match=r"model\.layers\.\S+ and 139 more: its codes have 4 bits") as error:
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(error.value.problems) == 1
    configure(tmp_path, GPTQ | {"sym": True})
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert caplog.text.count("its zero points are not read, as the config says sym") == 1
    configure(tmp_path, GPTQ)
    edit(tmp_path, lambda tensors: fill(tensors, "scales", 6e4))
    edit(tmp_path, lambda tensors: tensors.update({k: v.float() * 10 for k, v in tensors.items() if ".scales" in k}))
    with pytest.raises(CheckpointError, match="139 more: its scales do not fit float16"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_versions_of_gptq_that_nothing_says_are_assumed_with_a_warning(tmp_path, caplog) -> None:
    weights = write("gptq", tmp_path)
    edit(tmp_path, lambda tensors: None)
    configure(tmp_path, {})
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none").get_parameter(f"{Q}.weight")
    torch.testing.assert_close(found.detach(), weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)
    assert caplog.text.count("no config says whether its zero points are stored less 1") == 1
    assert (
        "version 1 is assumed. If that is wrong, put quant_method 'gptq' and checkpoint_format 'gptq_v2'" in caplog.text
    )
    caplog.clear()
    configure(tmp_path, GPTQ)
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "version 1" not in caplog.text
