"""compressed-tensors: 4- and 8-bit integers in words or bytes, and 8-bit floating point.

Layouts: ``compressors/pack_quantized`` and ``compressors/naive_quantized`` of its source.

    pack-quantized    weight_packed [n, k · bits / 32], along k   weight_scale [n, g]   weight_shape [2]
                      weight_zero_point [n · bits / 32, g], along n, or none            weight_g_idx [k] or none
    int-quantized     weight int8 [n, k], of as many bits as the config says   weight_scale [n, g] or [1]
                      weight_zero_point int8 likewise or none            weight_g_idx [k] or none
    float-quantized   weight float8 [n, k]; see :mod:`fastllama.loading.formats.fp8`

All stand for scale · (code - zero); packed codes and zero points are stored plus 2^(bits - 1).
"""

from __future__ import annotations

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import CodedTensor, Codes, unpacked_words
from fastllama.loading.formats import fp8
from fastllama.loading.formats.parts import FLOATS, Parts
from fastllama.loading.formats.targets import group_of
from fastllama.loading.stored import Stored

BITS = (2, 4, 8)


def packed(parts: Parts) -> Stored:
    """A matrix of ``pack-quantized``.

    Raises:
        CheckpointError: it is damaged, contradicts the config, or is not of integers.
    """
    parts.check_method("compressed-tensors")
    _check_transforms(parts)
    if "weight_global_scale" in parts or parts.dtype("weight_packed") != "I32":
        raise parts.error("4-bit floating point (nvfp4, mxfp4) is not read; quantize its original with fastllama")
    n, k = map(int, parts.whole("weight_shape"))
    bits = parts.shape("weight_packed")[-1] * 32 // max(1, k)
    if bits not in BITS:
        raise parts.error(f"codes of {bits} bits are not read; expected {' or '.join(map(str, BITS))}")
    parts.check("weight_packed", (n, k * bits // 32), ("I32",))
    groups = parts.shape("weight_scale")[-1]
    parts.check("weight_scale", (n, groups), FLOATS)
    has_zeros = "weight_zero_point" in parts
    _check_config(parts, bits, k, groups, has_zeros)
    if has_zeros:
        parts.check("weight_zero_point", (-(-n * bits // 32), groups), ("I32",))
    if k % groups:
        raise parts.error(f"scales of {groups} groups do not fit {k} columns")
    group_k = _columns_out_of_order(parts, k, groups)

    def read() -> Codes:
        zero_ng: torch.Tensor | float = 2.0 ** (bits - 1)
        if has_zeros:
            zero_ng = unpacked_words(parts.whole("weight_zero_point"), bits, 0)[:n].float()
        code_nk = unpacked_words(parts.whole("weight_packed"), bits, 1)
        return Codes.around(code_nk, parts.whole("weight_scale"), zero_ng, group_k)

    scheme = Scheme(max(4, bits), k // groups, has_zeros or bits == 2) if group_k is None else None
    return CodedTensor((n, k), f"pack-quantized with {bits} bits", parts.natural_dtype("weight_scale"), scheme, read)


def plain(parts: Parts) -> Stored:
    """A matrix whose ``weight`` is of bytes with a ``weight_scale``: int8, or 8-bit floating point.

    Raises:
        CheckpointError: it is damaged or contradicts the config.
    """
    if parts.dtype("weight") != "I8":
        return fp8.tensor(parts)
    parts.check_method("compressed-tensors")
    _check_transforms(parts)
    n, k = parts.shape("weight")
    groups = parts.shape("weight_scale")[1] if len(parts.shape("weight_scale")) == 2 else 1
    is_one = parts.shape("weight_scale") in ((), (1,), (1, 1))
    if not is_one:
        parts.check("weight_scale", (n, groups), FLOATS)
    if k % groups:
        raise parts.error(f"scales of {groups} groups do not fit {k} columns")
    has_zeros = "weight_zero_point" in parts
    bits = _bits_in_bytes(parts)
    _check_config(parts, bits, k, groups, has_zeros)
    group_k = _columns_out_of_order(parts, k, groups)
    if has_zeros and parts.shape("weight_zero_point") != parts.shape("weight_scale"):
        raise parts.error(f"weight_zero_point has the shape {list(parts.shape('weight_zero_point'))}")

    kept = 4 if bits <= 4 else 8
    middle = 2 ** (kept - 1)

    def read() -> Codes:
        weight = parts.whole("weight")
        lowest, highest = int(weight.min()), int(weight.max())
        if lowest < -(2 ** (bits - 1)) or highest >= 2 ** (bits - 1):
            raise parts.error(f"its codes go from {lowest} to {highest}, which are more than the config's {bits} bits")
        scale_ng = parts.whole("weight_scale").float().reshape(-1, groups).expand(n, groups)
        zero_ng: torch.Tensor | float = float(middle)
        if has_zeros:
            zero_ng = middle + parts.whole("weight_zero_point").float().reshape(-1, groups).expand(n, groups)
        return Codes.around(weight.view(torch.uint8) + middle, scale_ng, zero_ng, group_k)

    scheme = Scheme(kept, k // groups, has_zeros) if group_k is None else None
    return CodedTensor((n, k), f"int-quantized with {bits} bits", parts.natural_dtype("weight_scale"), scheme, read)


def _bits_in_bytes(parts: Parts) -> int:
    """How many bits of a byte are used; 8 where the config does not say it, or says what a byte does not hold."""
    bits = group_of(parts).weights.get("num_bits")
    return bits if isinstance(bits, int) and 2 <= bits < 8 else 8


def _columns_out_of_order(parts: Parts, k: int, groups: int) -> torch.Tensor | None:
    """The group of each column where columns of a group do not lie next to each other; else None."""
    if "weight_g_idx" not in parts:
        return None
    parts.check("weight_g_idx", (k,), ("I32", "I64"))
    group_k = parts.whole("weight_g_idx").long()
    if group_k.min() < 0 or group_k.max() >= groups:
        raise parts.error(f"weight_g_idx names groups up to {group_k.max()}, there are {groups}")
    return None if torch.equal(group_k, torch.arange(k) // (k // groups)) else group_k


def _check_transforms(parts: Parts) -> None:
    """Refuse what would change the result besides the codes."""
    if parts.declared.get("transform_config"):
        raise parts.error("its weights are rotated (transform_config), which is not read")
    sparsity = parts.declared.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise parts.error(f"its weights are stored sparsely ({sparsity['format']}), which is not read")


def _check_config(parts: Parts, bits: int, k: int, groups: int, has_zeros: bool) -> None:
    """Refuse what the config contradicts, in the group that the matrix belongs to."""
    place, scheme = group_of(parts)
    if (kind := scheme.get("type") or "int") != "int":
        raise parts.error(f"its codes are integers, but {place} says {kind}")
    if (known := scheme.get("num_bits") or bits) != bits:
        raise parts.error(f"its codes have {bits} bits, but {place} says {known}; correct the config")
    strategy, size = scheme.get("strategy") or "group", scheme.get("group_size")
    if strategy != "group" and groups > 1:
        raise parts.error(f"its groups have {k // groups} columns, but {place} says strategy {strategy}")
    if strategy == "group" and size and (k if size == -1 else size) != k // groups:
        raise parts.error(f"its groups have {k // groups} columns, but {place} says {size}; correct the config")
    if scheme.get("symmetric") is has_zeros:
        found = "there is a weight_zero_point" if has_zeros else "weight_zero_point is missing"
        raise parts.error(f"{found}, and {place} says symmetric: {str(has_zeros).lower()}")
    if "weight_g_idx" not in parts and groups > 1 and scheme.get("actorder") == "group":
        raise parts.error(f"weight_g_idx is missing, and {place} says actorder: group")
