"""Checkpoints as others quantize them, written from the defining formulas of their formats, and edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastllama import LlamaConfig, LlamaForCausalLM

K, GROUP = 64, 32
SHAPE = {
    "vocab_size": 96, "hidden_size": K, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
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


def int8(n: int, k: int, seed: int, shuffled: bool = False, bits: int = 8) -> Written:
    group, middle = GROUP if shuffled or bits < 8 else k, 2 ** (bits - 1)
    code, scale, _ = made(n, k, bits, group, seed)
    parts = {"weight": (code - middle).to(torch.int8), "weight_scale": scale}
    group_k = torch.arange(k) // group
    if shuffled:
        group_k = group_k[torch.randperm(k, generator=torch.Generator().manual_seed(7))]
        parts["weight_g_idx"] = group_k.int()
    return Written(parts, meant(code, scale, middle, group_k))


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


def torchao_intx(n: int, k: int, seed: int, has_zeros: bool = True) -> Written:
    """Codes of int4, a byte each."""
    code, scale, zero = made(n, k, 4, GROUP, seed)
    zero = zero if has_zeros else torch.full_like(zero, 8)
    parts = {"_weight_qdata": (code - 8).to(torch.int8), "_weight_scale": scale}
    parts["_weight_zero_point"] = (zero - 8).to(torch.int8)
    return Written(parts, meant(code, scale, zero, torch.arange(k) // GROUP))


def torchao_float8(n: int, k: int, seed: int) -> Written:
    written = float8(n, k, seed, "_weight_scale", block=None)
    return Written({"_weight_qdata": written.parts["weight"], **written.parts}, written.weight)


class Format(NamedTuple):
    """How a checkpoint is written, and what becomes of it."""

    write: Callable[[int, int, int], Written]
    config: dict[str, Any]
    bits: int | None  # as which it is kept; None: as its weights
    kind: str = ""  # torchao's class
    data: Any = None  # what the header says of it


def groups(bits: int, kind: str = "int", **more: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **more}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT4 = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}}
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
    "naive-quantized, 4 bits": Format(
        lambda *at: int8(*at, bits=4), CT | {"format": "naive-quantized", "config_groups": groups(4, group_size=32)}, 4
    ),
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
    "torchao intx": Format(torchao_intx, {"quant_method": "torchao"}, 4, "IntxUnpackedToInt8Tensor", INT4),
    "torchao intx, symmetric": Format(
        lambda *at: torchao_intx(*at, False), {"quant_method": "torchao"}, 4, "IntxUnpackedToInt8Tensor", INT4
    ),
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
                metadata[parameter] = json.dumps(
                    {"_type": form.kind, "_data": form.data or {}, "_tensor_data_names": []}
                )
            tensors |= {f"{module}.{part}": each for part, each in parts.items()}
        else:
            tensors[parameter] = tensor.detach()
    save_file(tensors, folder / "model.safetensors", metadata | {"format": "pt"})
    return weights


Edit = Callable[[Tensors], Any]
Q = "model.layers.0.self_attn.q_proj"


def fill(tensors: Tensors, part: str, value: float) -> None:
    for key, tensor in tensors.items():
        if key.endswith(f".{part}"):
            tensor.fill_(value)


def drop(tensors: Tensors, part: str) -> None:
    for key in [key for key in tensors if key.endswith(f".{part}")]:
        del tensors[key]


def one_group(tensors: Tensors, module: str) -> None:
    """Let all columns of a module be one group."""
    for part in ("scales", "qzeros"):
        tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][:1].contiguous()
    tensors[f"{module}.g_idx"] = torch.zeros_like(tensors[f"{module}.g_idx"])


def edit(folder: Path, change: Edit) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = "quantization" if "quantization" in config else "quantization_config"
    (folder / "config.json").write_text(json.dumps(config | {key: quantization}))
