"""Folders that other projects' own code has quantized and written, against the model that it computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.quantization.linear import packed_modules

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
SIZES = SHAPE | {"intermediate_size": 128, "initializer_range": 0.02}
IDS = torch.arange(12)[None]
ROUNDED = 0.02  # of the largest logit: scales in float16, activations of 8 bits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is quantized."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def check(folder: Path, wanted: torch.Tensor, stays_codes: bool, exactly: bool = True) -> None:
    """The folder's logits, with the weights written out and as it loads."""
    largest = wanted.abs().max()
    written_out = LlamaForCausalLM.from_pretrained(folder, dtype="float32", quantize="none")
    bound = 1e-5 if exactly else ROUNDED
    assert (written_out(IDS).logits - wanted).abs().max() <= bound * largest
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    assert (model(IDS).logits - wanted).abs().max() <= ROUNDED * largest
    assert bool(list(packed_modules(model))) == stays_codes


@pytest.mark.parametrize("name", ["int8", "int4 in groups", "float8"])
def test_torchao(plain: Path, tmp_path: Path, name: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: torchao.Int8WeightOnlyConfig(version=2),
        "int4 in groups": lambda: torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(32)
        ),
        "float8": lambda: torchao.Float8WeightOnlyConfig(),
    }[name]()
    save(plain, tmp_path, transformers.TorchAoConfig(config), stays_codes=name != "float8")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(plain: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    save(plain, tmp_path, config, stays_codes=bits == 8, exactly=bits == 4)  # with 8 it computes in float16


def save(plain: Path, folder: Path, config: Any, stays_codes: bool, exactly: bool = True) -> None:
    """Have transformers quantize and write the model, then check the folder."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=config)
    theirs.save_pretrained(folder)
    check(folder, theirs(IDS).logits, stays_codes, exactly)


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC"])
def test_compressed_tensors(plain: Path, tmp_path: Path, preset: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = 32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            scale, zero = module.weight_scale, getattr(module, "weight_zero_point", None)
            blocks = module.weight.detach().reshape(*(scale.shape if scale.numel() > 1 else (1, 1)), -1)
            found, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            scale.data.copy_(found.view_as(scale))
            if zero is not None:
                zero.data.copy_(zeros.view_as(zero))
            module.quantization_scheme.input_activations = None  # weights alone are compared
    wanted = theirs(IDS).logits
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    check(tmp_path, wanted, stays_codes=not preset.startswith("FP8"))
