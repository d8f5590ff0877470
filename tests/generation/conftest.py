"""A model of ours and the same one of transformers', and prompts for both."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def pair(make_pair_once):
    return make_pair_once()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(5))
