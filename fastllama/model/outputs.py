"""Results of the forward calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class CausalLMOutput:
    """Result of ``forward``; fields that were not requested are None, and indices skip them, as in transformers."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def cache(self) -> Any:
        """``past_key_values``, as transformers calls it from 5.24 on."""
        return self.past_key_values

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


@dataclass
class DecoderOutput:
    """Result of the decoder stack: final hidden states ``[b, t, m]``, the cache, and what was requested."""

    last_hidden_state: torch.Tensor
    past_key_values: Any
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
