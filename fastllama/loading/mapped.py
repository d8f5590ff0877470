"""Weights that are used where they lie in a safetensors file, so that nothing is copied.

A file is mapped privately: a page that somebody writes to (an adapter that is merged, ``load_state_dict``) becomes this
process's own, and the file stays as it is. It is mapped as long as one of its tensors is alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from fastllama.loading.safetensors import HELD, SafeTensor
from fastllama.loading.stored import Stored


class MappedFiles:
    """Files, each mapped once, when the first of its matrices is used."""

    def __init__(self) -> None:
        self._memory: dict[Path, torch.UntypedStorage] = {}

    def rows(self, parts: Sequence[Stored | None], dtype: torch.dtype) -> torch.Tensor | None:
        """The rows of all parts as one tensor in the memory of their file; None: they are not stored like that.

        Vectors are not worth it: a few of them would keep a file mapped whose matrices are read as something else.

        Args:
            parts: stored tensors that differ in the number of rows at most; None: one that is not stored.
            dtype: of the tensor.
        """
        found = [part for part in parts if isinstance(part, SafeTensor) and HELD.get(part.dtype) == dtype]
        if len(found) < len(parts) or len(found[0].shape) < 2:
            return None
        first, at = found[0], found[0].start
        for part in found:
            if part.file != first.file or part.start != at or at % dtype.itemsize:
                return None
            at += math.prod(part.shape) * dtype.itemsize
        memory = self._mapped(first.file)[first.start : at]
        return torch.empty(0, dtype=dtype, device="cpu").set_(memory).view(-1, *first.shape[1:])

    def _mapped(self, file: Path) -> torch.UntypedStorage:
        if file not in self._memory:
            memory = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
            self._memory[file] = cast(torch.UntypedStorage, memory)
        return self._memory[file]
