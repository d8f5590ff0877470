"""What one row wants: its prompt, its limit, its ends, and how it goes from logits to tokens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

MAX_EOS_IDS = 16


class Sampling(NamedTuple):
    """How one row turns logits into tokens: the fields of :class:`fastllama.ops.SamplingParams`, one number each."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


GREEDY = Sampling()


class Changes(NamedTuple):
    """What changes one row's logits: see :class:`fastllama.ops.Processing`.

    repetition_penalty: of the tokens that the row has; 1 changes nothing.
    min_new: number of new tokens before an EOS id may come.
    """

    repetition_penalty: float = 1.0
    min_new: int = 0


NO_CHANGES = Changes()


class Row(Protocol):
    """What a slot is loaded with, checked: see :class:`fastllama.generation.request.Request`."""

    @property
    def prompt(self) -> torch.Tensor:
        """int64 ``[tokens]`` on the CPU, at least one token."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The row ends after that many."""
        ...

    @property
    def sampling(self) -> Sampling:
        """How its tokens are sampled."""
        ...

    @property
    def changes(self) -> Changes:
        """What changes its logits."""
        ...

    @property
    def seen(self) -> torch.Tensor:
        """int64 ``[tokens]`` on the CPU: what a repetition penalty takes for the row's tokens before its new ones."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The row ends with one of these. The device sees the first MAX_EOS_IDS; whoever reads the tokens, all."""
        ...

    @property
    def pad_token_id(self) -> int:
        """What the row gives after its end; it may lie outside the vocabulary."""
        ...
