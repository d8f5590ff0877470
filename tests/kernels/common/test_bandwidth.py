"""The read that the bandwidth is measured by: every byte of a buffer counts, whatever its size."""

from __future__ import annotations

import pytest
import torch

from fastllama_kernels.common import build
from fastllama_kernels.common.bandwidth import read_bytes, read_bytes_ref

BLOCK = 4 * 65536


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert build.load() is None


def words(buffer: torch.Tensor) -> int:
    """The checksum in Python's own integers."""
    data = buffer.numpy().tobytes()
    total = sum(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 123, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 12345])
def test_the_checksum_is_that_of_all_bytes(size: int) -> None:
    buffer = torch.randint(256, (size,), dtype=torch.uint8)
    assert read_bytes(buffer) == read_bytes_ref(buffer) == words(buffer)


def test_no_byte_is_left_out() -> None:
    buffer = torch.zeros(2 * BLOCK + 4099, dtype=torch.uint8)
    for at in [*range(0, len(buffer), 4093), len(buffer) - 1]:
        buffer[at] = 1
        assert read_bytes(buffer) == 256 ** (at % 8)
        buffer[at] = 0


def test_any_dtype_is_read_and_a_strided_buffer_refused() -> None:
    buffer = torch.randn(1001)
    assert read_bytes(buffer) == words(buffer)
    with pytest.raises(RuntimeError, match="contiguous"):
        read_bytes(buffer[::2])
