"""Checkpoints that others have quantized, written here from the defining formulas of their formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM
from fastllama.loading.coded import unpacked_words
from fastllama.loading.formats.gptq import AWQ_ORDER
from fastllama.quantization.linear import Packed, exact, packed_modules

K, GROUP = 64, 32
SHAPE = {
    "vocab_size": 96, "hidden_size": K, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
IDS = torch.tensor([[5, 1, 90, 33, 7]])
Tensors = dict[str, torch.Tensor]


class Written(NamedTuple):
    """A matrix as a format writes it: its tensors by part, and the float64 weights that they stand for."""

    parts: Tensors
    weight: torch.Tensor


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers along the last dimension in int32 words, the first in the lowest bits."""
    rows = []
    for row in numbers.reshape(-1, numbers.shape[-1]).tolist():
        each = range(0, len(row), 32 // bits)
        packed = [sum(value << bits * i for i, value in enumerate(row[first : first + 32 // bits])) for first in each]
        rows.append([word - (1 << 32) * (word >= 1 << 31) for word in packed])
    return torch.tensor(rows, dtype=torch.int32).view(*numbers.shape[:-1], -1)


def made(n: int, k: int, bits: int, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[n, k]``, scales ``[n, g]`` in float16 and zero points ``[n, g]``."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 2**bits, (n, k), generator=generator)
    scale = (0.5 + torch.rand(n, k // group, generator=generator)) / (2**bits * k**0.5)
    return code, scale.half(), torch.randint(1, 2**bits, (n, k // group), generator=generator)


def meant(code: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, group_k: torch.Tensor) -> torch.Tensor:
    """scale · (code - zero), in float64."""
    zero = zero.double() if isinstance(zero, torch.Tensor) else torch.full_like(scale.double(), zero)
    return scale.double()[:, group_k] * (code.double() - zero[:, group_k])


def gptq(n: int, k: int, seed: int, bits: int = 4, sym: bool = False, less: int = 1, shuffled: bool = False) -> Written:
    code, scale, zero = made(n, k, bits, GROUP, seed)
    group_k = torch.arange(k) // GROUP
    if shuffled:
        group_k = group_k[torch.randperm(k, generator=torch.Generator().manual_seed(7))]
    zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
    parts = {
        "qweight": words(code, bits).T.contiguous(),
        "qzeros": words(zero.T - less, bits),
        "scales": scale.T.contiguous(),
        "g_idx": group_k.int(),
    }
    return Written(parts, meant(code, scale, zero, group_k))


def awq_words(number: torch.Tensor) -> torch.Tensor:
    """Columns 0, 2, 4, 6, 1, 3, 5, 7 of eight, in this order in a word."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return words(number.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)


def awq(n: int, k: int, seed: int, zero_point: bool = True) -> Written:
    code, scale, zero = made(n, k, 4, GROUP, seed)
    parts = {"qweight": awq_words(code.T), "qzeros": awq_words(zero.T), "scales": scale.T.contiguous()}
    if not zero_point:
        del parts["qzeros"]
    return Written(parts, meant(code, scale, zero if zero_point else 8, torch.arange(k) // GROUP))


def awq_gemv(n: int, k: int, seed: int) -> Written:
    code, scale, zero = made(n, k, 4, GROUP, seed)
    columns = -(-(k // GROUP) // 8 // 4) * 4 * 8  # groups of 32: a multiple of four words
    padded = torch.zeros(n, columns, dtype=torch.int64)
    padded[:, : k // GROUP] = zero
    scales = torch.zeros(n, columns, dtype=torch.float16)
    scales[:, : k // GROUP] = scale
    parts = {"qweight": words(code, 4), "qzeros": words(padded, 4), "scales": scales}
    return Written(parts, meant(code, scale, zero, torch.arange(k) // GROUP))


def packed(n: int, k: int, seed: int, bits: int = 4, symmetric: bool = True, shuffled: bool = False) -> Written:
    code, scale, zero = made(n, k, bits, GROUP, seed)
    group_k = torch.arange(k) // GROUP
    group_k = group_k.flip(0) if shuffled else group_k
    middle = torch.full_like(zero, 2 ** (bits - 1))
    parts = {"weight_packed": words(code, bits), "weight_scale": scale.to(torch.bfloat16)}
    parts["weight_shape"] = torch.tensor([n, k])
    if not symmetric:
        parts["weight_zero_point"] = words(zero.T, bits).T.contiguous()
    if shuffled:
        parts["weight_g_idx"] = group_k.int()
    return Written(parts, meant(code, parts["weight_scale"], middle if symmetric else zero, group_k))


def int8(n: int, k: int, seed: int, shuffled: bool = False) -> Written:
    group = GROUP if shuffled else k
    code, scale, _ = made(n, k, 8, group, seed)
    parts = {"weight": (code - 128).to(torch.int8), "weight_scale": scale}
    group_k = torch.arange(k) // group
    if shuffled:
        group_k = group_k[torch.randperm(k, generator=torch.Generator().manual_seed(7))]
        parts["weight_g_idx"] = group_k.int()
    return Written(parts, meant(code, scale, 128, group_k))


def float8(n: int, k: int, seed: int, name: str = "weight_scale_inv", block: int | None = 32) -> Written:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
    height, width = (block, block) if block else (1, k)
    scale = 0.01 + torch.rand(-(-n // height), -(-k // width), generator=torch.Generator().manual_seed(seed)) / 100
    spread = scale.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :k]
    return Written({"weight": weight, name: scale}, weight.double() * spread.double())


def nf4(n: int, k: int, seed: int, nested: bool = True, kind: str = "nf4") -> Written:
    generator = torch.Generator().manual_seed(seed)
    code, table = torch.randint(0, 16, (n * k,), generator=generator), torch.linspace(-1, 1, 16)
    blocks = n * k // 64
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [n, k]}
    parts = {
        "weight": (code[::2] << 4 | code[1::2]).to(torch.uint8).unsqueeze(1), "weight.quant_map": table
    }  # fmt: skip
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        inner = torch.randint(0, 256, (blocks,), generator=generator)
        outer, inner_table = torch.rand(-(-blocks // 256)) / 20, torch.linspace(-1, 1, 256)
        absmax = inner_table[inner].double() * outer.double()[torch.arange(blocks) // 256] + 0.05
        parts |= {"weight.absmax": inner.to(torch.uint8), "weight.nested_absmax": outer}
        parts["weight.nested_quant_map"] = inner_table
    else:
        parts["weight.absmax"] = torch.rand(blocks, generator=generator) / 10
        absmax = parts["weight.absmax"].double()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return Written(parts, (table[code].double() * absmax[torch.arange(n * k) // 64]).view(n, k))


def scb(n: int, k: int, seed: int) -> Written:
    code, scale, _ = made(n, k, 8, k, seed)
    maximum = 127 * scale.float().squeeze(1)
    parts = {"weight": (code - 128).clamp(-127, 127).to(torch.int8), "SCB": maximum}
    parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return Written(parts, parts["weight"].double() * (maximum / 127).double().unsqueeze(1))


def mlx(n: int, k: int, seed: int, bits: int = 4) -> Written:
    code, scale, zero = made(n, k, bits, GROUP, seed)
    bias = (-scale.double() * zero).to(torch.bfloat16)
    parts = {"weight": words(code, bits).view(torch.uint32), "scales": scale, "biases": bias}
    group_k = torch.arange(k) // GROUP
    return Written(parts, scale.double()[:, group_k] * code + bias.double()[:, group_k])


def torchao_int4(n: int, k: int, seed: int) -> Written:
    code, scale, _ = made(n, k, 4, GROUP, seed)
    zero = (torch.rand(n, k // GROUP) / 100).half()
    signed = code - 8
    qdata = (signed[:, 1::2] << 4 | signed[:, ::2] & 15).to(torch.int8)
    parts = {"_weight_qdata": qdata, "_weight_scale": scale.T.contiguous(), "_weight_zero_point": zero.T.contiguous()}
    group_k = torch.arange(k) // GROUP
    return Written(parts, scale.double()[:, group_k] * signed + zero.double()[:, group_k])


def torchao_int8(n: int, k: int, seed: int) -> Written:
    code, scale, _ = made(n, k, 8, k, seed)
    parts = {"_weight_qdata": (code - 128).to(torch.int8), "_weight_scale": scale}
    return Written(parts, meant(code, scale, 128, torch.zeros(k, dtype=torch.long)))


def torchao_float8(n: int, k: int, seed: int) -> Written:
    written = float8(n, k, seed, "_weight_scale", block=None)
    return Written({"_weight_qdata": written.parts["weight"], **written.parts}, written.weight)


class Format(NamedTuple):
    """How a checkpoint is written, and what becomes of it."""

    write: Callable[[int, int, int], Written]
    config: dict[str, Any]
    bits: int | None  # as which it is kept; None: as its weights
    kind: str = ""  # torchao's class


def groups(bits: int, kind: str = "int", **more: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **more}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MODIFIED = {"meta": {"quantizer": ["gptqmodel:1.0"]}}
FORMATS: dict[str, Format] = {
    "gptq": Format(gptq, GPTQ, 4),
    "gptq, symmetric": Format(lambda *at: gptq(*at, sym=True), GPTQ | {"sym": True}, 4),
    "gptq, version 2": Format(lambda *at: gptq(*at, less=0), GPTQ | {"checkpoint_format": "gptq_v2"}, 4),
    "gptq by gptqmodel": Format(gptq, GPTQ | MODIFIED, 4),
    "gptq, 8 bits": Format(lambda *at: gptq(*at, bits=8), GPTQ | {"bits": 8}, 8),
    "gptq, 2 bits": Format(lambda *at: gptq(*at, bits=2), GPTQ | {"bits": 2}, 4),
    "gptq, act-order": Format(lambda *at: gptq(*at, shuffled=True), GPTQ | {"desc_act": True}, None),
    "auto-round": Format(gptq, GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 4),
    "awq": Format(awq, AWQ, 4),
    "awq without zero points": Format(lambda *at: awq(*at, zero_point=False), AWQ | {"zero_point": False}, 4),
    "awq gemv": Format(awq_gemv, AWQ | {"version": "gemv"}, 4),
    "pack-quantized": Format(packed, CT | {"config_groups": groups(4, symmetric=True)}, 4),
    "pack-quantized with zero points": Format(
        lambda *at: packed(*at, symmetric=False), CT | {"config_groups": groups(4, symmetric=False)}, 4
    ),
    "pack-quantized, 8 bits": Format(lambda *at: packed(*at, bits=8), CT | {"config_groups": groups(8)}, 8),
    "pack-quantized, act-order": Format(
        lambda *at: packed(*at, shuffled=True), CT | {"config_groups": groups(4, actorder="group")}, None
    ),
    "int-quantized": Format(int8, CT | {"config_groups": groups(8)}, 8),
    "int-quantized, act-order": Format(
        lambda *at: int8(*at, shuffled=True), CT | {"config_groups": groups(8, actorder="group")}, None
    ),
    "float-quantized": Format(
        lambda *at: float8(*at, "weight_scale", None), CT | {"config_groups": groups(8, "float")}, None
    ),
    "fp8": Format(float8, {"quant_method": "fp8", "weight_block_size": [32, 32]}, None),
    "fbgemm_fp8": Format(lambda *at: float8(*at, "weight_scale", None), {"quant_method": "fbgemm_fp8"}, None),
    "bitsandbytes nf4": Format(nf4, BNB | {"bnb_4bit_quant_type": "nf4"}, None),
    "bitsandbytes fp4": Format(lambda *at: nf4(*at, False, "fp4"), {"load_in_4bit": True}, None),
    "bitsandbytes int8": Format(scb, {"load_in_8bit": True}, 8),
    "mlx": Format(mlx, {"group_size": GROUP, "bits": 4}, 4),
    "mlx, 8 bits": Format(lambda *at: mlx(*at, bits=8), {"group_size": GROUP, "bits": 8}, 8),
    "torchao int4": Format(torchao_int4, {"quant_method": "torchao"}, 4, "Int4Tensor"),
    "torchao int8": Format(torchao_int8, {"quant_method": "torchao"}, 8, "Int8Tensor"),
    "torchao float8": Format(torchao_float8, {"quant_method": "torchao"}, None, "Float8Tensor"),
}


def write(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A model in a format; returns the float64 weights by name."""
    form = FORMATS[name]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = model.config.to_dict()
    key = "quantization" if name.startswith("mlx") else "quantization_config"
    (folder / "config.json").write_text(json.dumps(config | {key: form.config}))
    tensors, weights, metadata = {}, {}, {}
    for seed, (parameter, tensor) in enumerate(model.named_parameters()):
        module = parameter.removesuffix(".weight")
        is_quantized = module.endswith("_proj") or (name.startswith("mlx") and tensor.dim() == 2)
        weights[parameter] = tensor.detach().double()
        if is_quantized:
            parts, weights[parameter] = form.write(*tensor.shape, seed)
            if form.kind:
                parts = {part: each for part, each in parts.items() if part.startswith("_weight")}
                metadata[parameter] = json.dumps({"_type": form.kind, "_data": {}, "_tensor_data_names": []})
            tensors |= {f"{module}.{part}": each for part, each in parts.items()}
        else:
            tensors[parameter] = tensor.detach()
    save_file(tensors, folder / "model.safetensors", metadata | {"format": "pt"})
    return weights


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


VECTORS = [
    ([0, 1, 2, 3, 4, 5, 6, 7], 0x76543210, None),
    ([0, 1, 2, 3, 4, 5, 6, 7], 0x75316420, AWQ_ORDER),
]


@pytest.mark.parametrize(("numbers", "word", "order"), VECTORS)
def test_words_are_unpacked_as_published(numbers, word, order) -> None:
    assert unpacked_words(torch.tensor([[word]], dtype=torch.int32), 4, 1, order).tolist() == [numbers]


def test_a_field_that_was_zero_borrows_where_gptqmodel_wrote_it(tmp_path) -> None:
    weights = {}
    for name, config in {"ours": {}, "gptqmodel": MODIFIED}.items():
        folder = tmp_path / name
        write("gptq", folder)
        _edit(folder, lambda tensors: _fill(tensors, "qzeros", -1))  # 0xFFFFFFFF
        _config(folder, GPTQ | config)
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
    _config(tmp_path, {"quant_method": "awq", "bits": 4, "version": "gemv"})
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), weights[name], rtol=1e-3, atol=1e-4)


def test_zero_points_that_readers_take_differently_are_named(tmp_path, caplog) -> None:
    write("gptq", tmp_path)
    _edit(tmp_path, lambda tensors: _fill(tensors, "qzeros", -1))
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "zero points of 15 before 1 is added" in caplog.text


Edit = Callable[[Tensors], Any]
Q = "model.layers.0.self_attn.q_proj"
BAD: list[tuple[str, dict[str, Any], Edit, str]] = [
    ("gptq", {"bits": 3}, lambda t: None, "codes of 3 bits are not read; expected 2 or 4 or 8"),
    (
        "gptq",
        {"group_size": 64},
        lambda t: None,
        "scales of 2 groups do not fit 64 columns and the config's group_size 64",
    ),
    ("gptq", {"quant_method": "awq"}, lambda t: None, "tensors are those of gptq, but quant_method is 'awq'"),
    ("gptq", {"is_marlin_format": True}, lambda t: None, "in an order for GPUs"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.scales"), "scales is missing"),
    ("gptq", {}, lambda t: t[f"{Q}.g_idx"].fill_(9), "g_idx names groups from 9 to 9, there are 2"),
    ("gptq", {}, lambda t: _fill(t, "scales", float("nan")), "holds NaN or infinity"),
    ("gptq", {"bits": 8}, lambda t: None, "q_proj: its codes have 4 bits, but the config's bits is 8; correct"),
    ("awq", {"version": "gemv_fast"}, lambda t: None, "in an order for GPUs"),
    ("awq", {"bits": 8}, lambda t: None, "codes of 8 bits are not read; expected 4"),
    ("pack-quantized", {"transform_config": {"a": 1}}, lambda t: None, "weights are rotated"),
    ("pack-quantized", {"config_groups": groups(8)}, lambda t: None, "codes have 4 bits, but config_groups has 8"),
    ("int-quantized", {"sparsity_config": {"format": "sparse-24"}}, lambda t: None, "stored sparsely"),
    ("fp8", {"weight_block_size": [64, 64]}, lambda t: None, r"blocks of \[64, 64\]"),
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
    ("gptq", {"desc_act": True}, lambda t: _drop(t, "g_idx"), "g_idx is missing, and desc_act is true"),
    ("gptq", {"dynamic": [1]}, lambda t: None, "values are damaged"),
    ("gptq", {}, lambda t: t.pop(f"{Q}.qweight"), "the rest of this matrix"),
    ("awq", {}, lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    ("awq gemv", {"group_size": 0}, lambda t: None, "the config's group_size is 0"),
    ("pack-quantized", {"config_groups": groups(4, group_size=64)}, lambda t: None, "groups have 32 columns, but"),
    ("pack-quantized", {"config_groups": groups(4, "float")}, lambda t: None, "codes are integers, but"),
    ("pack-quantized", {"config_groups": groups(4, symmetric=False)}, lambda t: None, "weight_zero_point is missing"),
    ("pack-quantized", {"config_groups": groups(4, actorder="group")}, lambda t: None, "weight_g_idx is missing"),
    ("pack-quantized", {}, lambda t: _fill(t, "weight_scale", 1e-8), "scales do not fit float16"),
    ("pack-quantized", {}, lambda t: _fill(t, "weight_scale", 1e8), "scales do not fit float16"),
    ("bitsandbytes nf4", {}, lambda t: t.update({f"{Q}.weight.nested_absmax": torch.ones(9)}), "nested_absmax has the"),
    ("fp8", {}, lambda t: t.pop(f"{Q}.weight_scale_inv"), "q_proj.weight: 8-bit floating point without its scale"),
    ("fp8", {}, lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}), r"blocks of \[32, 32\]"),
    ("fp8", {}, lambda t: t[f"{Q}.weight_scale_inv"].fill_(float("inf")), "holds NaN"),
    ("fp8", {"weight_block_size": 128}, lambda t: None, "values are damaged"),
    ("torchao float8", {}, lambda t: t.update({f"{Q}._weight_qdata": torch.zeros(64, 64).char()}), "stored as I8"),
    ("bitsandbytes fp4", {}, lambda t: t[f"{Q}.weight.absmax"].fill_(float("inf")), "holds NaN"),
    ("mlx", {"mode": "mxfp4"}, lambda t: None, "mxfp4 codes of 4 bits are not read"),
    ("torchao int4", {"quant_method": "gptq"}, lambda t: None, "those of torchao"),
]


@pytest.mark.parametrize(("name", "config", "edit", "message"), BAD, ids=[f"{each[0]}: {each[3][:20]}" for each in BAD])
def test_what_is_not_read_is_named(name, config, edit, message, tmp_path) -> None:
    write(name, tmp_path)
    _config(tmp_path, FORMATS[name].config | config)
    _edit(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


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
    _edit(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e8m0fnu)}))
    stored = load_file(tmp_path / "model.safetensors")
    spread = stored[key].float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float32").get_parameter(f"{Q}.weight").detach()
    assert torch.equal(found, stored[f"{Q}.weight"].float() * spread)


def test_biases_of_zeros_that_no_config_names_are_left_out(tmp_path) -> None:
    write("gptq", tmp_path)
    _edit(tmp_path, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(64)}))
    assert LlamaForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.bias is None
    _edit(tmp_path, lambda tensors: tensors[f"{Q}.bias"].fill_(1))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: unexpected"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.down_proj", ".*down_proj"])
def test_auto_round_has_bits_of_single_modules(key, tmp_path) -> None:
    weights = write("auto-round", tmp_path)
    name = "model.layers.0.mlp.down_proj"
    written = gptq(64, 128, 3, bits=8)
    _edit(tmp_path, lambda tensors: tensors.update({f"{name}.{part}": each for part, each in written.parts.items()}))
    _config(tmp_path, FORMATS["auto-round"].config | {"extra_config": {key: {"bits": 8}}})
    model = LlamaForCausalLM.from_pretrained(tmp_path, "float64", quantize="none")
    torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), written.weight, rtol=2e-6, atol=1e-8)
    found = model.get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)
    assert packed_modules(LlamaForCausalLM.from_pretrained(tmp_path))[name].bits == 8


