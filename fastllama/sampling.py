"""From logits to the next token: pure tensor functions, no host sync, one row's draw independent of the others.

Shape suffixes: ``b`` batch, ``v`` vocabulary, ``c`` candidates, the most likely tokens in descending order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


class SamplingParams(NamedTuple):
    """How each row turns logits into a token; every field is a tensor ``[b]``.

    temperature: float32, divides the logits; 0 picks the most likely token.
    top_k: int64, keep that many most likely tokens; 0 keeps all.
    top_p: float32, keep the fewest most likely tokens whose probabilities reach it (arXiv 1904.09751); 1 keeps all.
    min_p: float32, keep tokens at least this probable, relative to the most likely (arXiv 2407.01082); 0 keeps all.
    seed: int64, with the token's position it determines the draw.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor


def candidates_needed(temperature: float, top_k: int, vocab_size: int) -> int:
    """How many of the most likely tokens a draw has to look at: 1 (greedy), 64, 1024 or the whole vocabulary.

    A few sizes and no others, because each is a compiled step of its own.
    """
    if temperature == 0:
        return 1
    sizes = (size for size in (64, 1024) if 0 < top_k <= size < vocab_size)
    return next(sizes, vocab_size)


def sample(logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor, candidates: int) -> torch.Tensor:
    """The next token of each row, int64 ``[b]``.

    Args:
        logits_bv: float32.
        params: per row; see SamplingParams.
        position_b: int64, position of the token that is drawn; makes every draw of a row a new one.
        candidates: how many of the most likely tokens to consider, from :func:`candidates_needed`.
    """
    if candidates == 1:
        return logits_bv.argmax(dim=-1)
    top_bc, token_bc = logits_bv.topk(candidates, dim=-1)
    cumulative_bc = warped_probabilities(top_bc, params).cumsum(dim=-1)
    # Scaling by the last sum, not 1, keeps rounding from ever drawing a token of probability zero.
    target_b1 = uniform(params.seed, position_b)[:, None] * cumulative_bc[:, -1:]
    drawn_b1 = torch.searchsorted(cumulative_bc, target_b1, right=True)
    drawn_b1 = torch.where(params.temperature[:, None] > 0, drawn_b1.clamp(max=candidates - 1), 0)
    return token_bc.gather(1, drawn_b1)[:, 0]


def warped_probabilities(top_bc: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities ``[b, c]`` of descending logits after temperature, top-k, top-p and min-p, in this order."""
    temperature_b1 = torch.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    scaled_bc = top_bc / temperature_b1
    rank_c = torch.arange(top_bc.shape[1], device=top_bc.device)
    beyond_k_bc = (rank_c >= params.top_k[:, None]) & (params.top_k[:, None] > 0)
    prob_bc = torch.softmax(scaled_bc.masked_fill(beyond_k_bc, -torch.inf), dim=-1)
    before_bc = prob_bc.cumsum(dim=-1) - prob_bc  # what more likely tokens hold already
    nucleus_bc = (before_bc < params.top_p[:, None]) | (rank_c == 0)
    likely_bc = prob_bc >= params.min_p[:, None] * prob_bc[:, :1]
    prob_bc = torch.where(nucleus_bc & likely_bc, prob_bc, 0.0)
    return prob_bc / prob_bc.sum(dim=-1, keepdim=True)


def uniform(seed_b: torch.Tensor, position_b: torch.Tensor) -> torch.Tensor:
    """One float32 in [0, 1) per row, a hash of seed and position (splitmix64, doi 10.1145/2660193.2660195)."""
    z = seed_b + position_b * _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() * 2.0**-24


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift would copy the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def row_seeds(seed: int, rows: int) -> torch.Tensor:
    """A seed for each row, int64 ``[rows]``: rows of one call draw independently, row 0 whatever the batch."""
    base = torch.full((rows,), seed & (2**63 - 1), dtype=torch.long)
    return base ^ (torch.arange(rows) * _MIX1)
