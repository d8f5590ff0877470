"""What a checkpoint says: ``LlamaConfig`` with its ``RopeParameters``, and ``GenerationConfig``."""

from fastllama.config.generation import GenerationConfig
from fastllama.config.llama import LlamaConfig, RopeParameters

__all__ = ["GenerationConfig", "LlamaConfig", "RopeParameters"]
