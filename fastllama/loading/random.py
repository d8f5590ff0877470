"""Random weights of a published shape, read like stored ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch

from fastllama.loading.stored import BLOCK_BYTES

POOL = 8388593  # size of the pool that weights are cut from; prime, so that no two rows coincide


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """Normal weights, or a norm's ones, or a bias's zeros; the same numbers in every run and on every device.

    Generating a number for each weight would take longer than reading weights from a disk, so they are cut from a pool
    of normal numbers, cyclically, each tensor at another offset.
    """

    shape: tuple[int, ...]
    pool: torch.Tensor
    offset: int
    dtype: str = "F32"
    is_float: bool = True
    natural_dtype: torch.dtype = torch.float32

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows and their content, in float32."""
        columns = math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - start)
            numbers = self._numbers((self.offset + start * columns) % len(self.pool), rows * columns)
            yield slice(start, start + rows), numbers.view(rows, *self.shape[1:])

    def _numbers(self, first: int, count: int) -> torch.Tensor:
        """That number of numbers of the pool, cyclically."""
        repeats = -(-(first + count) // len(self.pool))
        pool = self.pool if repeats == 1 else self.pool.repeat(repeats)
        return pool[first : first + count]


def random_tensors(shapes: Mapping[str, torch.Size], std: float) -> dict[str, RandomTensor]:
    """Weights for parameters of these names and shapes, with this standard deviation."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(std)
    zero, one = torch.zeros(1), torch.ones(1)
    tensors, offset = {}, 0
    for key, shape in shapes.items():
        if len(shape) == 1:
            tensors[key] = RandomTensor(tuple(shape), zero if key.endswith("bias") else one, 0)
        else:
            tensors[key] = RandomTensor(tuple(shape), pool, offset)
            offset = (offset + math.prod(shape)) % POOL
    return tensors
