"""4D causal attention masks, built from cache positions.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots.
"""

from __future__ import annotations

import torch


def causal_mask(
    position_t: torch.Tensor,
    target_length: int,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None = None,
    batch_size: int = 1,
) -> torch.Tensor:
    """Additive mask ``[b, 1, t, s]``: a query at position p sees the slots at or before p that are not padding.

    Equal, element by element, to what transformers 4.46 builds in
    ``_prepare_4d_causal_attention_mask_with_cache_position``.

    Args:
        position_t: cache position of each query token, int64, ``[t]`` (shared by all rows) or ``[b, t]``.
        target_length: number of key slots s: the capacity of a static cache, else past length + t.
        dtype: floating dtype of the result; blocked entries hold its minimum, visible ones 0.
        attention_mask: padding mask ``[b, n]`` with n ≤ s, 0 where a slot is padding; slots from n on are ruled
            by causality alone. A 4D mask is returned as it is.
        batch_size: rows b of the result, used when ``position_t`` is 1-D.

    Raises:
        ValueError: the padding mask is neither 2D nor 4D, or is longer than ``target_length``.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    slot_s = torch.arange(target_length, device=position_t.device)
    blocked_bts = slot_s > position_t[..., None]
    if blocked_bts.dim() == 2:
        blocked_bts = blocked_bts.expand(batch_size, -1, -1)
    if attention_mask is not None:
        blocked_bts = blocked_bts | _padding(attention_mask, target_length)[:, None, :]
    mask_bts = torch.zeros(blocked_bts.shape, dtype=dtype, device=position_t.device)
    return mask_bts.masked_fill_(blocked_bts, torch.finfo(dtype).min)[:, None]


def _padding(attention_mask: torch.Tensor, target_length: int) -> torch.Tensor:
    """True ``[b, s]`` where the padding mask blocks a slot; slots past the mask's end are not blocked by it."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions; give a 2D padding mask [batch, tokens] "
            "or a 4D additive mask [batch, 1, queries, slots]"
        )
    missing = target_length - attention_mask.shape[1]
    if missing < 0:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens but the cache has {target_length} slots; "
            "cut the mask or allocate a larger cache"
        )
    return torch.nn.functional.pad(attention_mask == 0, (0, missing), value=False)


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token ``[b, t]``: how many unmasked tokens come before it, and 1 where it is masked."""
    position_bt = attention_mask.long().cumsum(-1) - 1
    return position_bt.masked_fill_(attention_mask == 0, 1)
