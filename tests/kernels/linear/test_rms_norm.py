"""RMSNorm in Triton against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.linear.op import rms_norm_ref
from fastllama_kernels.linear.rms_norm import MAX_FEATURES, add_rms_norm, add_rms_norm_ref, rms_norm

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def norm_in_float64(x, weight) -> torch.Tensor:
    return x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()


@SETTINGS
@given(
    shape=st.sampled_from([(5, 123, 123), (1, 1), (3, 64), (2, 1100), (7, 5)]), dtype=st.sampled_from(DTYPES)
)  # fmt: skip
def test_the_norm_is_as_exact_as_torch(device, assert_as_exact, shape, dtype) -> None:
    x, weight = torch.randn(shape, device=device).to(dtype), torch.rand(shape[-1], device=device).to(dtype)
    assert_as_exact(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), norm_in_float64(x, weight))


@SETTINGS
@given(shape=st.sampled_from([(5, 23, 123), (1, 1), (3, 64), (2, 1100)]), dtype=st.sampled_from(DTYPES))
def test_the_norm_of_a_sum_is_as_exact_as_torch(device, assert_as_exact, shape, dtype) -> None:
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.rand(shape[-1], device=device).to(dtype)
    found, total = add_rms_norm(x.contiguous(), residual.clone(), weight, EPS)
    assert torch.equal(total, x + residual)
    reference, _ = add_rms_norm_ref(x, residual, weight, EPS)
    assert_as_exact(found, reference, norm_in_float64(x + residual, weight))


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        (torch.randn(8, 4).T, torch.ones(8), "x has strides"),
        (torch.randn(4, 8), torch.ones(7), "weight has shape"),
        (torch.randn(4, 8), torch.ones(8).half(), "weight is torch.float16"),
        (torch.randint(9, (4, 8)), torch.ones(8), "x is torch.int64"),
        (torch.randn(1, MAX_FEATURES + 1), torch.ones(MAX_FEATURES + 1), "features"),
    ],
    ids=["strides", "shape", "dtype", "integers", "too long"],
)
def test_bad_input_is_refused(x, weight, said) -> None:
    with pytest.raises(ValueError, match=said):
        rms_norm(x, weight, EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 8), torch.randn(1, 8), torch.ones(8), EPS)


def test_schemas_and_fakes_are_right() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    torch.library.opcheck(torch.ops.fastllama.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.fastllama.add_rms_norm.default, (x, x.clone(), weight, EPS))
