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
        self._new = {
            slot: torch.empty(request.max_new_tokens, dtype=torch.long, device="cpu")
            for slot, request in self._requests.items()
        }
        self._count = 0
        self._all = ops.token_mask(torch.arange(vocab_size, device="cpu"), vocab_size) if self._requests else None

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
        first, self._count = self._count, self._count + tokens_bn.shape[1]
        for slot, new in self._new.items():
            if not ended[slot]:
                new[first : self._count] = tokens_bn[slot]
        return {slot: self._mask(slot) for slot in self._requests if not ended[slot]}

    def _mask(self, slot: int) -> torch.Tensor:
        request = self._requests[slot]
        assert request.next_allowed is not None
        assert self._all is not None
        allowed = self._all.clone() if request.allowed is None else self._all & request.allowed
        request.next_allowed(self._new[slot][: self._count], allowed)
        if not allowed.any():
            raise ValueError(f"no token may follow in row {slot}: its token mask and what is banned leave none")
        return allowed
