"""RMSNorm in Triton against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.linear.op import rms_norm_ref
from fastllama_kernels.linear.rms_norm import MAX_FEATURES, rms_norm

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


def test_schema_and_fake_are_right(triton_on_cpu) -> None:
    torch.library.opcheck(torch.ops.fastllama.rms_norm.default, (torch.randn(3, 8), torch.ones(8), EPS))
