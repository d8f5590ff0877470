"""Quantized matrices in files of other projects: read as the weights that they stand for, or kept as codes.

Shape suffixes: ``n`` rows, ``k`` columns, ``g`` groups of columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.stored import BLOCK_BYTES, Stored

EXACT = 2**-16  # steps by which rounding may move a weight unmentioned


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix as codes, which stand for scale · code + offset of the group that a column is in.

    Attributes:
        code_nk: uint8.
        scale_ng: float32.
        offset_ng: float32.
        group_k: the group of each column; None: columns lie in order, k / g of them in each group.
    """

    code_nk: torch.Tensor
    scale_ng: torch.Tensor
    offset_ng: torch.Tensor
    group_k: torch.Tensor | None = None

    @classmethod
    def around(
        cls, code_nk: torch.Tensor, scale_ng: torch.Tensor, zero_ng: torch.Tensor | float, group_k: torch.Tensor | None
    ) -> Codes:
        """Codes that stand for scale · (code - zero)."""
        scale_ng = scale_ng.float()
        return cls(code_nk, scale_ng, -scale_ng * zero_ng, group_k)

    def change_in_float16(self, has_offsets: bool) -> float:
        """By how many steps a weight moves at most when scales, and offsets if they are kept, become float16."""
        steps = self.scale_ng.abs().clamp(min=torch.finfo(torch.float32).tiny)
        furthest = int(self.code_nk.max()) if has_offsets else int(self.code_nk.max()) // 2 + 1  # from the middle
        moved = (self.scale_ng.half().float() - self.scale_ng).abs() * furthest / steps
        if has_offsets:
            moved += (self.offset_ng.half().float() - self.offset_ng).abs() / steps
        change = float(moved[self.scale_ng != 0].max()) if bool((self.scale_ng != 0).any()) else 0.0
        return 0.0 if change < EXACT else change

    def weight(self, rows: slice) -> torch.Tensor:
        """The weights of some rows, float32 ``[n, k]``."""
        code_nk, scale_ng, offset_ng = (each[rows] for each in (self.code_nk, self.scale_ng, self.offset_ng))
        if self.group_k is not None:
            return code_nk.float().mul_(scale_ng[:, self.group_k]).add_(offset_ng[:, self.group_k])
        weight_ngk = code_nk.float().unflatten(1, (scale_ng.shape[1], -1))
        return weight_ngk.mul_(scale_ng.unsqueeze(2)).add_(offset_ng.unsqueeze(2)).flatten(1)


@runtime_checkable
class Coded(Stored, Protocol):
    """A stored matrix that can be kept as codes."""

    @property
    def scheme(self) -> Scheme | None:
        """As which codes it is kept; None: it cannot be."""
        ...

    def read(self) -> Codes:
        """Its codes."""
        ...


@dataclasses.dataclass(frozen=True)
class DecodedTensor:
    """A stored matrix that is read as the weights that it stands for.

    Attributes:
        shape: of the weights.
        dtype: how they are stored, for people.
        natural_dtype: of the parameters where nobody asks for another.
        weight: the weights of some rows, float32.
    """

    shape: tuple[int, int]
    dtype: str
    natural_dtype: torch.dtype
    weight: Callable[[slice], torch.Tensor]
    is_float: bool = True

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows, and their weights in float32."""
        for rows in _slices(self.shape):
            yield rows, self.weight(rows)


@dataclasses.dataclass(frozen=True)
class CodedTensor:
    """A matrix in safetensors that is stored as codes.

    Attributes:
        shape, dtype, natural_dtype: as of :class:`DecodedTensor`.
        scheme: as which codes it is kept; None: it is not, as its columns do not lie in order.
        read: its codes.
    """

    shape: tuple[int, int]
    dtype: str
    natural_dtype: torch.dtype
    scheme: Scheme | None
    read: Callable[[], Codes]
    is_float: bool = True

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows, and their weights in float32."""
        codes = self.read()
        for rows in _slices(self.shape):
            yield rows, codes.weight(rows)


def is_quantized(tensor: Stored) -> bool:
    """Whether a tensor is stored in fewer bits than the weights that it stands for."""
    is_block = isinstance(tensor, Coded) and tensor.dtype not in ("F64", "F32", "F16", "BF16")  # of a GGUF file
    return is_block or isinstance(tensor, DecodedTensor)


def unpacked_words(words: torch.Tensor, bits: int, dim: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """Unsigned numbers of a few bits, as uint8, that lie in int32 words along a dimension, the lowest bits first.

    Args:
        words: int32.
        bits: a divisor of 32, at most 8.
        dim: along which a word stands for 32 / bits numbers.
        order: the place in a word of each number of it; None: as they come.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts if order is None else shifts[order]
    number = words.movedim(dim, -1).unsqueeze(-1) >> shifts & (2**bits - 1)
    return number.to(torch.uint8).flatten(-2).movedim(-1, dim)


def _slices(shape: tuple[int, int]) -> Iterator[slice]:
    """Rows of about BLOCK_BYTES in float32."""
    step = max(1, BLOCK_BYTES // (4 * shape[1]))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))
