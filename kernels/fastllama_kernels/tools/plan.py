"""A model of a decode step's time, kernel by kernel, to lay beside a measurement.

    time = Σ launches · (bytes / (bandwidth · EFFICIENCY) + GAP)

Bytes are what a kernel has to move; bandwidth is what a large device-to-device copy reaches on the chip. The floor is
bytes / bandwidth. EFFICIENCY and GAP are assumptions until a measurement replaces them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastllama_kernels.common.shapes import Shape
from fastllama_kernels.tools.step import parts

EFFICIENCY = 0.92  # of the copy's bandwidth that a kernel which streams its bytes reaches
GAP = 1.0e-6  # s between two kernels of a graph that start as programmatic dependents
GAP_WITHOUT_PDL = 2.5e-6
BUFFERS = 256  # bytes of a row that bookkeeping reads and writes: id, position, flag, EOS ids, output


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        chip: compute capability.
        bandwidth: bytes a second of a large copy, read and written.
        is_measured: or else nine tenths of the data sheet's.
    """

    chip: tuple[int, int]
    bandwidth: float
    is_measured: bool = False


GPUS = {
    "a100": Gpu((8, 0), 0.9 * 2.039e12),
    "l40s": Gpu((8, 9), 0.9 * 0.864e12),
    "h100": Gpu((9, 0), 0.9 * 3.35e12),
    "h200": Gpu((9, 0), 4.3e12, is_measured=True),
    "b200": Gpu((10, 0), 0.9 * 8.0e12),
}


class Row(NamedTuple):
    """One kind of launch in a step; times in seconds, of all of them together."""

    name: str
    launches: int
    nbytes: int
    floor: float
    predicted: float


def rows(shape: Shape, gpu: Gpu, dtype: torch.dtype, batch: int, live: int) -> Iterator[Row]:
    """The step's kernels in their order, then what Inductor makes, then the sum."""
    gap = GAP if gpu.chip >= (9, 0) else GAP_WITHOUT_PDL
    total = Row("step", 0, 0, 0.0, 0.0)
    small = (("embedding", batch * shape.hidden_size * dtype.itemsize), ("bookkeeping", batch * BUFFERS))
    kernels = [(part.name, part.times, part.nbytes) for part in parts(shape, gpu.chip, dtype, batch, live)]
    for name, launches, nbytes in [*kernels, *((name, 1, nbytes) for name, nbytes in small)]:
        floor = launches * nbytes / gpu.bandwidth
        row = Row(name, launches, launches * nbytes, floor, floor / EFFICIENCY + launches * gap)
        total = Row(
            "step",
            total.launches + row.launches,
            total.nbytes + row.nbytes,
            total.floor + row.floor,
            total.predicted + row.predicted,
        )
        yield row
    yield total
