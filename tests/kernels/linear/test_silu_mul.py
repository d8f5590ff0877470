"""The gated activation in Triton against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear.op import silu_mul_ref
from fastllama_kernels.linear.silu_mul import silu_mul

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each


@SETTINGS
@given(
    shape=st.sampled_from([(5, 23, 246), (1, 2), (3, 64), (2, 2200)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_it_is_as_exact_as_torch(device, assert_as_exact, shape, dtype, activation) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    number, function = ACTIVATIONS[activation]
    assert_as_exact(silu_mul(x, number), silu_mul_ref(x, number), function(gate) * up)


@pytest.mark.parametrize(
    ("x", "activation", "said"),
    [
        (torch.randn(8, 4).T, 0, "strides"),
        (torch.randn(4, 7), 0, "even number"),
        (torch.randn(4, 8), 99, "activation is number 99"),
    ],
    ids=["strides", "odd", "activation"],
)
def test_bad_input_is_refused(x, activation, said) -> None:
    with pytest.raises(ValueError, match=said):
        silu_mul(x, activation)


def test_schema_and_fake_are_right(triton_on_cpu) -> None:
    torch.library.opcheck(torch.ops.fastllama.silu_mul.default, (torch.randn(3, 8), 0))
