"""Texts and rows of ids: checked, padded, made into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list, once each of them is a string that can be written as UTF-8."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"expected a text or a list of texts, got {texts!r:.100} ({type(texts).__name__}).")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate, {text[error.start]!a} at position {error.start}, which is "
                "no character; decode its bytes with errors='replace', or pass "
                "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
            ) from None
    return list(texts)


def checked_side(side: str) -> str:
    """A side, ``"left"`` or ``"right"``."""
    if side not in ("left", "right"):
        raise ValueError(f"a side is 'left' or 'right', got {side!r}.")
    return side


def padded(rows: list[list[int]], width: int, filler: int, side: str) -> list[list[int]]:
    """The rows, those shorter than ``width`` filled up at one side."""
    if side == "left":
        return [[filler] * (width - len(row)) + row for row in rows]
    return [row + [filler] * (width - len(row)) for row in rows]


def as_tensor(rows: list[list[int]]) -> torch.Tensor:
    """Rows of one length as a LongTensor [b, t]."""
    import torch  # only those who ask for tensors need it

    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens do not make one tensor; "
            "pass padding=True, or truncation=True with max_length."
        )
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), *lengths or [0])
