"""The arguments of each ``forward`` call in Hugging Face's decoding loop.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``n`` tokens so far, ``m`` model dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from fastllama.model.cache import StaticCache, one_cache
from fastllama.model.masks import causal_mask, positions_from_mask


class HasDtype(Protocol):
    """The part of a model that is needed here."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        ...


def embedded(table: nn.Embedding, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The embeddings ``[b, t, m]`` of token ids, or those that are given in their place.

    Raises:
        ValueError: both are given, or neither.
        IndexError: an id outside the vocabulary (found on a CPU; CUDA has an assertion of its own).
    """
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {got}")
    try:
        return table(input_ids)
    except IndexError as error:
        low, high = int(input_ids.min()), int(input_ids.max())
        if low >= 0 and high < table.num_embeddings:
            raise
        bad, last = (low if low < 0 else high), table.num_embeddings - 1
        raise IndexError(f"input_ids hold {bad}; expected 0 to {last}") from error


def prepare_inputs_for_generation(
    model: HasDtype,
    input_ids: torch.Tensor,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool = True,
    num_logits_to_keep: int | None = None,
    *,
    cache: Any = None,
    next_sequence_length: int | None = None,
    is_first_iteration: bool | None = None,
    logits_to_keep: int | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of the next ``forward`` call of a decoding loop, as in transformers 4.46 or as in 5.x.

    Ids and positions come back as contiguous clones: a view of the right shape with another stride would make a
    compiled forward record a new CUDA graph. With a StaticCache and a 2D mask, the mask becomes 4D over the
    cache's whole length, so that its shape does not change from step to step.

    Args:
        model: gives the mask's dtype.
        input_ids: all ids so far ``[b, n]``, or already only the unprocessed ones ``[b, t]``.
        past_key_values, cache: two names for the cache; it comes back under the one that it was given.
        attention_mask: padding mask ``[b, n]``; positions are derived from it when ``position_ids`` is None.
        inputs_embeds: ``[b, n, m]``, used in the first step only.
        cache_position: slots of the unprocessed tokens, int64 ``[t]``; with a cache it is needed, or one of
            the two below, which stand for it in 5.x: there the slots that follow the cache's content are taken.
        position_ids: rotary positions ``[b, n]``.
        use_cache, num_logits_to_keep, logits_to_keep: passed on to ``forward``.
        next_sequence_length: how many of the ids, the last ones, are unprocessed; all of them when None.
        is_first_iteration: whether this is a call's first step.

    Raises:
        ValueError: a cache without ``cache_position`` and what stands for it; two caches.
    """
    cache_name = "past_key_values" if cache is None else "cache"
    past_key_values = one_cache(past_key_values, cache)
    if next_sequence_length is not None or is_first_iteration is not None:
        input_ids, inputs_embeds, cache_position = _as_in_5(
            input_ids, inputs_embeds, past_key_values, next_sequence_length, bool(is_first_iteration)
        )
    elif past_key_values is not None:
        input_ids = _unprocessed(input_ids, inputs_embeds, cache_position)
    if attention_mask is not None and attention_mask.dim() == 2 and position_ids is None:
        position_ids = positions_from_mask(attention_mask)
    if position_ids is not None:
        if past_key_values is not None and cache_position is not None:
            position_ids = position_ids[:, -cache_position.shape[0] :]
        position_ids = position_ids.clone(memory_format=torch.contiguous_format)
    inputs: dict[str, Any] = {"input_ids": None, "inputs_embeds": None}
    if inputs_embeds is not None and (is_first_iteration or cache_position is None or int(cache_position[0]) == 0):
        inputs["inputs_embeds"] = current = inputs_embeds
    else:
        inputs["input_ids"] = current = input_ids.clone(memory_format=torch.contiguous_format)
    if isinstance(past_key_values, StaticCache) and attention_mask is not None and attention_mask.dim() == 2:
        assert cache_position is not None
        capacity = past_key_values.get_max_length()
        attention_mask = causal_mask(cache_position, capacity, model.dtype, attention_mask, current.shape[0])
    kept = {"num_logits_to_keep": num_logits_to_keep, "logits_to_keep": logits_to_keep}
    inputs |= {name: value for name, value in kept.items() if value is not None}
    return inputs | {
        "position_ids": position_ids,
        "cache_position": cache_position,
        cache_name: past_key_values,
        "use_cache": use_cache,
        "attention_mask": attention_mask,
    }


def _unprocessed(
    input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None, cache_position: torch.Tensor | None
) -> torch.Tensor:
    """Return the ids whose keys are not in the cache yet."""
    if cache_position is None:
        raise ValueError(
            "prepare_inputs_for_generation needs cache_position, next_sequence_length or is_first_iteration "
            "when a cache is given"
        )
    if inputs_embeds is not None:
        return input_ids[:, -cache_position.shape[0] :]
    if input_ids.shape[1] != cache_position.shape[0]:
        return input_ids[:, cache_position]
    return input_ids


def _as_in_5(
    input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None, cache: Any, length: int | None, is_first: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The last ``length`` ids, embeddings in the first step only, and the slots that follow the cache's content."""
    if length is not None:
        input_ids = input_ids[:, -length:]
        inputs_embeds = None if inputs_embeds is None else inputs_embeds[:, -length:]
    inputs_embeds = inputs_embeds if is_first else None
    if cache is None:
        return input_ids, inputs_embeds, None
    t = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    past = cache.get_seq_length()
    return input_ids, inputs_embeds, torch.arange(past, past + t, device=input_ids.device)
