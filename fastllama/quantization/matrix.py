"""``Matrix``: the weight of a linear map as the engine multiplies with it, whatever it is stored in.

Shape suffixes: leading dimensions ``...``, ``k`` input features, ``n`` output features, ``f`` FFN dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from fastllama import ops
from fastllama.quantization.linear import Packed


class Matrix(nn.Module):
    """A dense matrix ``[n, k]``, with a bias ``[n]`` or without, over memory that it shares.

    A module, so that torch.compile sees its tensors as parameters, whose addresses never change.

    Args:
        weight: ``[n, k]``, the very parameter that is held: a tied head stays the same as its embedding.
        bias: ``[n]``, or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @staticmethod
    def of(module: nn.Module) -> Matrix:
        """The matrix of a linear map or of an embedding, over the same memory."""
        bias = getattr(module, "bias", None)
        bias = None if bias is None else shared(bias)
        if isinstance(module, Packed):
            return PackedMatrix([None if each is None else shared(each) for each in module.tensors], module, bias)
        return Matrix(shared(cast(nn.Linear, module).weight), bias)

    @staticmethod
    def joined(linears: Sequence[nn.Module]) -> Matrix:
        """The linears' rows one below the other, in memory of which their parameters become views.

        The memory is new unless they lie one behind the other already.

        Raises:
            ValueError: some have a bias and some have none, or they are stored in different ways.
        """
        biases = [cast(torch.Tensor, linear.bias) for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError(f"{len(biases)} of {len(linears)} linears have a bias, expected all or none of them")
        bias = _joined(biases) if biases else None
        packed = [linear for linear in linears if isinstance(linear, Packed)]
        if not packed:
            return Matrix(_joined([cast(nn.Linear, linear).weight for linear in linears]), bias)
        if len(packed) < len(linears) or len({each.scheme for each in packed}) > 1:
            raise ValueError("linears that are multiplied together are quantized in different ways, or some are not")
        parts = zip(*(each.tensors for each in packed), strict=True)
        joined = [None if part[0] is None else _joined(cast(Sequence[torch.Tensor], part)) for part in parts]
        return PackedMatrix(joined, packed[0], bias)

    @property
    def kind(self) -> int:
        """What it is stored as, a number that the kernels know."""
        return ops.DENSE if self.bias is None else ops.DENSE_BIAS

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a product reads, in the order that the kernels take it."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def forward(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``norm(x) @ weightᵀ + bias + residual``.

        Args:
            x: ``[..., k]``.
            norm_weight: ``[k]`` of the RMS norm before the product; None for no norm.
            eps: of the norm.
            residual: ``[..., n]``, or None.

        Returns:
            ``[..., n]`` in x's dtype.
        """
        return ops.linear(x, self.weight, self.bias, norm_weight, eps, residual)

    def gated(self, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, activation: str) -> torch.Tensor:
        """``act(gate) · up`` of ``norm(x)``, ``[..., f]``, where the first half of the rows is gate, the second up.

        Args:
            x: ``[..., k]``.
            norm_weight: ``[k]`` of the RMS norm before the product.
            eps: of the norm.
            activation: the config's ``hidden_act``.
        """
        return ops.gate_up(x, self.weight, self.bias, norm_weight, eps, activation)

    def embed(self, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows ``[..., k]`` of the matrix, which is an embedding's table.

        Args:
            ids: int64 ``[...]``.
            like: ``[k]``, in the dtype that the rows come in.
        """
        return F.embedding(ids, self.weight)

    def rows(self, first: int, last: int) -> Matrix:
        """Rows ``first`` to ``last - 1``, over the same memory."""
        bias = None if self.bias is None else shared(self.bias[first:last])
        return Matrix(shared(self.weight[first:last]), bias)


class PackedMatrix(Matrix):
    """A matrix of codes with scales, over memory that it shares; see :mod:`fastllama_kernels.linear.packed`.

    Args:
        tensors: codes uint8 ``[p, l, 64]``, scales ``[p, g, 16]``, and offsets likewise or None.
        like: a module with these tensors or a part of them.
        bias: ``[n]``, or None.
    """

    def __init__(self, tensors: Sequence[nn.Parameter | None], like: Packed, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.codes, self.scales = (cast(nn.Parameter, tensor) for tensor in tensors[:2])
        self.offsets = tensors[2]
        self.bias = bias
        self._like = [like]  # in a list, so that it is not a part of this module
        panels = len(self.codes)
        self.n = like.shape[0] if panels == len(like.codes) else panels * ops.PANEL

    @property
    def codes_inputs(self) -> bool:
        """Whether products take activations in 8 bits, on a CPU; not where it writes the matrix out for many rows."""
        return self._like[0].activations is not None

    @property
    def kind(self) -> int:
        """What it is stored as, a number that the kernels know."""
        return ops.packed_kind(self.bias is not None, self.offsets is not None, self.codes_inputs)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a product reads, in the order that the kernels take it."""
        return tuple(each for each in (self.codes, self.scales, self.offsets, self.bias) if each is not None)

    def forward(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`Matrix.forward`, with the weights that the codes stand for."""
        args = (self.bias, norm_weight, eps, residual, self.codes_inputs)
        y = ops.linear_packed(x, self.codes, self.scales, self.offsets, *args)
        return y if y.shape[-1] == self.n else y[..., : self.n].contiguous()

    def gated(self, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, activation: str) -> torch.Tensor:
        """As :meth:`Matrix.gated`."""
        args = (self.codes, self.scales, self.offsets, self.bias, norm_weight, eps)
        return ops.gate_up_packed(x, *args, activation, self.codes_inputs)

    def embed(self, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """As :meth:`Matrix.embed`."""
        return ops.embed_packed(like, ids, self.codes, self.scales, self.offsets)

    def rows(self, first: int, last: int) -> PackedMatrix:
        """Rows ``first`` to ``last - 1``, multiples of 16, over the same memory."""
        if first % ops.PANEL or last % ops.PANEL:
            raise ValueError(f"rows {first} to {last} are no whole panels of {ops.PANEL}")
        panels = slice(first // ops.PANEL, last // ops.PANEL)
        bias = None if self.bias is None else shared(self.bias[first:last])
        tensors = [None if each is None else shared(each[panels]) for each in (self.codes, self.scales, self.offsets)]
        part = PackedMatrix(tensors, self._like[0], bias)
        part.n = last - first
        return part


def shared(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter over the same memory that wants no gradient, whatever the original wants."""
    return nn.Parameter(tensor.data, requires_grad=False)


def _joined(parameters: Sequence[torch.Tensor]) -> nn.Parameter:
    joined = _as_one(parameters)
    if joined is None:
        joined = torch.cat([parameter.data for parameter in parameters])
        sizes = [parameter.shape[0] for parameter in parameters]
        for parameter, view in zip(parameters, joined.split(sizes), strict=True):
            parameter.data = view
    return nn.Parameter(joined, requires_grad=False)


def _as_one(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that these are parts of, where each begins behind the one before it in the same memory."""
    first, rows = parameters[0].data, 0
    for parameter in parameters:
        is_next = parameter.data_ptr() == first.data_ptr() + rows * first.stride(0) * first.itemsize
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and same and parameter.is_contiguous()):
            return None
        rows += parameter.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
