"""One token of each row, sampled from its logits after temperature, top-k, top-p and min-p: definition and reference.

    token[b]    = argmax over the kept tokens of  logit[b, v] / T - log(-log(1 - u[b, v]))      T > 0
                = argmax of logit[b, v], the lowest token of those that tie                      T = 0

u is uniform in (0, 1), a hash of seed, position and token. So a token is sampled with its probability among the kept
ones (the Gumbel-max trick, arXiv 1411.0030), and the sample depends on nothing but these: not on the batch, nor on the
order in which tokens are looked at, nor on how many are. That is what lets the kernels find it without sorting a
vocabulary: they sample among all tokens, and where the winner is not kept, again among those more likely than it.

Kept are the tokens v that pass all of

    top-k   logit[v] is at least the k-th largest
    top-p   of what top-k leaves, the tokens more likely than v hold less than p (arXiv 1904.09751)
    min-p   v is at least min-p times as probable as the most likely token (arXiv 2407.01082)
    typical of what these leave, the tokens whose surprise is nearer to the entropy hold less than p (arXiv 2202.00666)

in this order, as Hugging Face's logits processors; equally likely tokens are kept or dropped together. The Triton
kernel does all but the last.

Bytes moved: the logits, once to sample and once more to check the winner. The kernels (``cpu.cpp``;
:mod:`fastllama_kernels.sampling.triton`, which registers itself for CUDA when imported) need contiguous logits in
float32, bfloat16 or float16.

Shape suffixes: ``b`` batch, ``v`` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

torch.library.define(
    "fastllama::sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor typical_p, Tensor seed, "
    "Tensor positions) -> Tensor",
)

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


class SamplingParams(NamedTuple):
    """How each row turns logits into a token; every field is a tensor ``[b]``.

    temperature: float32, divides the logits; 0 takes the most likely token.
    top_k: int64, keep that many most likely tokens; 0 keeps all.
    top_p: float32, keep the fewest most likely tokens whose probabilities reach it; 1 keeps all.
    min_p: float32, keep tokens at least this probable, relative to the most likely; 0 keeps all.
    typical_p: float32, keep the tokens of the most typical surprise whose probabilities reach it; 1 keeps all.
    seed: int64, with the token's position it determines the sample.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    seed: torch.Tensor


def sample_ref(logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor) -> torch.Tensor:
    """``sample`` in torch operators, for logits of any dtype; sorts the vocabulary."""
    scaled_bv = _scaled(logits_bv, params)
    noise_bv = -torch.log(-torch.log1p(-uniform(params.seed, position_b, logits_bv.shape[1])))
    score_bv = scaled_bv + torch.where(params.temperature > 0, 1.0, 0.0)[:, None] * noise_bv
    return score_bv.masked_fill(~_kept(scaled_bv, params), -torch.inf).argmax(dim=-1)


def warped_probabilities(logits_bv: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probability with which each token is sampled, float32 ``[b, v]``, at temperatures above 0."""
    scaled_bv = _scaled(logits_bv, params)
    return scaled_bv.masked_fill(~_kept(scaled_bv, params), -torch.inf).softmax(dim=-1)


def _scaled(logits_bv: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return logits_bv.float() / torch.where(params.temperature > 0, params.temperature, 1.0)[:, None]


def _kept(scaled_bv: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens may be sampled, bool ``[b, v]``."""
    ordered_bv = scaled_bv.sort(dim=-1, descending=True).values
    top_b1 = ordered_bv[:, :1]
    kth_b1 = ordered_bv.gather(1, (params.top_k.clamp(1, scaled_bv.shape[1]) - 1)[:, None])
    kth_b1 = torch.where(params.top_k[:, None] > 0, kth_b1, -torch.inf)
    prob_bv = ordered_bv.masked_fill(ordered_bv < kth_b1, -torch.inf).softmax(dim=-1)
    inside_bv = prob_bv.cumsum(dim=-1) - prob_bv < params.top_p[:, None]
    last_b1 = ordered_bv.masked_fill(~inside_bv, torch.inf).amin(dim=-1, keepdim=True).minimum(top_b1)
    likely_bv = (scaled_bv - top_b1).exp() >= params.min_p[:, None]
    return _typical(scaled_bv, (scaled_bv >= kth_b1) & (scaled_bv >= last_b1) & likely_bv, params.typical_p[:, None])


def _typical(scaled_bv: torch.Tensor, kept_bv: torch.Tensor, mass_b1: torch.Tensor) -> torch.Tensor:
    """Which of some tokens are typical, bool ``[b, v]``."""
    log_bv = scaled_bv.masked_fill(~kept_bv, -torch.inf).log_softmax(dim=-1)
    prob_bv = log_bv.exp()
    entropy_b1 = -torch.where(kept_bv, log_bv * prob_bv, 0.0).sum(dim=-1, keepdim=True)
    away_bv = torch.where(kept_bv, (log_bv + entropy_b1).abs(), torch.inf)
    away_bv, order_bv = away_bv.sort(dim=-1)
    prob_bv = prob_bv.gather(1, order_bv)
    inside_bv = (prob_bv.cumsum(dim=-1) - prob_bv < mass_b1) & (away_bv < torch.inf)
    last_b1 = away_bv.masked_fill(~inside_bv, -torch.inf).amax(dim=-1, keepdim=True)
    typical_bv = torch.zeros_like(kept_bv).scatter(1, order_bv, away_bv <= last_b1)
    return kept_bv & (typical_bv | (mass_b1 >= 1))


def uniform(seed_b: torch.Tensor, position_b: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Float32 ``[b, v]`` in (0, 1): a hash of seed, position and token (splitmix64, doi 10.1145/2660193.2660195)."""
    key_b1 = _mix(seed_b + position_b * _GOLDEN)[:, None]
    # Not key + token · _GOLDEN: Inductor would take that product for an index into memory, and overflow.
    z_bv = _mix((key_b1 + torch.arange(vocab_size, device=seed_b.device)) * _GOLDEN)
    # Half a step above zero, and below one, so that every token has a finite score.
    return ((_shift_right(z_bv, 32).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift would copy the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def row_seed(seed: int, row: int) -> int:
    """The seed of a row of a call, a signed 64-bit integer: rows sample independently, row 0 whatever the batch.

    Args:
        seed: of the call, any integer.
        row: its number in the batch, from 0.
    """
    mixed = (seed & (2**63 - 1)) ^ (row * _MIX1)
    return (mixed + 2**63) % 2**64 - 2**63


@torch.library.register_fake("fastllama::sample")
def _sample_fake(logits_bv, temperature_b, top_k_b, top_p_b, min_p_b, typical_p_b, seed_b, position_b):
    return torch.empty_like(position_b)
