"""The 4D mask, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama.model.masks import causal_mask, positions_from_mask


def mask_4_46(attention_mask, sequence_length, target_length, dtype, cache_position, batch_size) -> torch.Tensor:
    """What transformers 4.46 computes, written as rules: blocked by a later slot, or by padding within the mask."""
    blocked = torch.finfo(dtype).min
    mask = torch.zeros(batch_size, 1, sequence_length, target_length, dtype=dtype)
    for b in range(batch_size):
        for t in range(sequence_length):
            for s in range(target_length):
                padded = attention_mask is not None and s < attention_mask.shape[1] and attention_mask[b, s] == 0
                if s > cache_position[t] or padded:
                    mask[b, 0, t, s] = blocked
    return mask


@given(
    batch=st.integers(1, 3), past=st.integers(0, 5), new=st.integers(1, 5), spare=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), masked=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_element_is_as_in_transformers_4_46(batch, past, new, spare, dtype, masked, seed) -> None:
    torch.manual_seed(seed)
    length = past + new
    attention_mask = torch.randint(0, 2, (batch, length)) if masked else None
    position = torch.arange(past, length)
    ours = causal_mask(position, length + spare, dtype, attention_mask, batch)
    expected = mask_4_46(attention_mask, new, length + spare, dtype, position, batch)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


def test_rows_may_have_positions_of_their_own() -> None:
    mask = causal_mask(torch.tensor([[1], [3]]), 5, torch.float32)
    assert (mask == 0).sum(-1).flatten().tolist() == [2, 4]


def test_a_4d_mask_is_returned_as_it_is() -> None:
    given_mask = torch.randn(1, 1, 2, 4)
    assert causal_mask(torch.arange(2), 4, torch.float32, given_mask) is given_mask


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (1, 9)])
def test_a_mask_that_does_not_fit_is_refused(shape) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        causal_mask(torch.arange(2), 8, torch.float32, torch.ones(shape))


def test_positions_count_from_the_first_token_whatever_the_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_from_mask(mask).tolist() == [[1, 1, 0, 1], [0, 1, 2, 1]]
