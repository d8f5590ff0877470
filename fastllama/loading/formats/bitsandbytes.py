"""bitsandbytes: 4-bit codes of a table (nf4, fp4) with a maximum a block, and 8-bit integers with one a row.

Layouts: ``functional.py`` (QuantState, get_4bit_type), ``backends/default/ops.py`` and ``nn/modules.py`` of its source.

    4 bits   weight uint8 [n · k / 2, 1], the first of two neighbours in the high half
             weight.quant_map [16]   weight.absmax [blocks], float32, or uint8 codes of weight.nested_quant_map [256]
             with weight.nested_absmax a block of blocks; weight.quant_state.bitsandbytes__nf4: JSON in bytes
    8 bits   weight int8 [n, k]   SCB [n], float32: the maximum, for which 127 stands
"""

from __future__ import annotations

import json

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import CodedTensor, Codes, DecodedTensor
from fastllama.loading.formats.parts import Parts
from fastllama.loading.stored import Stored

STATE = "weight.quant_state."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def four_bits(parts: Parts) -> Stored:
    """A matrix of nf4 or fp4 codes.

    Raises:
        CheckpointError: it is damaged or contradicts the config.
    """
    _check_config(parts, 4)
    names = parts.named(STATE)
    if len(names) != 1:
        raise parts.error(f"{len(names)} tensors are named {STATE}…, expected one")
    try:
        state = json.loads(bytes(parts.whole(names[0]).tolist()))
        (n, k), block, dtype = map(int, state["shape"]), int(state["blocksize"]), DTYPES[state["dtype"]]
        is_nested = "weight.nested_absmax" in parts
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if is_nested else (1, 0.0)
        blocks = -(-n * k // block)
        outer_blocks = -(-blocks // nested[0])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise parts.error(f"{names[0]} is damaged: {error!r}") from error
    declared = parts.declared.get("bnb_4bit_quant_type")
    if declared not in (None, state.get("quant_type")):
        raise parts.error(f"it is stored as {state.get('quant_type')}, but bnb_4bit_quant_type is {declared}")
    if parts.declared.get("bnb_4bit_use_double_quant", default=is_nested) != is_nested:
        found = "in 8 bits" if is_nested else "in float32"
        raise parts.error(f"its maxima are stored {found}, but bnb_4bit_use_double_quant is {not is_nested}")
    if is_nested:
        parts.check("weight.nested_absmax", (outer_blocks,), ("F32",))
        parts.check("weight.nested_quant_map", (256,), ("F32",))
    parts.check("weight.absmax", (blocks,), ("U8",) if is_nested else ("F32",))
    parts.check("weight.quant_map", (16,), ("F32",))
    if n * k % 2:
        raise parts.error(f"{n} x {k} weights are an odd number")

    def absmax() -> torch.Tensor:
        stored = parts.whole("weight.absmax")
        if not is_nested:
            return stored
        table, outer = parts.whole("weight.nested_quant_map"), parts.whole("weight.nested_absmax")
        return table[stored.int()] * outer.repeat_interleave(nested[0])[:blocks] + nested[1]

    def weight(rows: slice) -> torch.Tensor:
        stored = parts.whole("weight").view(torch.uint8).reshape(-1)
        if stored.numel() != n * k // 2:
            raise parts.error(f"weight has {stored.numel()} bytes, expected {n * k // 2}")
        first, last = rows.start * k, rows.stop * k
        pairs = stored[first // 2 : -(-last // 2)]
        code = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[first % 2 :][: last - first]
        scale = absmax()[torch.arange(first, last) // block]
        return (parts.whole("weight.quant_map")[code.int()] * scale).view(-1, k)

    return DecodedTensor((n, k), f"bitsandbytes {state.get('quant_type')}", dtype, weight)


def eight_bits(parts: Parts) -> Stored:
    """A matrix of 8-bit integers.

    Raises:
        CheckpointError: it is damaged or contradicts the config.
    """
    _check_config(parts, 8)
    n, k = parts.shape("weight")
    parts.check("weight", (n, k), ("I8",))
    parts.check("SCB", (n,), ("F32",))
    if "weight_format" in parts and int(parts.whole("weight_format")) != 0:
        raise parts.error("its rows lie in an order for GPUs (weight_format), which is not read")

    def read() -> Codes:
        code_nk = parts.whole("weight").view(torch.uint8) ^ 128
        return Codes.around(code_nk, (parts.whole("SCB") / 127).unsqueeze(1), 128.0, None)

    return CodedTensor((n, k), "bitsandbytes int8", torch.float16, Scheme(8, k, False), read)


def _check_config(parts: Parts, bits: int) -> None:
    """Refuse codes of other bits than the config says."""
    parts.check_method("bitsandbytes")
    said = [each for each in (4, 8) if parts.declared.get(f"load_in_{each}bit")]
    if said and said != [bits]:
        names = " and ".join(f"load_in_{each}bit" for each in said)
        raise parts.error(f"its codes have {bits} bits, but the config says {names}; correct it to load_in_{bits}bit")
