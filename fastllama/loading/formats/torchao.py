"""torchao's tensors in safetensors: which class of its a matrix was stands in the file's header.

Layouts: ``prototype/safetensors/safetensors_support.py`` and ``quantization/quantize_/workflows`` of its source.

    Int4Tensor                 qdata int8 [n, k / 2], the first of two neighbours in the low half, signed
                               scale and zero_point [g, n]: scale · code + zero_point
    Int8Tensor, IntxUnpackedToInt8Tensor   qdata int8 [n, k]   scale [n] or [n, g]   zero_point likewise or none:
                               scale · (code - zero_point)
    Float8Tensor               qdata float8 [n, k]   scale [n, 1] or one: scale · qdata
"""

from __future__ import annotations

import json

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
        kind = described.get("_type")
    except (ValueError, AttributeError) as error:
        raise parts.error(f"the file's header does not describe it: {error}") from error
    if "_weight_act_pre_scale" in parts:
        raise parts.error("its activations are scaled before the product (act_pre_scale), which is not read")
    if kind == "Int4Tensor":
        return _int4(parts)
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return _int8(parts, kind)
    if kind == "Float8Tensor":
        return _float8(parts)
    raise parts.error(f"{kind or 'a tensor that the header does not describe'} is not read; expected Int4Tensor, "
                      "Int8Tensor, IntxUnpackedToInt8Tensor or Float8Tensor")  # fmt: skip


def _int4(parts: Parts) -> CodedTensor:
    n, half = parts.shape(QDATA)
    k, groups = 2 * half, parts.shape(SCALE)[0]
    parts.check(QDATA, (n, half), ("I8", "U8"))
    parts.check(SCALE, (groups, n), FLOATS)
    parts.check(ZERO, (groups, n), FLOATS)
    if k % groups:
        raise parts.error(f"scales of {groups} groups do not fit {k} columns")

    def read() -> Codes:
        pairs = parts.whole(QDATA).view(torch.uint8)
        code_nk = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1) ^ 8  # plus 8: two's complement
        scale_ng, zero_ng = (parts.whole(part).float().T.contiguous() for part in (SCALE, ZERO))
        return Codes(code_nk, scale_ng, zero_ng - 8 * scale_ng)

    scheme = Scheme(4, k // groups, True)
    return CodedTensor((n, k), "torchao's Int4Tensor", parts.natural_dtype(SCALE), scheme, read)


def _int8(parts: Parts, kind: str) -> CodedTensor:
    n, k = parts.shape(QDATA)
    groups = max(1, torch.Size(parts.shape(SCALE)).numel() // n)
    parts.check(QDATA, (n, k), ("I8",))
    if parts.dtype(SCALE) not in FLOATS or parts.shape(SCALE) not in ((n,), (n, groups)) or k % groups:
        raise parts.error(f"scale is {parts.dtype(SCALE)} {list(parts.shape(SCALE))}, which does not fit [{n}, {k}]")
    has_zeros = ZERO in parts and bool(parts.whole(ZERO).any())

    def read() -> Codes:
        zero_ng = 128 + (parts.whole(ZERO).float().reshape(n, groups) if has_zeros else 0.0)
        return Codes.around(
            parts.whole(QDATA).view(torch.uint8) ^ 128, parts.whole(SCALE).reshape(n, -1), zero_ng, None
        )

    scheme = Scheme(8, k // groups, has_zeros)
    return CodedTensor((n, k), f"torchao's {kind}", parts.natural_dtype(SCALE), scheme, read)


def _float8(parts: Parts) -> DecodedTensor:
    n, k = parts.shape(QDATA)
    parts.check(QDATA, (n, k), DTYPES)
    if parts.shape(SCALE) not in ((), (1,), (1, 1), (n,), (n, 1)):
        raise parts.error(f"scale has the shape {list(parts.shape(SCALE))}, expected one or one a row of {n}")

    def weight(rows: slice) -> torch.Tensor:
        scale = parts.whole(SCALE).float().reshape(-1, 1).expand(n, 1)
        return parts.rows(QDATA, rows).float() * scale[rows]

    return DecodedTensor((n, k), "torchao's Float8Tensor", torch.bfloat16, weight)
