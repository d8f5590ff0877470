"""``Matrix``: the weight of a linear map as the engine multiplies with it, whatever it is stored in.

Shape suffixes: leading dimensions ``...``, ``k`` input features, ``n`` output features, ``f`` FFN dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastllama import ops


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

    @classmethod
    def of(cls, linear: nn.Linear) -> Matrix:
        """A linear's matrix, over the same memory."""
        return cls(shared(linear.weight), None if linear.bias is None else shared(linear.bias))

    @classmethod
    def joined(cls, linears: Sequence[nn.Linear]) -> Matrix:
        """The linears' rows one below the other, in new memory of which their parameters become views.

        Raises:
            ValueError: some have a bias and some have none.
        """
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError(f"{len(biases)} of {len(linears)} linears have a bias, expected all or none of them")
        return cls(_joined([linear.weight for linear in linears]), _joined(biases) if biases else None)

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

    def rows(self, first: int, last: int) -> Matrix:
        """Rows ``first`` to ``last - 1``, over the same memory."""
        bias = None if self.bias is None else shared(self.bias[first:last])
        return Matrix(shared(self.weight[first:last]), bias)


def shared(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter over the same memory that wants no gradient, whatever the original wants."""
    return nn.Parameter(tensor.data, requires_grad=False)


def _joined(parameters: Sequence[torch.Tensor]) -> nn.Parameter:
    joined = torch.cat([parameter.data for parameter in parameters])
    sizes = [parameter.shape[0] for parameter in parameters]
    for parameter, view in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = view
    return nn.Parameter(joined, requires_grad=False)
