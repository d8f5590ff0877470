"""Safetensors files: which of them make up a checkpoint, what they hold, and how they are read in blocks.

Files are memory-mapped. What is not used where it lies (:mod:`fastllama.loading.mapped`) is read block by block, so
loading takes a few megabytes more than the weights. Only safetensors is read: unpickling a ``.bin`` file can run any
code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

from fastllama.config.fields import read_json
from fastllama.loading.stored import BLOCK_BYTES, CheckpointError, CheckpointNotFoundError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: What parameters are held in, by safetensors' names.
HELD = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip
#: The dtypes that are read, and the parameters that they become where nobody says.
DTYPES = HELD | {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file, whose bytes begin at ``start``."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def is_float(self) -> bool:
        return self.dtype in DTYPES and DTYPES[self.dtype].is_floating_point

    @property
    def natural_dtype(self) -> torch.dtype:
        return DTYPES.get(self.dtype, torch.float32)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of rows and their content, as views of the mapped file of about BLOCK_BYTES.

        The file is mapped again for each block, because pages that were read count as this process's memory until they
        are unmapped.
        """
        row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            with safe_open(self.file, framework="pt") as tensors:
                block = tensors.get_tensor(self.key)[start : start + step]
                yield slice(start, start + step), block.float() if self.dtype.startswith("F8") else block

    def whole(self) -> torch.Tensor:
        """Its content, of whatever dtype."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.key)

    def rows(self, rows: slice) -> torch.Tensor:
        """The content of some rows."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_slice(self.key)[rows]

    def metadata(self) -> dict[str, str]:
        """What the file's header says besides its tensors."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.metadata() or {}


def find_tensors(folder: Path) -> dict[str, SafeTensor]:
    """Return every tensor of the checkpoint in ``folder``, by key; only the headers of its files are read."""
    stored: dict[str, SafeTensor] = {}
    problems = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                starts = _starts(file)
                for key in tensors.keys():  # noqa: SIM118  # not a dict
                    if key in stored:
                        problems.append(f"{key}: in {stored[key].file.name} and again in {file.name}")
                    view = tensors.get_slice(key)
                    stored[key] = SafeTensor(file, key, tuple(view.get_shape()), view.get_dtype(), starts[key])
        except FileNotFoundError:
            problems.append(f"{file.name}: missing, though {INDEX_NAME} names it")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: truncated or not a safetensors file ({error})")
    if problems:
        raise CheckpointError(f"the weights in {folder} are incomplete; fetch them again:", problems)
    return stored


def _starts(file: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a file, whose header ``safe_open`` has checked."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in ``folder``."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickle files only ({', '.join(pickles)}), which are refused because reading one "
            "can run any code; convert them where you trust them, with transformers' save_pretrained"
        )
    raise CheckpointNotFoundError(f"{folder} holds no weights; expected {WEIGHTS_NAME} or {INDEX_NAME}")


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from keys to files")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if refused := [repr(shard) for shard in shards if not _is_shard_inside(shard)]:
        raise CheckpointError(f"{index} names what is not a safetensors file inside its folder:", refused)
    return [folder / shard for shard in shards]


def _is_shard_inside(shard: str) -> bool:
    """Whether the name is that of a safetensors file below the folder it is looked up in, on any system."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    inside = not (posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts)
    return inside and posix.suffix == ".safetensors"
