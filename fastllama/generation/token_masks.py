"""Token masks that a function writes before each token, from what its row has written so far.

Shape suffixes: ``b`` rows, ``n`` tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fastllama import ops
from fastllama.generation.request import Request


class TokenMasks:
    """Those of a call; true where there are any.

    Args:
        requests: of the call's rows.
        vocab_size: of the model.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int) -> None:
        self._requests = {slot: request for slot, request in enumerate(requests) if request.next_allowed is not None}
        self._new = {slot: torch.empty(0, dtype=torch.long, device="cpu") for slot in self._requests}
        self._words = ops.token_mask_words(vocab_size)

    def __bool__(self) -> bool:
        return bool(self._requests)

    def first(self, requests: Sequence[Request]) -> list[Request]:
        """The requests, with the masks of their first new tokens."""
        masks = {slot: self._mask(slot) for slot in self._requests}
        return [
            dataclasses.replace(request, allowed=masks[slot]) if slot in masks else request
            for slot, request in enumerate(requests)
        ]

    def after(self, tokens_bn: torch.Tensor, ended: Sequence[bool]) -> Mapping[int, torch.Tensor]:
        """The next masks, by slot, of rows that go on after these new tokens."""
        for slot in self._requests:
            self._new[slot] = torch.cat((self._new[slot], tokens_bn[slot]))
        return {slot: self._mask(slot) for slot in self._requests if not ended[slot]}

    def _mask(self, slot: int) -> torch.Tensor:
        request = self._requests[slot]
        allowed = torch.full((self._words,), -1, dtype=torch.int32, device="cpu")
        if request.allowed is not None:
            allowed.copy_(request.allowed)
        assert request.next_allowed is not None
        request.next_allowed(self._new[slot], allowed)
        return allowed
