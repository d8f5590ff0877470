"""What quantization costs: perplexity, divergence and agreement of next tokens, over a text.

Shape suffixes: ``t`` tokens of a window, ``v`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fastllama.model.cache import StaticCache
from fastllama.model.llama import Llama


@dataclass(frozen=True)
class Quality:
    """How a model predicts a text, and how near it is to another that it stands for.

    Attributes:
        perplexity: e to the mean negative log-likelihood of a token.
        divergence: mean Kullback-Leibler divergence of its next-token distribution from the reference's, in nats.
        agreement: fraction of positions where both have the same most likely token.
        tokens: that were predicted.
    """

    perplexity: float
    divergence: float
    agreement: float
    tokens: int


def windows(ids: Sequence[int], length: int, bos: int | None = None) -> Iterator[torch.Tensor]:
    """The ids in windows ``[1, t]`` of a length, each after the BOS id where there is one.

    A rest that is shorter is left out; a text that is shorter is one window.
    """
    start = [] if bos is None else [bos]
    step = max(1, min(length - len(start), len(ids)))
    for first in range(0, len(ids) - step + 1, step):
        yield torch.tensor([[*start, *ids[first : first + step]]])


@torch.inference_mode()
def quality(
    model: Llama, reference: Llama, texts: Sequence[torch.Tensor], cache_dtype: torch.dtype | None = None
) -> Quality:
    """Read windows with a model and with its reference.

    Args:
        model: the quantized one.
        reference: the one that it was made from.
        texts: ids ``[1, t]`` of each window.
        cache_dtype: of the keys and values that the model attends to; None for its own.
    """
    loss = divergence = agreed = 0.0
    tokens = 0
    for ids in texts:
        ours_tv, theirs_tv = _log_probabilities(model, ids, cache_dtype), _log_probabilities(reference, ids, None)
        targets = ids[0, 1:].to(ours_tv.device)
        loss += float(F.nll_loss(ours_tv, targets, reduction="sum"))
        divergence += float(F.kl_div(ours_tv, theirs_tv, reduction="sum", log_target=True))
        agreed += int((ours_tv.argmax(1) == theirs_tv.argmax(1)).sum())
        tokens += len(targets)
    if not tokens:
        raise ValueError("there is no text to read: expected at least one window of two tokens")
    return Quality(math.exp(loss / tokens), divergence / tokens, agreed / tokens, tokens)


def _log_probabilities(model: Llama, ids: torch.Tensor, cache_dtype: torch.dtype | None) -> torch.Tensor:
    """``[t - 1, v]`` of the tokens after the first."""
    cache = cache_dtype and StaticCache(model.config, 1, ids.shape[1], model.device, cache_dtype)
    output = model(ids.to(model.device), past_key_values=cache, use_cache=cache is not None, return_dict=True)
    return output.logits[0, :-1].log_softmax(dim=-1)
