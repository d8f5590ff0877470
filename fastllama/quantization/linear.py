"""The modules of a quantized network: a linear map and an embedding whose weights are codes with scales.

They compute what the engine does, which takes their tensors (:mod:`fastllama.quantization.matrix`). Layout:
:mod:`fastllama_kernels.linear.packed`.

Shape suffixes: ``n`` rows, ``k`` columns, ``p`` panels of 16 rows, ``l`` lines of 64 bytes, ``g`` groups of columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.config.quantization import QuantizationConfig

logger = logging.getLogger(__name__)


class Packed(nn.Module):
    """A matrix of codes, with scales and perhaps offsets in float16.

    Args:
        shape: rows and columns.
        bits: of a code.
        group: columns that share a scale.
        has_offsets: codes stand for scale · code + offset; else for scale · (code - 2^(bits - 1)).
        activations: ``"int8"``: on a CPU products take activations in 8 bits; None: as they are.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, group: int, has_offsets: bool, activations: str | None = "int8"
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.group, self.activations = shape, bits, group, activations
        columns, panels = shape[1], -(-shape[0] // ops.PANEL)
        codes = torch.empty(panels, columns * bits // 32, ops.LINE, dtype=torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(panels, columns // group, ops.PANEL, dtype=torch.float16))
        self.register_buffer("offsets", torch.empty_like(self.scales) if has_offsets else None)

    def fill(self, blocks: Iterator[torch.Tensor]) -> bool:
        """Quantize rows as they come, ``[some rows, k]``, all of them in the end; return whether they are numbers."""
        first, clean = 0, True
        for block in _whole_panels(blocks):
            clean = clean and bool(block.isfinite().all())
            codes, scales, offsets = ops.quantize(block.contiguous(), self.bits, self.group, self.offsets is not None)
            panels = slice(first, first + len(codes))
            self.codes[panels], self.scales[panels] = codes, scales
            if self.offsets is not None:
                self.offsets[panels] = offsets
            first += len(codes)
        assert first == len(self.codes), f"filled {first} of {len(self.codes)} panels"
        return clean

    def take(self, code_nk: torch.Tensor, scale_ng: torch.Tensor, offset_ng: torch.Tensor, bits: int) -> bool:
        """Take codes of no more bits than its own, as they are; return whether scales and offsets are numbers.

        Args:
            code_nk: uint8, unsigned.
            scale_ng: float32.
            offset_ng: float32; without offsets of its own, codes lie around 2^(bits - 1) instead.
            bits: of a code.
        """
        values = [scale_ng, *([] if self.offsets is None else [offset_ng])]
        if self.offsets is None and bits < self.bits:
            code_nk = code_nk + (2 ** (self.bits - 1) - 2 ** (bits - 1))
        missing = -len(code_nk) % ops.PANEL
        self.codes.copy_(ops.packed(F.pad(code_nk, (0, 0, 0, missing)), self.bits))
        for target, value in zip((self.scales, self.offsets), values, strict=False):
            cast(torch.Tensor, target).copy_(ops.by_panel(F.pad(value, (0, 0, 0, missing)).half()))
        return all(bool(value.half().isfinite().all()) for value in values)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights ``[n, k]`` that the codes stand for."""
        return ops.dequantized(*self.tensors, self.shape[1], dtype)[: self.shape[0]]

    @property
    def weight(self) -> torch.Tensor:
        """The weights ``[n, k]`` that the codes stand for, in float32: a copy."""
        return self.dequantized(torch.float32)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales, offsets."""
        return self.codes, self.scales, self.offsets

    @property
    def scheme(self) -> tuple[int, int, bool, str | None]:
        """Bits, group, offsets or none, and activations: what matrices that are joined have in common."""
        return self.bits, self.group, self.offsets is not None, self.activations

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Packed:
        before = {"scales": self.scales, "offsets": self.offsets}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(
                    self, name, tensor.to(self.codes.device)
                )  # they belong to the codes, whatever the model's dtype
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.shape[1]} → {self.shape[0]}, {self.bits} bits in groups of {self.group}"


class QuantizedLinear(Packed):
    """A linear map with a quantized weight ``[out_features, in_features]``, and a bias or none."""

    def __init__(
        self, linear: nn.Linear, bits: int, group: int, has_offsets: bool, activations: str | None = "int8"
    ) -> None:
        super().__init__((linear.out_features, linear.in_features), bits, group, has_offsets, activations)
        self.out_features, self.in_features, self.bias = linear.out_features, linear.in_features, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weightᵀ + bias`` of x ``[..., in_features]``; of one that wants a gradient as it is, not in 8 bits."""
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        args = (*self.tensors, None, None, 0.0, None, self.activations is not None)
        y = ops.linear_packed(x.contiguous(), *args)[..., : self.out_features]
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Packed):
    """An embedding with a quantized table ``[num_embeddings, embedding_dim]``; vectors are in ``dtype``."""

    def __init__(
        self,
        table: nn.Embedding,
        bits: int,
        group: int,
        has_offsets: bool,
        activations: str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__((table.num_embeddings, table.embedding_dim), bits, group, has_offsets, activations)
        self.num_embeddings, self.embedding_dim, self.dtype = table.num_embeddings, table.embedding_dim, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``[..., embedding_dim]`` of int64 ids ``[...]``."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise IndexError("index out of range")
        like = torch.empty(self.embedding_dim, dtype=self.dtype, device=self.codes.device)
        return ops.embed_packed(like, ids.contiguous(), *self.tensors)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


#: Modules whose rows are multiplied in one product, as names end.
TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def multiplied_together(names: Iterable[str]) -> Iterator[list[str]]:
    """The names of those that are multiplied together: of q, k and v, of gate and up."""
    for name in names:
        for group in TOGETHER:
            if name.endswith(f".{group[0]}"):
                yield [name.removesuffix(group[0]) + end for end in group]


def together(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The tensors that become one when the engine joins the modules that are multiplied together."""
    modules = dict(model.named_modules())
    for names in multiplied_together(modules):
        parts = [dict(modules[name].named_parameters()) | dict(modules[name].named_buffers()) for name in names]
        for key, first in parts[0].items():
            tensors = [part[key] for part in parts if key in part]
            alike = all((each.dtype, each.shape[1:]) == (first.dtype, first.shape[1:]) for each in tensors)
            if len(tensors) == len(parts) and alike:
                yield tensors


def quantize_modules(model: nn.Module, config: LlamaConfig, quantization: QuantizationConfig) -> None:
    """Put quantized modules, without content, in the place of the linear maps and the embedding of a network.

    Matrices of layers stay as they are where they do not consist of whole panels of 16 rows. Modules that are
    multiplied together (q, k and v; gate and up) or tied are quantized together, or not at all.

    Args:
        model: a :class:`fastllama.model.llama.Llama`, usually on the meta device.
        config: of the network.
        quantization: which, and how.

    Raises:
        ValueError: a group that does not divide the columns.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name in quantization.exclude:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            logger.warning("there is no module %r to exclude from quantization", name)
    schemes = {name: quantization.scheme_of(name, module.weight.shape[1]) for name, module in modules.items()}
    kept = {n for n, m in modules.items() if schemes[n] and ".layers." in n and m.weight.shape[0] % ops.PANEL}
    tied = [["model.embed_tokens", "lm_head"]] if config.tie_word_embeddings else []
    for names in [*tied, *multiplied_together(modules)]:
        if any(schemes[name] is None for name in names) or kept.intersection(names):
            kept.update(name for name in names if schemes[name])
    for name, module in modules.items():
        scheme = schemes[name]
        if scheme is None or name in kept:
            continue
        owner, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Embedding):
            quantized: Packed = QuantizedEmbedding(module, *scheme, quantization.activations, config.torch_dtype)
        else:
            quantized = QuantizedLinear(module, *scheme, quantization.activations)
        setattr(model.get_submodule(owner), attribute, quantized)
    tie: Any = model
    tie.tie_weights()


def left_dense(model: nn.Module, quantization: QuantizationConfig) -> list[str]:
    """Names of the modules that are not quantized though the config does not exclude them by name."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    return [name for name, module in modules.items() if quantization.scheme_of(name, module.weight.shape[1])]


def is_tied(model: Any) -> bool:
    """Whether the head of a network and its embedding are one matrix."""
    head, table = model.lm_head, model.model.embed_tokens
    if isinstance(head, Packed) and isinstance(table, Packed):
        return head.codes is table.codes
    return not isinstance(head, Packed) and not isinstance(table, Packed) and head.weight is table.weight


def _whole_panels(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows in blocks of whole panels; the last is filled up with zeros."""
    rest: torch.Tensor | None = None
    for block in blocks:
        joined = block if rest is None else torch.cat([rest, block])
        whole = len(joined) - len(joined) % ops.PANEL
        if whole:
            yield joined[:whole]
        rest = joined[whole:].clone() if whole < len(joined) else None
    if rest is not None:
        yield F.pad(rest, (0, 0, 0, -len(rest) % ops.PANEL))


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """While open, quantized modules take activations as they are, and embeddings give float32."""
    modules = packed_modules(model).values()
    before = [(module, module.activations) for module in modules]
    tables = [(module, module.dtype) for module in modules if isinstance(module, QuantizedEmbedding)]
    try:
        for module, _ in before:
            module.activations = None
        for table, _ in tables:
            table.dtype = torch.float32
        yield
    finally:
        for module, activations in before:
            module.activations = activations
        for table, dtype in tables:
            table.dtype = dtype


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """The quantized modules of a model, by name; one that is there twice under its first."""
    return {name: cast(Packed, module) for name, module in model.named_modules() if isinstance(module, Packed)}
