"""Stop strings with a tokenizer of ours: a stopping criterion as transformers' loops take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastllama.tokenizer import Tokenizer

MARGIN = 8  # tokens before a stop string, so that its first token is decoded as it is inside a text


class Decoder(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids."""
        ...


class StopStrings:
    """Ends a row whose newest token completes one of some strings, wherever in the token that is.

    Attributes:
        tail: number of a row's last tokens that it depends on.

    Args:
        strings: one or several.
        tokenizer: of the model.

    Raises:
        ValueError: there is no string, or an empty one.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Decoder) -> None:
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        if not self._strings or not all(isinstance(each, str) and each for each in self._strings):
            raise ValueError(f"stop_strings is {strings!r}; expected a string that is not empty, or a list of such")
        self._tokenizer = tokenizer
        self.tail = max(len(each.encode()) for each in self._strings) + MARGIN  # a token has one byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows of ``input_ids [b, t]`` end with their last token, bool ``[b]``."""
        ended = [self._has_ended(ids) for ids in input_ids[:, -self.tail :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def _has_ended(self, ids: list[int]) -> bool:
        text, before = self._tokenizer.decode(ids), self._tokenizer.decode(ids[:-1])
        pairs = enumerate(zip(text, before, strict=False))
        known = next((at for at, (now, then) in pairs if now != then), len(before))  # a character may become complete
        return any(text.rfind(each) + len(each) > known for each in self._strings if each in text)


def stop_strings_of(strings: str | Sequence[str] | None, tokenizer: Any) -> Callable[[Sequence[int]], bool] | None:
    """Whether a row ends with the last of its tokens, prompt included, of which it takes as many as are there.

    A tokenizer of transformers decides that with transformers' code, as there.

    Args:
        strings: one or several; None: no row ends so.
        tokenizer: of the model, ours or transformers'.

    Raises:
        ValueError: strings that nothing can complete; no tokenizer.
    """
    if strings is None:
        return None
    if tokenizer is None:
        raise ValueError(f"stop_strings is {strings!r} and no tokenizer is given; pass tokenizer= with it")
    criterion: Any = StopStrings(strings, tokenizer)  # which checks the strings
    tail = criterion.tail
    if not isinstance(tokenizer, Tokenizer) and hasattr(tokenizer, "get_vocab"):
        from transformers import StopStringCriteria

        criterion = StopStringCriteria(tokenizer, [strings] if isinstance(strings, str) else list(strings))
    return lambda tokens: bool(criterion(torch.tensor([tokens[-tail:]], device="cpu"), None)[0])
