"""GGUF files: what they hold, read within the file's bounds, and dequantized exactly as the gguf package does.

The format is described in ggml's docs/gguf.md: a header of typed values, then what tensors there are, then their
blocks. The package's own reader makes an array for every element of a list and trusts every length in the file.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fastllama.config.fields import shortened
from fastllama.config.quantization import Scheme
from fastllama.loading import gguf_blocks
from fastllama.loading.coded import Codes
from fastllama.loading.stored import BLOCK_BYTES, GGUF_SHARD, CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
#: Numbers by the format's type: struct's letter.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
READ_TYPES = (
    "F32", "F16", "BF16", "F64", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        data: its bytes, mapped ``[rows, bytes of a row]``.
        shape: as torch has it, the reverse of the file's.
        dtype: the name of its type, such as ``"Q4_K"``.
        heads: of a q or k projection, whose rows llama.cpp interleaves; 0 for other tensors.
    """

    data: np.ndarray[Any, Any]
    shape: tuple[int, ...]
    dtype: str
    heads: int = 0

    @property
    def is_float(self) -> bool:
        return self.dtype in READ_TYPES

    @property
    def natural_dtype(self) -> torch.dtype:
        """As stored; of blocks, float32, which holds their values exactly."""
        return PLAIN_DTYPES.get(self.dtype, torch.float32)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows and their content in float32, in Hugging Face's order of rows."""
        if self.heads:
            yield slice(0, self.shape[0]), halved(self._rows(0, len(self.data)).view(self.shape), self.heads)
            return
        if len(self.shape) == 1:
            yield slice(0, self.shape[0]), self._rows(0, 1).view(self.shape)
            return
        step = max(1, BLOCK_BYTES // (4 * self.shape[-1]))
        for first in range(0, len(self.data), step):
            yield slice(first, first + step), self._rows(first, first + step)

    @property
    def scheme(self) -> Scheme | None:
        """As which codes blocks are kept; None: they are not."""
        if len(self.shape) != 2 or self.dtype not in gguf_blocks.SCHEMES:
            return None
        return gguf_blocks.SCHEMES[self.dtype]

    def read(self) -> Codes:
        """Its codes, in Hugging Face's order of rows."""
        codes = gguf_blocks.codes(torch.from_numpy(np.array(self.data)), self.dtype)
        if not self.heads:
            return codes
        return Codes(*(halved(each, self.heads) for each in (codes.code_nk, codes.scale_ng, codes.offset_ng)))

    def _rows(self, first: int, last: int) -> torch.Tensor:
        data = np.ascontiguousarray(self.data[first:last])
        if self.dtype == "F64":
            return torch.from_numpy(data.view(np.float64).copy())
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.dtype])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).copy())


@dataclasses.dataclass(frozen=True)
class Gguf:
    """The content of a file: its values and tensors, by their names."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> Gguf:
    """Read the header of a file, or of all files of a model that was split; tensors stay on the disk.

    Raises:
        CheckpointError: it is damaged, or of another kind.
    """
    first = _read_one(path)
    count = first.fields.get("split.count", 1)
    if count in (0, 1):
        return first
    name = GGUF_SHARD.fullmatch(path.name)
    if name is None or not isinstance(count, int) or int(name[3]) != count:
        raise CheckpointError(f"{path} is one of {count} files; expected a name such as model-00001-of-00005.gguf")
    shards = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{path} is one of {count} files, and some are missing:", absent)
    parts = [_read_one(shard) for shard in shards]
    tensors = {key: tensor for part in parts for key, tensor in part.tensors.items()}
    return Gguf(path, parts[0].fields, tensors)


def _read_one(path: Path) -> Gguf:
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes; fetch it again")
    data = np.memmap(path, mode="r")
    cursor = _Cursor(path, data)
    try:
        return cursor.read()
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or damaged ({shortened(str(error))}); fetch it again") from error


class _Cursor:
    """Reads a file from its beginning on; whatever points outside of it raises ValueError or struct.error."""

    def __init__(self, path: Path, data: np.ndarray[Any, Any]) -> None:
        self.path, self.data, self.view, self.at = path, data, memoryview(data), 0  # pyright: ignore

    def read(self) -> Gguf:
        magic = self.bytes(4)
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = self.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} is GGUF version {version}; versions 2 and 3, little-endian, are read")
        tensor_count, field_count = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.string()
            fields[key] = self.value(self.number("I"))
        infos = [self.tensor_info() for _ in range(self.bounded(tensor_count, 24))]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"two tensors are called {name}")
            tensors[name] = self.tensor(name, shape, kind, start + offset)
        return Gguf(self.path, fields, tensors)

    def bytes(self, count: int) -> bytes:
        if self.at + count > len(self.view):
            raise ValueError(f"{count} bytes at {self.at} of {len(self.view)}")
        self.at += count
        return bytes(self.view[self.at - count : self.at])

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.view, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def bounded(self, count: int, size: int) -> int:
        """A count of things of at least ``size`` bytes each, if the rest of the file has room for them."""
        if count * size > len(self.view) - self.at:
            raise ValueError(f"{count} entries at {self.at} of {len(self.view)} bytes")
        return count

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY and depth < 2:
            kind, count = self.number("I"), self.number("Q")
            if kind not in NUMBERS:
                return [self.value(kind, depth + 1) for _ in range(self.bounded(count, 8))]
            size = struct.calcsize("<" + NUMBERS[kind])
            values = np.frombuffer(
                self.bytes(self.bounded(count, size) * size), dtype="<" + np.dtype(NUMBERS[kind]).str[1:]
            )
            return values.tolist()
        if kind not in NUMBERS:
            raise ValueError(f"value type {kind} at {self.at}")
        return self.number(NUMBERS[kind])

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(), self.number("I")
        if not 1 <= dims <= 4:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        ggml_type = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        rows = math.prod(shape[:-1])
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} values in blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        if start + rows * row_bytes > len(self.data):
            raise ValueError(f"{name} ends at byte {start + rows * row_bytes} of {len(self.data)}")
        data = self.data[start : start + rows * row_bytes].reshape(rows, row_bytes)
        return GgufTensor(data, shape, ggml_type.name)


def halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection from the order in which neighbours turn together to Hugging Face's.

    The inverse of :func:`fastllama.loading.gguf_writer.interleaved`, with the same arguments.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()
