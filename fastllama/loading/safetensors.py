"""Safetensors files: which of them make up a checkpoint, what they hold, and how they are read in blocks.

Files are memory-mapped and read block by block, so loading takes a few megabytes more than the weights. Only
safetensors is read: unpickling a ``.bin`` file can run any code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

from fastllama.config.fields import read_json
from fastllama.loading.names import CheckpointError, CheckpointNotFoundError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that are read, in safetensors' names
BLOCK_BYTES = 16 * 2**20  # mapped at once while loading


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the checkpoint in ``folder``, by key; only the headers of its files are read."""
    stored: dict[str, Stored] = {}
    problems = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a dict
                    if key in stored:
                        problems.append(f"{key}: in {stored[key].file.name} and again in {file.name}")
                    view = tensors.get_slice(key)
                    stored[key] = Stored(file, tuple(view.get_shape()), view.get_dtype())
        except FileNotFoundError:
            problems.append(f"{file.name}: missing, though {INDEX_NAME} names it")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: truncated or not a safetensors file ({error})")
    if problems:
        raise CheckpointError(f"the weights in {folder} are incomplete; fetch them again:", problems)
    return stored


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


def blocks(key: str, tensor: Stored) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of rows and their content, as views of the mapped file of about BLOCK_BYTES.

    The file is mapped again for each block, because pages that were read count as this process's memory until they
    are unmapped.
    """
    step = max(1, BLOCK_BYTES // (math.prod(tensor.shape[1:]) * FLOAT_BYTES[tensor.dtype]))
    for start in range(0, tensor.shape[0], step):
        with safe_open(tensor.file, framework="pt") as tensors:
            yield slice(start, start + step), tensors.get_tensor(key)[start : start + step]
