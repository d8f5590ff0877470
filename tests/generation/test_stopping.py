"""When rows end, as the host sees it."""

from __future__ import annotations

import torch

from fastllama.generation.request import Request
from fastllama.generation.stopping import Stopping


def stopping(*rows: tuple[int, tuple[int, ...], int]) -> Stopping:
    """For rows of (limit, EOS ids, pad id)."""
    return Stopping(
        [Request(torch.tensor([1]), limit, eos_token_ids=eos, pad_token_id=pad) for limit, eos, pad in rows]
    )


def test_a_row_ends_with_its_own_eos_id_or_at_its_own_limit_and_gives_its_own_pad_id() -> None:
    stop = stopping((9, (5,), 0), (3, (5, 7), 1), (2, (), 2))
    assert stop.take(torch.tensor([[3, 4], [3, 4], [3, 4]])).tolist() == [[3, 4], [3, 4], [3, 4]]
    assert not stop.all_ended
    assert stop.take(torch.tensor([[6, 5, 8, 8], [9, 8, 8, 8], [5, 8, 8, 8]])).tolist() == [[6, 5], [9, 1], [2, 2]]
    assert stop.all_ended


def test_an_eos_id_of_another_row_ends_nothing() -> None:
    stop = stopping((4, (5,), 0), (4, (6,), 0))
    assert stop.take(torch.tensor([[6, 6, 5], [5, 5, 5]])).tolist() == [[6, 6, 5], [5, 5, 5]]
    assert stop.take(torch.tensor([[3], [3]])).tolist() == [[0], [3]]
    assert stop.all_ended
