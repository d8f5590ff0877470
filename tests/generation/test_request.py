"""What a call's arguments become: one request for each row, checked."""

from __future__ import annotations

import pytest
import torch

from fastllama import GenerationConfig
from fastllama.generation.request import Request, requests_of
from fastllama.ops import row_seed

CONFIG = GenerationConfig(max_new_tokens=5)


def test_a_batch_becomes_rows_without_padding_on_either_side() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 0, 0], [1, 2, 3, 4]])
    rows = requests_of(ids, (ids != 0).long(), CONFIG, {}, 96)
    assert [row.prompt.tolist() for row in rows] == [[5, 6], [7, 8], [1, 2, 3, 4]]


def test_every_row_has_all_settings_and_a_seed_of_its_own() -> None:
    config = GenerationConfig(
        max_new_tokens=5, do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, typical_p=0.8, seed=3,
        eos_token_id=(4, 9),
    )  # fmt: skip
    rows = requests_of(torch.ones(3, 2, dtype=torch.int), None, config, {}, 96)
    assert [row.sampling for row in rows] == [(0.5, 7, 0.9, 0.1, 0.8, row_seed(3, index)) for index in range(3)]
    assert {(row.max_new_tokens, row.eos_token_ids, row.pad_token_id) for row in rows} == {(5, (4, 9), 4)}
    assert all(row.prompt.dtype == torch.long for row in rows)


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([[]], {}, "at least one prompt token"),
        ([[96]], {}, "token id 96, outside the vocabulary of 96"),
        ([[5, 3], [2, -1]], {}, "token id -1"),
    ],
)
def test_a_call_that_cannot_be_decoded_is_refused(ids, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        requests_of(torch.tensor(ids, dtype=torch.long), None, CONFIG, settings, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": torch.zeros(0, dtype=torch.long)}, "at least one prompt token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_a_request_is_checked_when_it_is_made(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**({"prompt": torch.tensor([1]), "max_new_tokens": 1} | arguments))
