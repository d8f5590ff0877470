"""The table of activations: transformers' functions under transformers' names, and one number for each of them."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from fastllama_kernels.common.activations import ACTIVATIONS, FUNCTIONS, SILU


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_name_stands_for_transformers_function(name) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name].function(x), ACT2FN[name](x))


def test_numbers_count_from_silu_which_is_the_operations_default() -> None:
    assert sorted(FUNCTIONS) == list(range(len(FUNCTIONS)))
    assert SILU == 0
    assert len(set(FUNCTIONS.values())) == len(FUNCTIONS)
