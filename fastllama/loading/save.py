"""Write a model as a checkpoint that transformers loads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastllama.config.fields import CONFIG_NAME, GENERATION_CONFIG_NAME, write_json
from fastllama.config.llama import dtype_name
from fastllama.loading.safetensors import INDEX_NAME, SHARD_NAME, WEIGHTS_NAME
from fastllama.loading.safetensors_writer import save_file
from fastllama.quantization.linear import packed_modules

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_model(model: nn.Module, folder: str | os.PathLike[str], max_shard_size: str | int = "5GB") -> None:
    """Write config.json, generation_config.json and safetensors weights that transformers loads.

    Every file is written under a temporary name and renamed when all are complete; weight files of an earlier
    checkpoint in the folder are removed. A tied weight is written once.

    Args:
        model: its parameters may be on any device, and views of larger tensors.
        folder: created if needed.
        max_shard_size: maximum size of a file in bytes, as an int or a string such as ``"500MB"`` or ``"2GiB"``; a
            larger model is split into several files with an index.

    Raises:
        ValueError: ``max_shard_size`` is not a size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    generation_config: Any = getattr(model, "generation_config", None)
    tied = config.tie_word_embeddings
    tensors = dict(model.named_parameters(remove_duplicate=tied)) | dict(model.named_buffers(remove_duplicate=tied))
    shards = _shards(tensors, _size(max_shard_size))
    quantization = config.quantization if packed_modules(model) else None
    config = config.replace(quantization=quantization, dtype=dtype_name(next(model.parameters()).dtype))
    with _together(folder) as temporary:
        for shard, content in shards.items():
            save_file(_in_order(content), temporary(shard), metadata={"format": "pt"})
        if len(shards) > 1:
            write_json(temporary(INDEX_NAME), _index(shards))
        write_json(temporary(CONFIG_NAME), config.to_dict())
        if generation_config is not None:
            write_json(temporary(GENERATION_CONFIG_NAME), generation_config.to_dict())
    for file in folder.iterdir():
        is_old_shard = SHARD_NAME.fullmatch(file.name) and file.name not in shards
        if is_old_shard or (file.name == INDEX_NAME and len(shards) == 1):
            file.unlink()


@contextmanager
def _together(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Files that are all there at the end, or none of them: written under temporary names, then renamed.

    Yields what gives a file's temporary name.
    """
    names: dict[str, Path] = {}

    def temporary(name: str) -> Path:
        return names.setdefault(name, folder / f".{name}.{os.getpid()}.tmp")

    try:
        yield temporary
        for name, file in names.items():
            file.replace(folder / name)
    finally:
        for file in names.values():
            file.unlink(missing_ok=True)


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return file names and the tensors of each: in order, as many as fit, at least one."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return dict(zip(names, groups, strict=True))


def _index(shards: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """The index of several files."""
    weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in an order in which they can be used where they lie.

    Those of one kind stay in the model's order, so that what is multiplied together (the codes of q, k and v) lies one
    behind the other. Codes are whole lines of 64 bytes, so that all of them are aligned when they come first; large
    numbers come before small ones, so that all of these are.
    """

    def place(item: tuple[str, torch.Tensor]) -> tuple[bool, int, str]:
        key, tensor = item
        return tensor.dtype != torch.uint8, -tensor.itemsize, key.rpartition(".")[2]

    return dict(sorted(tensors.items(), key=place))


def _size(size: str | int) -> int:
    """Bytes in "5GB" (powers of 1000), "5GiB" (powers of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).upper())
    if match is None or match[2] not in SIZE_UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; expected bytes, such as 500000000, '500MB' or '2GiB'")
    return int(float(match[1]) * SIZE_UNITS[match[2]])
