"""Blocks of a GGUF file as codes: the types whose weights are scale · code + offset of 32 columns.

Layouts: ``ggml-common.h`` of ggml; :mod:`gguf.quants` writes the same values out. Scales of ``K`` types are products of
a float16 number and one of 6 bits.

Shape suffixes: ``n`` rows, ``b`` blocks of a row, ``s`` bytes of a block.
"""

from __future__ import annotations

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import Codes

#: As which codes a type is kept; 5-bit codes take the place of 8-bit ones.
SCHEMES = {
    "Q4_0": Scheme(4, 32, False), "Q4_1": Scheme(4, 32, True), "Q4_K": Scheme(4, 32, True),
    "Q5_0": Scheme(8, 32, True), "Q5_1": Scheme(8, 32, True), "Q5_K": Scheme(8, 32, True),
    "Q8_0": Scheme(8, 32, False),
}  # fmt: skip
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q5_0": 22, "Q5_1": 24, "Q5_K": 176, "Q8_0": 34}


def codes(data: torch.Tensor, kind: str) -> Codes:
    """The codes of a matrix.

    Args:
        data: uint8, the bytes of each row.
        kind: a key of SCHEMES.
    """
    block_nbs = data.unflatten(1, (-1, BYTES[kind]))
    if kind.endswith("K"):
        return _super_blocks(block_nbs, kind)
    scale = _halves(block_nbs[..., :2])
    if kind == "Q8_0":
        return Codes.around((block_nbs[..., 2:] ^ 128).flatten(1), scale, 128.0, None)
    has_offset, has_fifth = kind.endswith("_1"), kind.startswith("Q5")
    rest = block_nbs[..., 4 if has_offset else 2 :]
    nibbles = rest[..., 4 if has_fifth else 0 :]
    code = torch.cat([nibbles & 15, nibbles >> 4], -1)
    if has_fifth:  # bit i of four bytes belongs to column i
        shifts = torch.arange(8, dtype=torch.uint8)
        code |= (rest[..., :4].unsqueeze(-1) >> shifts & 1).flatten(-2) << 4
    code = code.flatten(1)
    if has_offset:
        return Codes(code, scale, _halves(block_nbs[..., 2:4]))
    return Codes.around(code, scale, 16.0 if has_fifth else 8.0, None)


def _super_blocks(block_nbs: torch.Tensor, kind: str) -> Codes:
    """256 columns with 8 scales and 8 offsets of 6 bits, each times a number of the block."""
    scale, least = _halves(block_nbs[..., :2]), _halves(block_nbs[..., 2:4])
    low, middle, high = block_nbs[..., 4:8], block_nbs[..., 8:12], block_nbs[..., 12:16]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6) << 4], -1)
    offsets = torch.cat([middle & 63, (high >> 4) | (middle >> 6) << 4], -1)
    nibbles = block_nbs[..., -128:].unflatten(-1, (4, 32))
    code = torch.stack([nibbles & 15, nibbles >> 4], -2)  # four runs of 64 columns: the low halves, then the high ones
    if kind == "Q5_K":
        fifth = block_nbs[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1
        code |= fifth.unflatten(-2, (4, 2)) << 4
    scale_ng = (scale.unsqueeze(-1) * scales).flatten(1)
    return Codes(code.flatten(1), scale_ng, (-least.unsqueeze(-1) * offsets).flatten(1))


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """Float16 numbers of two bytes each, as float32."""
    return pairs.contiguous().view(torch.float16).squeeze(-1).float()
