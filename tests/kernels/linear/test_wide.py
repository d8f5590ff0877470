"""Products of many rows on a GPU: torch's GEMM with Triton kernels around it, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear.op import gate_up_ref, gate_up_wide, linear_ref, linear_wide

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_on_cpu")]
SETTINGS = settings(deadline=None, max_examples=20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def draw(device, shape, n, dtype, bias, norm, residual) -> tuple:
    """Arguments of linear for ``[..., k]`` activations; the products are of unit size."""
    *leading, k = shape
    args = (
        torch.randn(shape),
        torch.randn(n, k) / k**0.5,
        torch.randn(n) if bias else None,
        torch.rand(k) if norm else None,
        torch.randn(*leading, n) if residual else None,
    )
    x, weight, bias_n, norm_k, added = (None if a is None else a.to(device, dtype) for a in args)
    return x, weight, bias_n, norm_k, EPS, added


def exactly(x, weight, bias, norm_weight, eps, residual) -> torch.Tensor:
    x, weight, bias, norm_weight, residual = (
        None if a is None else a.double() for a in (x, weight, bias, norm_weight, residual)
    )
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight
    y = x @ weight.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 40), (19, 33)])
@pytest.mark.parametrize(
    ("bias", "norm", "residual"), [(False, True, False), (True, True, False), (False, False, True), (True, False, True)]
)
def test_linear_is_as_exact_as_torch(device, assert_as_exact, dtype, shape, bias, norm, residual) -> None:
    args = draw(device, shape, 21, dtype, bias, norm, residual)
    assert_as_exact(linear_wide(*args), linear_ref(*args), exactly(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "activation"), [(False, "silu"), (True, "gelu_new")])
def test_gate_up_is_as_exact_as_torch(device, assert_as_exact, dtype, bias, activation) -> None:
    args = draw(device, (2, 20, 40), 46, dtype, bias, True, False)
    gate, up = exactly(*args).chunk(2, dim=-1)
    number, function = ACTIVATIONS[activation]
    assert_as_exact(gate_up_wide(*args[:5], number), gate_up_ref(*args[:5], number), function(gate) * up)


def test_arguments_are_left_as_they_are(device) -> None:
    args = draw(device, (3, 17, 40), 21, torch.float32, True, True, True)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    linear_wide(*args)
    for now, held in zip(args, before, strict=True):
        assert torch.equal(now, held) if isinstance(now, torch.Tensor) else now == held
