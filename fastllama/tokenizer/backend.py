"""What a vocabulary can do, whichever file it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastllama.tokenizer.settings import TokenizerSettings


class Backend(Protocol):
    """A vocabulary.

    Attributes:
        vocab_size: tokens of the base vocabulary.
        size: tokens in all, with the added ones.
        named: the special tokens with a role, e.g. ``{"bos_token": "<s>"}``.
        special_ids: ids that ``skip_special_tokens`` leaves out.
        prefix, suffix: the ids that ``add_special_tokens`` puts before and after.
        is_llamas: whether only Llama's own tokenizer classes read such files.
    """

    vocab_size: int
    size: int
    named: dict[str, str]
    special_ids: frozenset[int]
    prefix: list[int]
    suffix: list[int]
    is_llamas: bool

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without prefix and suffix."""
        ...

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each token of a text its first character and the one after its last.

        Raises:
            NotImplementedError: this kind of vocabulary does not say.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; ids that are no token have none."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None where it is not in the vocabulary."""
        ...

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, or None where there is none."""
        ...

    def reads_as_run(self, token_id: int) -> bool:
        """Whether the text of this token may change with any later one of the same kind."""
        ...


def ids_around(backend: Backend, settings: TokenizerSettings, add_bos: bool = False) -> tuple[list[int], list[int]]:
    """Prefix and suffix as ``add_bos_token`` (``add_bos`` by default) and ``add_eos_token`` say."""

    def ids(flag: str, default: bool, name: str) -> list[int]:
        token = backend.named.get(name) if settings.config.get(flag, default) else None
        token_id = None if token is None else backend.token_to_id(token)
        return [] if token_id is None else [token_id]

    return ids("add_bos_token", add_bos, "bos_token"), ids("add_eos_token", False, "eos_token")
