"""What a checkpoint says: ``LlamaConfig`` with its ``RopeParameters``, and ``GenerationConfig``."""

from fastllama.config.generation import GenerationConfig
from fastllama.config.llama import LlamaConfig
from fastllama.config.rope import RopeParameters

__all__ = ["GenerationConfig", "LlamaConfig", "RopeParameters"]