def test_zero_points_that_the_config_denies_are_named(tmp_path, caplog) -> None:
    write("gptq", tmp_path)
    _config(tmp_path, GPTQ | {"sym": True})
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "its zero points are not read, as the config says sym; 8 is taken" in caplog.text


def test_a_file_that_is_left_from_other_weights_is_passed_over(tmp_path, caplog) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert not packed_modules(LlamaForCausalLM.from_pretrained(tmp_path))
    assert "quantize_config.json is left from other weights" in caplog.text


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_a_product_of_matrices_with_other_groups_is_written_out(name, tmp_path) -> None:
    write("gptq", tmp_path)
    config = dict(GPTQ)
    del config["group_size"]
    _config(tmp_path, config)
    _edit(tmp_path, lambda tensors: _one_group(tensors, f"model.layers.0.self_attn.{name}"))
    expected = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not [module for module in packed_modules(model) if module.endswith(("q_proj", "k_proj", "v_proj"))]
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    with torch.inference_mode(), exact(model), exact(again):
        assert torch.equal(model(IDS).logits, again(IDS).logits)
        assert (model(IDS).logits - expected(IDS).logits).abs().max() <= 2e-3 * expected(IDS).logits.abs().max()


def test_groups_that_panels_do_not_have_are_written_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tests.loading.test_formats.GROUP", 16)
    weights = write("gptq", tmp_path)
    _config(tmp_path, GPTQ | {"group_size": 16})
    model = LlamaForCausalLM.from_pretrained(tmp_path, "float64")
    assert not packed_modules(model)
    found = model.get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


