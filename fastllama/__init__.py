"""A decoding engine for Llama checkpoints: ``torch.compile``, a static KV cache, and Hugging Face's API."""

from fastllama.causal_lm import LlamaForCausalLM
from fastllama.config import GenerationConfig, LlamaConfig, QuantizationConfig
from fastllama.loading.stored import CheckpointError
from fastllama.model.cache import CacheOverflowError, StaticCache
from fastllama.tokenizer import load_tokenizer

__version__ = "0.1.0"

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
