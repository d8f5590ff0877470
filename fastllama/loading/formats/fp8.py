"""8-bit floating point with scales: of compressed-tensors, transformers' fp8 and fbgemm_fp8, ModelOpt and vLLM.

    weight float8 [n, k]   weight_scale or weight_scale_inv: one, [n], [n, 1], or one for each block [n / b, k / b]

Stands for weight · scale, the one called ``inv`` too (transformers' ``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

import torch

from fastllama.loading.coded import DecodedTensor
from fastllama.loading.formats.parts import EXPONENTS, FLOATS, Parts
from fastllama.loading.formats.targets import group_of
from fastllama.loading.stored import Stored

DTYPES = ("F8_E4M3", "F8_E5M2")
BLOCK = 128


def tensor(parts: Parts) -> Stored:
    """A matrix of 8-bit floating point.

    Raises:
        CheckpointError: it is damaged or contradicts the config.
    """
    parts.check_method("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "gptq", "auto-round")
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if "weight_scale_2" in parts:
        raise parts.error("4-bit floating point (nvfp4) is not read; quantize its original with fastllama")
    if parts.dtype("weight") not in DTYPES:
        raise parts.error(f"weight is stored as {parts.dtype('weight')} next to {name}, which is not read")
    n, k = parts.shape("weight")
    if parts.dtype(name) not in (*FLOATS, EXPONENTS):
        raise parts.error(f"{name} is stored as {parts.dtype(name)}, expected {' or '.join((*FLOATS, EXPONENTS))}")
    height, width = _block(parts, name, n, k)

    def weight(rows: slice) -> torch.Tensor:
        scale = parts.whole(name).float().reshape(-(-n // height), -(-k // width))
        scale_rows = scale[torch.arange(n)[rows] // height].repeat_interleave(width, 1)[:, :k]
        return parts.rows("weight", rows).float() * scale_rows

    return DecodedTensor((n, k), f"{parts.dtype('weight')} with scales", torch.bfloat16, weight)


def _block(parts: Parts, name: str, n: int, k: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    shape, (group, scheme) = parts.shape(name), group_of(parts)
    kind, bits, strategy = scheme.get("type") or "float", scheme.get("num_bits") or 8, scheme.get("strategy")
    if (kind, bits) != ("float", 8):
        raise parts.error(f"its weights are 8-bit floating point, but {group} says {kind} with {bits} bits")
    block, place = parts.declared.get("weight_block_size"), "weight_block_size"
    if scheme.get("block_structure"):
        block, place = scheme["block_structure"], f"{group}.weights.block_structure"
    is_one, is_by_row = shape in ((), (1,), (1, 1)), shape in ((n,), (n, 1))
    if strategy in ("tensor", "channel") and not (is_one if strategy == "tensor" else is_by_row):
        raise parts.error(f"{name} has the shape {list(shape)}, but {group} says strategy {strategy}")
    if is_one and (block is None or (n <= block[0] and k <= block[1])):
        return n, k
    if is_by_row and block is None:
        return 1, k
    height, width = block or (BLOCK, BLOCK)
    expected = (-(-n // height), -(-k // width))
    if shape == expected:
        return height, width
    if block is not None:
        raise parts.error(
            f"{name} has the shape {list(shape)} for a weight of [{n}, {k}], but {place} {list(block)} makes it "
            f"{list(expected)}; correct the config"
        )
    raise parts.error(
        f"{name} has the shape {list(shape)} for a weight of [{n}, {k}]; where the config names no block, expected one "
        f"scale, one a row, or {list(expected)}, one for each {BLOCK} rows and columns"
    )
