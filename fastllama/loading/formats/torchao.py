"""torchao's tensors in safetensors: which class of its a matrix was stands in the file's header.

Layouts: ``prototype/safetensors/safetensors_support.py`` and ``quantization/quantize_/workflows`` of its source.

    Int4Tensor                 qdata int8 [n, k / 2], the first of two neighbours in the low half, signed
                               scale and zero_point [g, n]: scale · code + zero_point
    Int8Tensor, IntxUnpackedToInt8Tensor   qdata int8 [n, k]   scale [n] or [n, g]   zero_point likewise or none:
                               scale · (code - zero_point); of the second, target_dtype may be of fewer bits
    Float8Tensor               qdata float8 [n, k]   scale [n, 1] or one: scale · qdata

What the config says is in ``quant_type``, as ``core/config.py`` writes its classes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import CodedTensor, Codes, DecodedTensor
from fastllama.loading.formats.fp8 import DTYPES
from fastllama.loading.formats.parts import FLOATS, Parts
from fastllama.loading.stored import Stored

QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


def tensor(parts: Parts) -> Stored:
    """A matrix of one of torchao's classes.

    Raises:
        CheckpointError: it is damaged, contradicts the config, or of a class that is not read.
    """
    parts.check_method("torchao")
    try:
        described = json.loads(parts.metadata(QDATA).get(f"{parts.module}.weight", "{}"))
        kind, target = described.get("_type"), (described.get("_data") or {}).get("target_dtype") or {}
    except (ValueError, AttributeError) as error:
        raise parts.error(f"the file's header does not describe it: {error}") from error
    if "_weight_act_pre_scale" in parts:
        raise parts.error("its activations are scaled before the product (act_pre_scale), which is not read")
    if kind == "Int4Tensor":
        return _int4(parts)
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return _int8(parts, kind, str(target.get("_data", "int8")))
    if kind == "Float8Tensor":
        return _float8(parts)
    raise parts.error(
        f"{kind or 'a tensor that the header does not describe'} is not read, only Int4Tensor, Int8Tensor, "
        "IntxUnpackedToInt8Tensor and Float8Tensor; quantize its original with fastllama"
    )


def _int4(parts: Parts) -> CodedTensor:
    n, half = parts.shape(QDATA)
    k, groups = 2 * half, parts.shape(SCALE)[0]
    parts.check(QDATA, (n, half), ("I8", "U8"))
    parts.check(SCALE, (groups, n), FLOATS)
    parts.check(ZERO, (groups, n), FLOATS)
    if k % groups:
        raise parts.error(f"scales of {groups} groups do not fit {k} columns")
    _check_config(parts, "int4", k, groups)

    def read() -> Codes:
        pairs = parts.whole(QDATA).view(torch.uint8)
        code_nk = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1) ^ 8  # plus 8: two's complement
        scale_ng, zero_ng = (parts.whole(part).float().T.contiguous() for part in (SCALE, ZERO))
        return Codes(code_nk, scale_ng, zero_ng - 8 * scale_ng)

    scheme = Scheme(4, k // groups, True)
    return CodedTensor((n, k), "torchao's Int4Tensor", parts.natural_dtype(SCALE), scheme, read)


def _int8(parts: Parts, kind: str, dtype: str) -> CodedTensor:
    """Codes of a byte each, of which those of int4 and less take no more than 4 bits."""
    n, k = parts.shape(QDATA)
    groups = max(1, torch.Size(parts.shape(SCALE)).numel() // n)
    parts.check(QDATA, (n, k), ("I8",))
    if parts.dtype(SCALE) not in FLOATS or parts.shape(SCALE) not in ((n,), (n, groups)) or k % groups:
        raise parts.error(f"scale is {parts.dtype(SCALE)} {list(parts.shape(SCALE))}, which does not fit [{n}, {k}]")
    _check_config(parts, dtype, k, groups)
    has_zeros = ZERO in parts and bool(parts.whole(ZERO).any())
    bits = 4 if dtype in ("int1", "int2", "int3", "int4") else 8
    middle = 2 ** (bits - 1)

    def read() -> Codes:
        code_nk = parts.whole(QDATA)
        if bits == 4 and not -middle <= int(code_nk.min()) <= int(code_nk.max()) < middle:
            raise parts.error(f"it has codes from {code_nk.min()} to {code_nk.max()}, which {dtype} does not hold")
        zero_ng = middle + (parts.whole(ZERO).float().reshape(n, groups) if has_zeros else 0.0)
        code_nk = (code_nk + middle if bits == 4 else code_nk ^ -128).view(torch.uint8)
        return Codes.around(code_nk, parts.whole(SCALE).reshape(n, -1), zero_ng, None)

    scheme = Scheme(bits, k // groups, has_zeros)
    return CodedTensor((n, k), f"torchao's {kind} of {dtype}", parts.natural_dtype(SCALE), scheme, read)


def _float8(parts: Parts) -> DecodedTensor:
    n, k = parts.shape(QDATA)
    parts.check(QDATA, (n, k), DTYPES)
    if parts.shape(SCALE) not in ((), (1,), (1, 1), (n,), (n, 1)):
        raise parts.error(f"scale has the shape {list(parts.shape(SCALE))}, expected one or one a row of {n}")
    _check_config(parts, "float8", k, 1)

    def weight(rows: slice) -> torch.Tensor:
        scale = parts.whole(SCALE).float().reshape(-1, 1).expand(n, 1)
        return parts.rows(QDATA, rows).float() * scale[rows]

    return DecodedTensor((n, k), "torchao's Float8Tensor", torch.bfloat16, weight)


def _check_config(parts: Parts, dtype: str, k: int, groups: int) -> None:
    """Refuse codes of another dtype, or of groups of another size, than the config says.

    Args:
        parts: of the matrix.
        dtype: of its codes.
        k, groups: its columns, and the groups of them.
    """
    name, values = _declared(parts)
    found = re.search(r"(int\d|intx|float8)weight", name.lower().replace("_", ""))
    said = found[1] if found else None
    if said == "intx":
        said = (values.get("weight_dtype") or {}).get("_data")
    if said not in (None, dtype):
        raise parts.error(f"its codes are {dtype}, but the config's quant_type {name} says {said}; correct the config")
    each = values.get("weight_granularity") or values.get("granularity")
    granularity = (each[-1] if isinstance(each, list) else each) or {}
    size = values.get("group_size") or (granularity.get("_data") or {}).get("group_size")
    if size == -1 or (size is None and granularity.get("_type") in ("PerRow", "PerAxis")):
        size = k
    if dtype != "float8" and size not in (None, k // groups):
        raise parts.error(
            f"its groups have {k // groups} columns, but the config's quant_type {name} says {size}; correct the config"
        )


def _declared(parts: Parts) -> tuple[str, dict[str, Any]]:
    """The class that the config names for a matrix, and its values; "" where it names none."""
    config = parts.declared.get("quant_type") or ""
    if isinstance(config, str):  # of older checkpoints
        return config, parts.declared.get("quant_type_kwargs") or {}
    config = config.get("default") or {}
    values = config.get("_data") or {}
    modules = values.get("fqn_to_config") or values.get("module_fqn_to_config")
    if modules:
        names = (f"{parts.module}.weight", parts.module)
        patterns = [key for name in names for key in modules if key[:3] == "re:" and re.fullmatch(key[3:], name)]
        config = next((modules[key] for key in (*names, *patterns, "_default") if key in modules), None) or {}
        values = config.get("_data") or {}
    return config.get("_type") or "", values
