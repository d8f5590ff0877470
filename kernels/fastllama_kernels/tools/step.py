"""The launches of one decode step of a model, from its shape alone: what an audit compiles and a plan adds up.

The tensors are on the ``meta`` device: they have shapes and no memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastllama_kernels.attention import triton as decode_attention
from fastllama_kernels.common.launch import Launch
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.linear.op import ACTIVATIONS
from fastllama_kernels.sampling import triton as sample
from fastllama_kernels.sampling.op import SamplingParams

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, by their names in config.json."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    def sharded(self, devices: int) -> "Shape":
        """What each of ``devices`` devices holds under tensor parallelism."""
        return replace(
            self,
            intermediate_size=self.intermediate_size // devices,
            heads=self.heads // devices,
            kv_heads=self.kv_heads // devices,
            vocab_size=self.vocab_size // devices,
        )


SHAPES = {
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b/8": Shape(80, 8192, 28672, 64, 8, 128, 128256).sharded(8),
}


@dataclass(frozen=True)
class Part:
    """Some equal launches of a step.

    Attributes:
        name: what they compute.
        launch: one of them.
        times: how often it is in the step.
        nbytes: memory one of them has to move: weights, live keys and values, and what is small beside them.
    """

    name: str
    launch: Launch
    times: int
    nbytes: int


def parts(
    shape: Shape, chip: tuple[int, int], dtype: torch.dtype = torch.bfloat16, batch: int = 1, live: int = 512
) -> Iterator[Part]:
    """A decode step's launches in their order, but for embedding and bookkeeping, which Inductor makes.

    Args:
        shape: of the model.
        chip: compute capability.
        dtype: of weights and cache.
        batch: rows, at most gemv.MAX_ROWS.
        live: tokens of each row in the cache, the new one included.
    """

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def linear(name: str, times: int, n: int, k: int, norm: bool = False, residual: bool = False) -> Part:
        args = (tensor(batch, k), tensor(n, k), None, tensor(k) if norm else None, EPS)
        made, _ = gemv.launch(*args, tensor(batch, n) if residual else None, None, chip)
        return Part(name, made, times, made.reads + made.writes)

    m, f, d, layers = shape.hidden_size, shape.intermediate_size, shape.head_dim, shape.layers
    packed, inner = (shape.heads + 2 * shape.kv_heads) * d, shape.heads * d
    yield linear("norm, q/k/v", layers, packed, m, norm=True)
    cache = tensor(batch, shape.kv_heads, live, d)
    tables = (tensor(live, d, dtype=torch.float32), tensor(live, d, dtype=torch.float32))
    position = tensor(batch, 1, dtype=torch.int64)
    made, _ = decode_attention.launch(tensor(batch, 1, packed), position, cache, cache, tables=tables, chip=chip)
    yield Part("rotary, KV write, attention", made, layers, made.reads + made.writes + 2 * cache.nbytes)
    yield linear("output, residual", layers, m, inner, residual=True)
    silu = list(ACTIVATIONS).index("silu")
    made, _ = gemv.launch(tensor(batch, m), tensor(2 * f, m), None, tensor(m), EPS, None, silu, chip)
    yield Part("norm, gate/up, silu", made, layers, made.reads + made.writes)
    yield linear("down, residual", layers, m, f, residual=True)
    yield linear("norm, head", 1, shape.vocab_size, m, norm=True)
    counts, numbers = tensor(batch, dtype=torch.int64), tensor(batch, dtype=torch.float32)
    params = SamplingParams(numbers, counts, numbers, numbers, counts)
    for made in sample.launches(tensor(batch, shape.vocab_size), params, counts, chip)[0]:
        yield Part(f"draw: {made.name}", made, 1, made.reads + made.writes)
