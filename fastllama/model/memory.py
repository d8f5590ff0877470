"""Memory on a CPU: of weights in huge pages, of caches as it is needed; both where the system has it.

A decode step reads every weight once, in order. With pages of 4 KiB a core loses time at their ends: its prefetching
stops there and addresses are looked up again. A cache is made for more tokens than most calls have: the system keeps
what nobody has written to as one page of zeros.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20
LEAST_BYTES = 2 * HUGE_PAGE  # less may have no whole page in it

_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # of zeros, by their addresses


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor; on a CPU its memory is asked to come in huge pages as it is first written to.

    It is a wish: where the system knows no ``madvise`` or has no such pages, they are ordinary ones.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if device.type == "cpu" and advice is not None and tensor.nbytes >= LEAST_BYTES:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        whole = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), advice)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros; on a CPU a large one takes memory page by page, as it is first written to.

    Raises:
        MemoryError: the system gives none.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LEAST_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"there is no room for {nbytes / 1e9:.3g} GB: {error}") from error
    tensor = torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
    _maps[tensor.data_ptr()] = memory
    return tensor


def promised() -> int:
    """Bytes of all :func:`zeros` that nobody has written to, and the system has not given yet."""
    return sum(_missing(address, len(memory)) for address, memory in [*_maps.items()])


def _missing(address: int, nbytes: int) -> int:
    pages = bytearray(-(-nbytes // mmap.PAGESIZE))
    state = (ctypes.c_ubyte * len(pages)).from_buffer(pages)
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), state):
        return 0  # the system does not say
    return max(0, nbytes - mmap.PAGESIZE * pages.count(1))
