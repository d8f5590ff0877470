"""What a checkpoint says: ``LlamaConfig`` and what is in it, and ``GenerationConfig``."""

from fastllama.config.generation import GenerationConfig
from fastllama.config.llama import LlamaConfig
from fastllama.config.quantization import QuantizationConfig
from fastllama.config.rope import RopeParameters

__all__ = ["GenerationConfig", "LlamaConfig", "QuantizationConfig", "RopeParameters"]
