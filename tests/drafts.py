"""Small models whose texts repeat, and drafting whatever it costs."""

from __future__ import annotations

import pytest
import torch
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.generation import speculation
from fastllama.generation.known import Costs
from fastllama.generation.speculation import Drafter


def make(dtype: str, scheme: str | None = None, cache: str | None = None, folder=None) -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"initializer_range": 0.3})).to(getattr(torch, dtype)).eval()
    if scheme is not None:
        model.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype, quantize=scheme, kv_cache_dtype=cache)
    model.prefix_caching = False  # what it reuses other kernels have computed
    return model


def draft_always(patch: pytest.MonkeyPatch) -> None:
    """Draft whatever it costs."""
    patch.setattr(speculation, "MARGIN", 0.0)
    patch.setattr(Costs, "of", lambda self, tokens: 1.0)
    patch.setattr(Drafter, "_planned", lambda self, going, sizes: min(self._most, sizes[-1] - 1) if sizes else 0)
