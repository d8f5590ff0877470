"""What changes a row's logits before a token is sampled: definition, and reference in torch operators.

In this order, as Hugging Face's logits processors:

    bias                   logit + value, of the last token of a sequence whose other tokens the row ends with
    repetition penalty p   logit / p where it is positive, logit · p elsewhere, of tokens that the row has
    frequency, presence    logit - frequency · n - presence · (n > 0), where n of the row's new tokens are this one
    no repeated n-grams    minus infinity for tokens that would end an n-gram which the row has
    token mask             minus infinity for tokens whose bit is 0
    forced tokens          0, and minus infinity for all others, as the first or the last new token, whatever is banned;
                           in transformers a ban can undo that

A bias of minus infinity bans a sequence; one that counts for the first new tokens only keeps EOS ids back. Frequency
and presence penalty are those of OpenAI's API, which Hugging Face has not.

The kernels are ``processing.cpp``, which does nothing where nothing is asked for, and in Triton
(:mod:`fastllama_kernels.sampling.ngrams`) what looks for n-grams; the rest is fused by Inductor on CUDA.

Shape suffixes: ``b`` batch, ``v`` vocabulary, ``w`` words of 32 bits, ``s`` cache slots, ``e`` biases of a row,
``l`` tokens of a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

WORD = 32  # bits
MAX_NGRAM = 16  # that the reference looks for

torch.library.define(
    "fastllama::processed",
    "(Tensor logits, Tensor[] settings, Tensor positions, Tensor steps, Tensor limits) -> Tensor",
)
torch.library.define(
    "fastllama::ban_ngrams", "(Tensor(a!) logits, Tensor tokens, Tensor sizes, Tensor positions) -> ()"
)


class Processing(NamedTuple):
    """What changes the logits of rows; all are tensors, on the rows' device.

    repetition_penalty: float32 ``[b]``; 1 changes nothing (arXiv 1909.05858).
    presence_penalty, frequency_penalty: float32 ``[b]``; 0 changes nothing.
    no_repeat_ngram_size: int64 ``[b]``, n, at most MAX_NGRAM; 0 changes nothing (arXiv 1705.04304).
    forced_first, forced_last: int64 ``[b]``, tokens; -1 where there is none.
    bias_tokens: int64 ``[b, e, l]``, sequences, -1 before their first token; a row's own come before unused ones.
    bias_values: float32 ``[b, e]``, what is added.
    bias_until: int64 ``[b, e]``, number of new tokens from which on it no longer is.
    allowed: int32 ``[b, w]``, bit v % 32 of word v // 32 for token v.
    tokens: int64 ``[b, s]``, the row's tokens by their positions.
    counts: int32 ``[b, v]``, twice how many of the row's new tokens are this one, and one more if its prompt has it.
    """

    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    no_repeat_ngram_size: torch.Tensor
    forced_first: torch.Tensor
    forced_last: torch.Tensor
    bias_tokens: torch.Tensor
    bias_values: torch.Tensor
    bias_until: torch.Tensor
    allowed: torch.Tensor
    tokens: torch.Tensor
    counts: torch.Tensor


def words(vocab_size: int) -> int:
    """Words of a token mask."""
    return -(-vocab_size // WORD)


def token_mask(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The token mask that allows some tokens, int32 ``[w]`` on the CPU; its complement allows all others.

    Args:
        tokens: int64 ``[n]`` on the CPU, in any order.
        vocab_size: they are below it.
    """
    tokens = tokens.unique()
    mask_w = torch.zeros(words(vocab_size), dtype=torch.long, device="cpu")
    mask_w.index_add_(0, tokens // WORD, torch.ones_like(tokens) << tokens % WORD)
    return mask_w.to(torch.int32)  # the lowest 32 bits


def allowed_by(mask_w: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which tokens a token mask, or several, int32 ``[..., w]``, allows: bool ``[..., v]``."""
    bits_ww = mask_w[..., None] >> torch.arange(WORD, device=mask_w.device, dtype=torch.int32) & 1
    return bits_ww.flatten(-2)[..., :vocab_size] == 1


def processed_ref(
    logits_bv: torch.Tensor,
    settings: Sequence[torch.Tensor],
    position_b: torch.Tensor,
    step_b: torch.Tensor,
    limit_b: torch.Tensor,
) -> torch.Tensor:
    """Float32 logits ``[b, v]`` after all that.

    Args:
        logits_bv: of any dtype.
        settings: the fields of Processing.
        position_b: int64, of each row's newest token.
        step_b, limit_b: int64, how many new tokens each row has, and will have at most.
    """
    return _processed(ban_ngrams_ref, logits_bv, Processing(*settings), position_b, step_b, limit_b)


def processed_cuda(logits_bv: torch.Tensor, settings: Sequence[torch.Tensor], *state: torch.Tensor) -> torch.Tensor:
    """``processed_ref`` with the kernel that looks for n-grams."""
    return _processed(torch.ops.fastllama.ban_ngrams, logits_bv, Processing(*settings), *state)


def _processed(
    ban_ngrams: Callable[..., None],
    logits_bv: torch.Tensor,
    processing: Processing,
    position_b: torch.Tensor,
    step_b: torch.Tensor,
    limit_b: torch.Tensor,
) -> torch.Tensor:
    x_bv = _biased(logits_bv.float(), processing, position_b, step_b)
    repetition_b1, presence_b1, frequency_b1 = (penalty_b[:, None] for penalty_b in processing[:3])
    x_bv = torch.where(processing.counts > 0, torch.where(x_bv < 0, x_bv * repetition_b1, x_bv / repetition_b1), x_bv)
    new_bv = processing.counts >> 1
    x_bv = x_bv - frequency_b1 * new_bv - torch.where(new_bv > 0, presence_b1, 0.0)
    ban_ngrams(x_bv, processing.tokens, processing.no_repeat_ngram_size, position_b)
    x_bv = x_bv.masked_fill(~allowed_by(processing.allowed, x_bv.shape[1]), -torch.inf)
    forced_b = torch.where(step_b == 0, processing.forced_first, -1)
    forced_b = torch.where((step_b == limit_b - 1) & (processing.forced_last >= 0), processing.forced_last, forced_b)
    is_forced_bv = torch.arange(x_bv.shape[1], device=x_bv.device) == forced_b[:, None]
    return torch.where(forced_b[:, None] < 0, x_bv, torch.where(is_forced_bv, 0.0, -torch.inf))


def _biased(x_bv: torch.Tensor, processing: Processing, position_b: torch.Tensor, step_b: torch.Tensor) -> torch.Tensor:
    first_bel, last_be = processing.bias_tokens[..., :-1], processing.bias_tokens[..., -1]
    at_bl = position_b[:, None] + torch.arange(1 - first_bel.shape[2], 1, device=x_bv.device)
    end_bl = torch.where(at_bl < 0, -2, processing.tokens.gather(1, at_bl.clamp(min=0)))
    matches_be = ((first_bel < 0) | (first_bel == end_bl[:, None])).all(dim=2)
    counts_be = matches_be & (last_be >= 0) & (step_b[:, None] < processing.bias_until)
    return x_bv.scatter_add(1, last_be.clamp(min=0), torch.where(counts_be, processing.bias_values, 0.0))


def ban_ngrams_ref(x_bv: torch.Tensor, tokens_bs: torch.Tensor, size_b: torch.Tensor, position_b: torch.Tensor) -> None:
    """Give minus infinity, in place, to tokens that would end an n-gram which the row has.

    Args:
        x_bv: float32 logits.
        tokens_bs: int64, the row's tokens by their positions.
        size_b: int64, n of each row, at most MAX_NGRAM; 0 bans nothing.
        position_b: int64, of each row's newest token.
    """
    last_bs = torch.arange(tokens_bs.shape[1], device=x_bv.device).expand_as(tokens_bs)
    repeats_bs = (size_b[:, None] > 0) & (last_bs >= size_b[:, None] - 1) & (last_bs <= position_b[:, None])
    for back in range(MAX_NGRAM - 1):  # the row's newest token against what comes before each, and so on
        newest_b1 = tokens_bs.gather(1, (position_b - back).clamp(min=0)[:, None])
        before_bs = tokens_bs.roll(back + 1, dims=1)
        repeats_bs = repeats_bs & ((before_bs == newest_b1) | (size_b[:, None] - 1 <= back))
    least_bs = torch.where(repeats_bs, -torch.inf, torch.inf)
    x_bv.scatter_reduce_(1, tokens_bs.clamp(0, x_bv.shape[1] - 1), least_bs, "amin")


@torch.library.register_fake("fastllama::processed")
def _processed_fake(logits_bv, settings, position_b, step_b, limit_b):
    return torch.empty_like(logits_bv, dtype=torch.float32)


@torch.library.register_fake("fastllama::ban_ngrams")
def _ban_ngrams_fake(*args) -> None:
    return None
