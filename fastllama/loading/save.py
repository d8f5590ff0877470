"""Write a model as a checkpoint that transformers loads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastllama.config.fields import write_json
from fastllama.config.llama import dtype_name
from fastllama.loading.safetensors import INDEX_NAME, SHARD_NAME, WEIGHTS_NAME

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
    tensors = dict(model.named_parameters(remove_duplicate=config.tie_word_embeddings))
    shards = _shards(tensors, _size(max_shard_size))
    _write_shards(folder, shards)
    _write_index(folder, shards)
    for file in folder.iterdir():
        if SHARD_NAME.fullmatch(file.name) and file.name not in shards:
            file.unlink()
    dtype = dtype_name(next(iter(tensors.values())).dtype)
    config.replace(dtype=dtype).save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


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


def _write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    temporary = {shard: folder / f".{shard}.{os.getpid()}.tmp" for shard in shards}
    try:
        for shard, tensors in shards.items():
            temporary[shard].touch()
            mode = temporary[shard].stat().st_mode
            save_file(_own_memory(tensors), temporary[shard], metadata={"format": "pt"})
            temporary[shard].chmod(mode)  # safetensors leaves the file to its owner alone
        for shard, file in temporary.items():
            file.replace(folder / shard)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write the index of several files; a single file has none."""
    if len(shards) == 1:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        return
    weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _own_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, each memory under one name, as safetensors wants them."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        own[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return own


def _size(size: str | int) -> int:
    """Bytes in "5GB" (powers of 1000), "5GiB" (powers of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).upper())
    if match is None or match[2] not in SIZE_UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; expected bytes, such as 500000000, '500MB' or '2GiB'")
    return int(float(match[1]) * SIZE_UNITS[match[2]])
