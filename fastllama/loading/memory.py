"""Memory for weights: in huge pages, where the system has them.

A decode step reads every weight once, in order. With pages of 4 KiB a core loses time at their ends: its prefetching
stops there and addresses are looked up again.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20
LEAST_BYTES = 2 * HUGE_PAGE  # less may have no whole page in it


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
