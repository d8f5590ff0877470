"""8-bit floating point with scales: of compressed-tensors, transformers' fp8 and fbgemm_fp8, ModelOpt and vLLM.

    weight float8 [n, k]   weight_scale or weight_scale_inv: one, [n], [n, 1], or one for each block [n / b, k / b]

Stands for weight · scale, the one called ``inv`` too (transformers' ``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

import torch

from fastllama.loading.coded import DecodedTensor
from fastllama.loading.formats.parts import EXPONENTS, FLOATS, Parts
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
    if parts.dtype("weight") not in DTYPES:
        raise parts.error(f"weight is stored as {parts.dtype('weight')} next to {name}, which is not read")
    if "weight_scale_2" in parts:
        raise parts.error("4-bit floating point (nvfp4) is not read; quantize its original with fastllama")
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
    shape, block = parts.shape(name), parts.declared.get("weight_block_size")
    for group in (parts.declared.get("config_groups") or {}).values():
        if isinstance(group, dict):
            block = (group.get("weights") or {}).get("block_structure") or block
    if shape in ((), (1,), (1, 1)) and (block is None or (n <= block[0] and k <= block[1])):
        return n, k
    if shape in ((n,), (n, 1)) and block is None:
        return 1, k
    block = block or [BLOCK, BLOCK]
    if len(block) != 2 or shape != (-(-n // block[0]), -(-k // block[1])):
        raise parts.error(f"{name} has the shape {list(shape)}, which blocks of {block} of [{n}, {k}] do not have")
    return block[0], block[1]
