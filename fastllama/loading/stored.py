"""A stored tensor, whatever file holds it, and what is wrong with a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

GGUF_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # a model that was split into files
BLOCK_BYTES = 16 * 2**20  # read at once while loading


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; ``problems`` lists everything that is wrong with it."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([message, *self.problems]))


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint was found under a name."""


def said_once(problems: Iterable[str], by_layer: bool = False) -> list[str]:
    """Problems, each ``name: what``, where those that say the same have become one, with how many more there are.

    Args:
        problems: in any order.
        by_layer: join only those of the same parameter in several layers.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        name, _, what = problem.partition(": ")
        names.setdefault((re.sub(r"\d+", "", name) if by_layer else "", what), []).append(name)
    return [f"{each[0]}{f' and {len(each) - 1} more' * (len(each) > 1)}: {what}" for (_, what), each in names.items()]


class Stored(Protocol):
    """A tensor that can be read block by block."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> str:
        """What it is stored as, as its file calls it."""
        ...

    @property
    def is_float(self) -> bool:
        """Whether it can be read as floating point."""
        ...

    @property
    def natural_dtype(self) -> torch.dtype:
        """The dtype of parameters to read it into where nobody asks for another."""
        ...

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows, and floating-point tensors with their content."""
        ...
