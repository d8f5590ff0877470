"""Token ids in, text out, one token at a time and never half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllama.tokenizer.backend import Backend

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no character (yet)
EAGER_TRIES = 8  # unfinished tokens up to which each new one is tried; a character has at most four bytes


class IncrementalDetokenizer:
    """Turns the ids of one sequence into text as they arrive. All it returns, joined, equals ``decode`` of all ids.

    Made by :meth:`Tokenizer.detokenizer`. Text is held back while later tokens may still change it: bytes of an
    unfinished character, and a run of byte tokens that the decoder reads as a whole. The text of a token depends on
    the tokens before it (the first one loses its space), so a window is decoded: the tokens whose text was returned
    last, and those since. The work is O(1) per token, amortised.

    Args:
        backend: the vocabulary.
        skip: ids that have no text here, such as the special ones.
    """

    def __init__(self, backend: Backend, skip: frozenset[int]) -> None:
        self._backend = backend
        self._skip = skip
        self._restart()

    def put(self, ids: int | Iterable[int]) -> str:
        """Take the next id, or several (a list or a tensor [t]); return the text that is now complete, if any."""
        return "".join(map(self._put, (ids,) if isinstance(ids, int) else ids))

    def end(self) -> str:
        """End the sequence and return the text held back. The next ``put`` starts a new sequence."""
        rest = self._backend.decode(self._window)[len(self._given) :]
        self._restart()
        return rest

    def _restart(self) -> None:
        self._window: list[int] = []
        self._given = ""  # decode(window[:given_ids]), the part of the window that was given out
        self._given_ids = 0

    def _put(self, token_id: int) -> str:
        token_id = int(token_id)
        if token_id in self._skip or self._backend.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        if self._backend.reads_as_run(token_id) or not self._may_be_complete():
            return ""
        text = self._backend.decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._given) :]
        self._window = self._window[self._given_ids :]
        self._given_ids = len(self._window)
        self._given = self._backend.decode(self._window)
        return new

    def _may_be_complete(self) -> bool:
        """Whether to decode the window; in a long run of broken bytes only each time it has doubled."""
        held = len(self._window) - self._given_ids
        if held <= EAGER_TRIES or held & (held - 1) == 0:
            return True
        return not self._backend.decode(self._window[-1:]).endswith(REPLACEMENT)
