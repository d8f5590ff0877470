"""The two orders in which checkpoints store what a rotary embedding turns."""

from __future__ import annotations

import torch


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection for an embedding that turns neighbours.

    In the Hugging Face order dimension i of a head turns with i + d/2; in the order of the original checkpoints, which
    gpt-fast and llama.cpp compute in, 2i turns with 2i + 1. Scores are the same, for q and k are reordered alike.

    Args:
        weight: ``[heads * d, m]``, or a bias ``[heads * d]``.
        heads: of the projection.

    Returns:
        A contiguous tensor of the same shape.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape).contiguous()
