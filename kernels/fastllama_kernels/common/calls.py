"""The calls of one decode step, in their order: what counts its kernels and what plans its launches read this list."""

from __future__ import annotations

from typing import NamedTuple


class Call(NamedTuple):
    """One call of an operation.

    Attributes:
        op: the operation.
        name: what it computes, for people.
        matrix: of :attr:`fastllama_kernels.common.shapes.Shape.matrices`; None where it reads none.
        has_norm: the input is normed before the product.
        has_residual: a residual is added after it.
        in_layer: every layer makes this call, not the step once.
    """

    op: str
    name: str
    matrix: str | None = None
    has_norm: bool = False
    has_residual: bool = False
    in_layer: bool = True


#: All of a step but the embedding before and the bookkeeping after, which Inductor makes.
STEP = (
    Call("linear", "norm, q/k/v", "qkv", has_norm=True),
    Call("rotary_attention", "rotary, KV write, attention"),
    Call("linear", "output, residual", "o", has_residual=True),
    Call("gate_up", "norm, gate/up, silu", "gate_up", has_norm=True),
    Call("linear", "down, residual", "down", has_residual=True),
    Call("linear", "norm, head", "head", has_norm=True, in_layer=False),
    Call("sample", "sample", in_layer=False),
)
