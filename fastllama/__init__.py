"""A decoding engine for Llama checkpoints: ``torch.compile``, a static KV cache, and Hugging Face's API."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastllama.version import __version__ as __version__

if TYPE_CHECKING:  # imported when first asked for: torch takes seconds, and --help needs none of it
    from fastllama.causal_lm import LlamaForCausalLM
    from fastllama.config import GenerationConfig, LlamaConfig, QuantizationConfig
    from fastllama.loading.stored import CheckpointError
    from fastllama.model.cache import CacheOverflowError, StaticCache
    from fastllama.tokenizer import load_tokenizer

__all__ = [
    "CacheOverflowError",
    "CheckpointError",
    "GenerationConfig",
    "LlamaConfig",
    "LlamaForCausalLM",
    "QuantizationConfig",
    "StaticCache",
    "load_tokenizer",
]

_HOMES = {
    "CacheOverflowError": "model.cache",
    "CheckpointError": "loading.stored",
    "GenerationConfig": "config",
    "LlamaConfig": "config",
    "LlamaForCausalLM": "causal_lm",
    "QuantizationConfig": "config",
    "StaticCache": "model.cache",
    "load_tokenizer": "tokenizer",
}
_MODULES = ("causal_lm", "config", "engine", "generation", "loading", "model", "ops", "quantization", "tokenizer")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
