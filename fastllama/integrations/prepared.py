"""What is the caller's own in a call that transformers has prepared, as it does for ``custom_generate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastllama.model.masks import positions_from_mask


def given_by_the_caller(
    model: Any, input_ids: torch.Tensor, generation_config: Any, processors: Iterable[Any], criteria: Iterable[Any]
) -> list[str]:
    """Names of the processors and criteria of a call that are not what its generation config comes to."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    given = [*processors, *criteria]
    if not given:
        return []
    core: Any = getattr(model, "_orig_mod", model)
    expected = [
        *core._get_logits_processor(
            generation_config=generation_config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            logits_processor=LogitsProcessorList(),
            device=input_ids.device,
        ),
        *core._get_stopping_criteria(generation_config=generation_config, stopping_criteria=StoppingCriteriaList()),
    ]
    return sorted({type(each).__name__ for each in given if not any(_are_alike(each, own) for own in expected)})


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two processors or criteria do the same: they are of one class and hold the same."""
    if type(one) is not type(other) or vars(one).keys() != vars(other).keys():
        return False
    pairs = [(value, vars(other)[name]) for name, value in vars(one).items()]
    return all(torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1] for pair in pairs)


def own_arguments(kwargs: Mapping[str, Any], mask: torch.Tensor | None) -> dict[str, Any]:
    """What a caller has given, without what transformers makes: an empty cache, positions that a mask implies."""
    own = dict(kwargs)
    for name in ("past_key_values", "cache"):
        cache = own.get(name)  # the caller's own is marked from transformers 5.16 on, and has to be filled
        if cache is None or not (cache.get_seq_length() or getattr(cache, "_is_user_defined", False)):
            own.pop(name, None)
    if (position_bt := own.get("position_ids")) is not None:
        is_token_bt = torch.ones_like(position_bt) if mask is None else mask
        if (
            position_bt.shape == is_token_bt.shape
            and not ((position_bt != positions_from_mask(is_token_bt)) & (is_token_bt != 0)).any()
        ):
            del own["position_ids"]
    return own
