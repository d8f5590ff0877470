"""The Triton GEMV against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.linear.op import gate_up_ref, linear_ref

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(device, rows, k, n, dtype, bias, norm, residual) -> tuple:
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    args = (
        x,
        weight,
        torch.randn(n).to(dtype) if bias else None,
        torch.rand(k).to(dtype) if norm else None,
        1e-5,
        torch.randn(rows, n).to(dtype) if residual else None,
    )
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def in_float64(x, weight, bias, norm_weight, eps, residual) -> torch.Tensor:
    """The formula, with the one rounding that the kernel has in it.

    Several rows are multiplied on tensor cores, whose operands are of the weights' dtype: x times the norm's weight is
    rounded to it, before the norm's scale in bfloat16, after it in float16, which it could overflow.
    """
    dtype, rows = x.dtype, x.shape[:-1].numel()
    x, weight, bias, norm_weight, residual = (
        None if a is None else a.double() for a in (x, weight, bias, norm_weight, residual)
    )
    if norm_weight is not None:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        if rows == 1:
            x = x * scale * norm_weight
        elif dtype == torch.float16:
            x = (x * scale * norm_weight).to(dtype).double()
        else:
            x = (x * norm_weight).to(dtype).double() * scale
    y = x @ weight.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


@SETTINGS
@given(
    rows=st.integers(1, gemv.MAX_ROWS), k=st.sampled_from([1, 5, 16, 32, 123, 700, 1100]),
    n=st.sampled_from([1, 3, 16, 37, 123]), dtype=st.sampled_from(DTYPES),
    bias=st.booleans(), norm=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_linear_is_as_exact_as_torch(device, assert_as_exact, rows, k, n, dtype, bias, norm, residual) -> None:
    args = draw(device, rows, k, n, dtype, bias, norm, residual)
    assert_as_exact(gemv.linear(*args), linear_ref(*args), in_float64(*args))


@SETTINGS
@given(
    rows=st.sampled_from([1, 2, 5, 16]), k=st.sampled_from([5, 32, 123, 600]), f=st.sampled_from([1, 3, 64, 123]),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), norm=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)  # fmt: skip
def test_gate_up_is_as_exact_as_torch(device, assert_as_exact, rows, k, f, dtype, bias, norm, activation) -> None:
    args = draw(device, rows, k, 2 * f, dtype, bias, norm, False)[:5]
    gate, up = in_float64(*args, None).chunk(2, dim=-1)
    number, function = ACTIVATIONS[activation]
    assert_as_exact(gemv.gate_up(*args, number), gate_up_ref(*args, number), function(gate) * up)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_float16_row_of_large_numbers_does_not_overflow_before_it_is_normed(device, assert_as_exact, rows) -> None:
    x, weight, _, norm, eps, _ = draw(device, rows, 64, 16, torch.float16, False, True, False)
    args = (x.sign() * 3e4, weight, None, norm * 8, eps, None)
    assert_as_exact(gemv.linear(*args), linear_ref(*args), in_float64(*args))


def test_leading_dimensions_are_kept(device) -> None:
    x = torch.randn(2, 3, 8, device=device)
    assert gemv.linear(x, torch.randn(5, 8, device=device)).shape == (2, 3, 5)
    assert gemv.gate_up(x, torch.randn(10, 8, device=device)).shape == (2, 3, 5)


@pytest.mark.parametrize("op", [gemv.linear, gemv.gate_up])
@pytest.mark.parametrize("rows", [1, 2])
def test_nans_are_not_swallowed(device, op, rows) -> None:
    x = torch.ones(rows, 64, device=device)
    x[0, 40] = float("nan")
    y = op(x, torch.ones(4, 64, device=device))
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"x": torch.randn(8, 2).T}, "x has strides"),
        ({"x": torch.randn(33)[1:].view(4, 8)}, "multiple of 16 bytes"),
        ({"x": torch.randn(17, 8)}, "17 rows, the kernel takes 1 to 16"),
        ({"x": torch.empty(0, 8)}, "no empty one"),
        ({"weight": torch.randn(8, 4).T}, "weight has strides"),
        ({"weight": torch.randn(4, 7)}, r"weight has shape \(4, 7\), expected \(any, 8\)"),
        ({"weight": torch.randn(4, 8).bfloat16()}, "weight is torch.bfloat16, expected torch.float32"),
        ({"weight": torch.randn(4, 8, device="meta")}, "weight is on meta"),
        ({"x": torch.randn(2, 8).double()}, "x is torch.float64, expected float32, bfloat16 or float16"),
        ({"bias": torch.randn(5)}, "bias"),
        ({"norm_weight": torch.randn(7)}, "norm_weight"),
        ({"residual": torch.randn(1, 4)}, "residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_before_anything_runs(bad, said) -> None:
    with pytest.raises(ValueError, match=said):
        gemv.linear(**({"x": torch.randn(2, 8), "weight": torch.randn(4, 8)} | bad))


def test_a_gate_without_its_up_and_an_unknown_activation_are_refused() -> None:
    with pytest.raises(ValueError, match="even number"):
        gemv.gate_up(torch.randn(1, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match="activation is number 99"):
        gemv.gate_up(torch.randn(1, 8), torch.randn(4, 8), activation=99)
