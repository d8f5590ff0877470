"""From logits to the next token: what shapes a draw, and the draw, as :mod:`fastllama_kernels.sampling` defines it."""

from __future__ import annotations

import torch

from fastllama.ops import SamplingParams, sample

__all__ = ["SamplingParams", "row_seeds", "sample"]

_ODD = -4658895280553007687  # spreads the rows' numbers over all bits


def row_seeds(seed: int, rows: int) -> torch.Tensor:
    """A seed for each row, int64 ``[rows]``: rows of one call draw independently, row 0 whatever the batch."""
    base = torch.full((rows,), seed & (2**63 - 1), dtype=torch.long)
    return base ^ (torch.arange(rows) * _ODD)
