"""The sizes of published models."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, by their names in config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def packed(self) -> int:
        """Features of one token's query, key and value heads together."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each matrix of a step."""
        m, f = self.hidden_size, self.intermediate_size
        return {
            "qkv": (self.packed, m),
            "o": (m, self.num_attention_heads * self.head_dim),
            "gate_up": (2 * f, m),
            "down": (m, f),
            "head": (self.vocab_size, m),
        }

    def sharded(self, devices: int) -> Shape:
        """What each of ``devices`` devices holds under tensor parallelism."""
        return replace(
            self,
            intermediate_size=self.intermediate_size // devices,
            num_attention_heads=self.num_attention_heads // devices,
            num_key_value_heads=self.num_key_value_heads // devices,
            vocab_size=self.vocab_size // devices,
        )


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
