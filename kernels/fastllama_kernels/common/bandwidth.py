"""A read of memory and nothing else, which is what the bandwidth that bounds a decode is measured by.

Formula: the sum of the buffer's 64-bit words modulo 2 to the 64, the last word filled up with zeros. Bytes moved: the
buffer's, once. The kernel (``bandwidth.cpp``, CPU only) uses all of torch's threads; torch's own ``sum`` is no measure,
it read 24.7 to 32.8 GB/s within minutes on one idle machine.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

torch.library.define("fastllama::read_bytes", "(Tensor buffer) -> int")


def read_bytes_ref(buffer: torch.Tensor) -> int:
    """``read_bytes`` in torch operators."""
    flat = buffer.reshape(-1).view(torch.uint8)
    return int(F.pad(flat, (0, -flat.numel() % 8)).view(torch.int64).sum())


def read_bytes(buffer: torch.Tensor) -> int:
    """Read every byte of a contiguous CPU tensor once; returns the checksum, int64. The C++ kernels must be loaded."""
    return torch.ops.fastllama.read_bytes(buffer)
