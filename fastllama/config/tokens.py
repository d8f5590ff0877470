"""Settings that hold token ids: checked, and brought to one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastllama.config.fields import bad, check_int


def check_tokens(name: str, value: Any) -> None:
    """Raise ValueError unless it is a list of token ids."""
    if not isinstance(value, (list, tuple)):
        raise bad(name, value, "a list of token ids")
    for token in value:
        check_int(name, token, at_least=0)


def check_one_or_more(name: str, value: Any) -> None:
    """Raise ValueError unless it is a token id or a list of some."""
    check_tokens(name, value if isinstance(value, (list, tuple)) else [value])


def check_sequences(name: str, value: Any) -> None:
    """Raise ValueError unless it is a list of lists of token ids, none of them empty."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, (list, tuple)) and each for each in value):
        raise bad(name, value, "a list of lists of token ids, none of them empty")
    for tokens in value:
        check_tokens(name, tokens)


def check_biases(name: str, value: Any) -> None:
    """Raise ValueError unless it is ``{(tokens): value}`` or ``[[[tokens], value]]``."""
    expected = "{(tokens): value} or [[[tokens], value]], numbers below infinity"
    try:
        items = bias_items(value)
        numbers = [float(number) for _, number in items]
    except (AttributeError, TypeError, ValueError):
        raise bad(name, value, expected) from None
    check_sequences(name, [tokens for tokens, _ in items])
    if any(math.isnan(number) or number == math.inf for number in numbers):
        raise bad(name, value, expected)


def bias_items(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """The sequences of a ``sequence_bias`` with their values, as a dict or a list has them; the last of equal ones."""
    pairs = value.items() if hasattr(value, "items") else value
    return list({tuple(tokens): number for tokens, number in pairs}.items())


def plain_numbers(value: Any) -> Any:
    """Numbers and lists of Python in place of those of numpy and torch, lists in place of ranges and sets."""
    if getattr(value, "ndim", None) is not None:
        return value.tolist()
    if isinstance(value, (range, set, frozenset)):
        return sorted(value)
    return type(value)(map(plain_numbers, value)) if type(value) in (list, tuple) else value


def depth(value: Any) -> int:
    """How many lists are in each other: 0 for a number."""
    return 1 + max(map(depth, value), default=0) if isinstance(value, (list, tuple)) else 0


def as_list(value: int | Sequence[int] | None) -> list[int]:
    """One token id, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)
