"""Models of ours, the same one of transformers', and prompts for both."""

from __future__ import annotations

import pytest
import torch
from drafts import draft_always, make

from fastllama import LlamaForCausalLM
from fastllama.engine.runner import Runner


@pytest.fixture(scope="module")
def pair(make_pair_once):
    return make_pair_once()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def exact() -> LlamaForCausalLM:
    return make("float32")


@pytest.fixture(scope="module")
def second() -> LlamaForCausalLM:
    """A model that often agrees with those of :func:`make`."""
    other, noise = make("float32"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    return other


@pytest.fixture
def eager(monkeypatch) -> list[int]:
    """Drafts whatever it costs; a list of how many tokens a row were drafted in each step."""
    draft_always(monkeypatch)
    genuine, sizes = Runner.step_with, []

    def step_with(self, draft_bt):
        sizes.append(draft_bt.shape[1])
        return genuine(self, draft_bt)

    monkeypatch.setattr(Runner, "step_with", step_with)
    return sizes
