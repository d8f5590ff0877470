"""What one row wants: its prompt, its limit, its ends, and how it goes from logits to tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

MAX_EOS_IDS = 16
MAX_BIASES, MAX_BIAS_TOKENS = 512, 8  # of a row
ALWAYS = 2**62  # more new tokens than a row will ever have


class Sampling(NamedTuple):
    """How one row turns logits into tokens: the fields of :class:`fastllama.ops.SamplingParams`, one number each."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def check_sampling(rows: Iterable[Sampling], device: torch.device) -> None:
    """Raise NotImplementedError where rows ask for what no kernel of a device does."""
    if device.type != "cpu" and any(row.typical_p < 1 for row in rows):
        raise NotImplementedError("typical_p is done on a CPU, by no kernel of a GPU")


class Bias(NamedTuple):
    """What is added to the logit of the last of some tokens, where a row ends with the others.

    tokens: at least one, at most MAX_BIAS_TOKENS.
    value: minus infinity bans it.
    until: the number of new tokens from which on it no longer is.
    """

    tokens: tuple[int, ...]
    value: float = -float("inf")
    until: int = ALWAYS


class Changes(NamedTuple):
    """What changes one row's logits, besides a token mask: numbers as in :class:`fastllama.ops.Processing`, and biases.

    biases: at most MAX_BIASES.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    forced_first: int = -1
    forced_last: int = -1
    biases: tuple[Bias, ...] = ()

    @property
    def counts_tokens(self) -> bool:
        """Whether it depends on how often tokens have come."""
        return self[:3] != NO_CHANGES[:3]

    @property
    def reads_tokens(self) -> bool:
        """Whether it depends on their order."""
        return self.no_repeat_ngram_size > 0 or any(len(bias.tokens) > 1 for bias in self.biases)


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
    def allowed(self) -> torch.Tensor | None:
        """int32 ``[words]`` on the CPU, the token mask to begin with; None where it allows all tokens."""
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
