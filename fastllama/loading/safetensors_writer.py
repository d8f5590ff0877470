"""A safetensors file whose tensors lie in the order that they are given in.

The package's own writer sorts them by name, which puts k before q and v. Format: 8 bytes with the size of a header,
the header in JSON, the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastllama.loading.safetensors import HELD

ALIGNMENT = 64  # bytes, of the first tensor: a line of codes, and of most processors' caches


def save_file(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors, of any device and strides, one behind the other.

    Args:
        tensors: by name; none of them may lie in the file itself, where that is mapped.
        file: to write.
        metadata: what the header says besides the tensors.

    Raises:
        ValueError: a tensor's dtype is not one that checkpoints are read in.
    """
    names = {dtype: name for name, dtype in HELD.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ValueError(f"{key} is {tensor.dtype}, expected one of {', '.join(map(str, names))}")
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(content)
