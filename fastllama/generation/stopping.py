"""When rows end, as the host sees it: it reads tokens later than the device makes them.

Shape suffixes: ``b`` batch, ``n`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastllama.generation.request import Request


class Stopping:
    """Follows the new tokens of some rows, to see which of them have ended: by EOS id, stop string or at the limit."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._eos = [frozenset(request.eos_token_ids) for request in requests]
        self._left = [request.max_new_tokens for request in requests]
        self._pad = [request.pad_token_id for request in requests]
        self._ends = [request.ends for request in requests]
        self._texts = [[] if request.ends is None else request.seen.tolist() for request in requests]

    @property
    def all_ended(self) -> bool:
        """Whether no row goes on."""
        return not any(self._left)

    @property
    def ended(self) -> list[bool]:
        """Whether each row has."""
        return [not left for left in self._left]

    def take(self, tokens_bn: torch.Tensor) -> torch.Tensor:
        """The rows' next tokens, up to the step in which the last row ended; pad ids where a row had ended."""
        rows = tokens_bn.tolist()
        kept = [self._until_the_end(index, tokens) for index, tokens in enumerate(rows)]
        if min(kept) == tokens_bn.shape[1]:
            return tokens_bn
        for index, (tokens, count) in enumerate(zip(rows, kept, strict=True)):
            tokens[count:] = [self._pad[index]] * (len(tokens) - count)
        return torch.tensor(rows, dtype=torch.long, device="cpu")[:, : max(kept)]

    def _until_the_end(self, index: int, tokens: Sequence[int]) -> int:
        """How many of the tokens the row still gives."""
        for count, token in enumerate(tokens[: self._left[index]], start=1):
            self._left[index] -= 1
            if token in self._eos[index] or self._is_stopped(index, token):
                self._left[index] = 0
            if not self._left[index]:
                return count
        return len(tokens) if self._left[index] else 0

    def _is_stopped(self, index: int, token: int) -> bool:
        ends, text = self._ends[index], self._texts[index]
        if ends is None:
            return False
        text.append(token)
        return ends(text)