def test_bitsandbytes_may_store_bytes_as_another_dtype(tmp_path) -> None:
    weights = write("bitsandbytes nf4", tmp_path)
    key = f"{Q}.weight"
    _edit(tmp_path, lambda tensors: tensors.update({key: tensors[key].flatten().view(torch.bfloat16).unsqueeze(1)}))
    found = LlamaForCausalLM.from_pretrained(tmp_path, "float64").get_parameter(f"{Q}.weight").detach()
    torch.testing.assert_close(found, weights[f"{Q}.weight"], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quip", None])
def test_methods_that_are_not_read_are_named(method, tmp_path) -> None:
    write("gptq", tmp_path)
    _config(tmp_path, {"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"quantization_config.quant_method is {method!r}; expected one of gptq"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_config_without_quantized_weights_is_refused(tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    _config(tmp_path, GPTQ)
    with pytest.raises(
        CheckpointError, match="says quant_method gptq in quantization_config, but no weight is stored so"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)


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


def _fill(tensors: Tensors, part: str, value: float) -> None:
    for key, tensor in tensors.items():
        if key.endswith(f".{part}"):
            tensor.fill_(value)


def _drop(tensors: Tensors, part: str) -> None:
    for key in [key for key in tensors if key.endswith(f".{part}")]:
        del tensors[key]


def _one_group(tensors: Tensors, module: str) -> None:
    """Let all columns of a module be one group."""
    for part in ("scales", "qzeros"):
        tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][:1].contiguous()
    tensors[f"{module}.g_idx"] = torch.zeros_like(tensors[f"{module}.g_idx"])


def _edit(folder: Path, change: Edit) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def _config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = "quantization" if "quantization" in config else "quantization_config"
    (folder / "config.json").write_text(json.dumps(config | {key: quantization}))
