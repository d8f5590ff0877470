"""The Triton GEMV of packed matrices against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear import packed_triton
from fastllama_kernels.linear.op import gate_up_ref, linear_ref
from fastllama_kernels.linear.packed import (
    PANEL,
    by_panel,
    dequantized,
    gate_up_packed_wide,
    linear_packed_wide,
    packed,
)
from tests.kernels.linear.test_triton import DTYPES, in_float64

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each
GROUPS = {32: [32], 96: [32, 96], 512: [32, 128, 512], 1056: [32, 1056]}  # by columns


def draw(device, rows, k, panels, bits, group, dtype, offsets, bias, norm, residual) -> tuple:
    """Arguments of the kernel, without the last."""
    n = panels * PANEL
    codes = packed(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    scales = by_panel((torch.rand(n, k // group) + 0.5).half() / (2**bits * k**0.5))
    args = (
        torch.randn(rows, k).to(dtype),
        codes,
        scales,
        by_panel((-torch.rand(n, k // group) / k**0.5).half()) if offsets else None,
        torch.randn(n).to(dtype) if bias else None,
        torch.rand(k).to(dtype) if norm else None,
        1e-5,
        torch.randn(rows, n).to(dtype) if residual else None,
    )
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def written_out(args: tuple) -> tuple[tuple, tuple]:
    """The same with a dense matrix: in x's dtype, and as the kernel multiplies with it.

    One row is multiplied in float32, several on tensor cores, whose operands are of x's dtype.
    """
    x, codes, scales, offsets, *rest = args
    dense = dequantized(codes, scales, offsets, x.shape[1], x.dtype)
    exact = dequantized(codes, scales, offsets, x.shape[1], torch.float64) if x.shape[0] == 1 else dense
    return (x, dense, *rest), (x, exact, *rest)


def sizes(draw_from) -> tuple[int, int]:
    k = draw_from(st.sampled_from(list(GROUPS)))
    return k, draw_from(st.sampled_from(GROUPS[k]))


@SETTINGS
@given(
    size=st.composite(sizes)(), rows=st.integers(1, packed_triton.MAX_ROWS), panels=st.integers(1, 3),
    bits=st.sampled_from([4, 8]), dtype=st.sampled_from(DTYPES), offsets=st.booleans(), bias=st.booleans(),
    norm=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_linear_is_as_exact_as_torch(
    device, assert_as_exact, size, rows, panels, bits, dtype, offsets, bias, norm, residual
) -> None:
    args = draw(device, rows, size[0], panels, bits, size[1], dtype, offsets, bias, norm, residual)
    plain, exact = written_out(args)
    assert_as_exact(packed_triton.linear_packed(*args, True), linear_ref(*plain), in_float64(*exact))


@SETTINGS
@given(
    size=st.composite(sizes)(), rows=st.sampled_from([1, 2, 5, 16]), bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES), offsets=st.booleans(), bias=st.booleans(), norm=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)  # fmt: skip
def test_gate_up_is_as_exact_as_torch(
    device, assert_as_exact, size, rows, bits, dtype, offsets, bias, norm, activation
) -> None:
    args = draw(device, rows, size[0], 4, bits, size[1], dtype, offsets, bias, norm, False)
    plain, exact = written_out(args)
    number, function = ACTIVATIONS[activation]
    gate, up = in_float64(*exact).chunk(2, dim=-1)
    got = packed_triton.gate_up_packed(*args[:-1], number, True)
    assert_as_exact(got, gate_up_ref(*plain[:-1], number), function(gate) * up)


@pytest.mark.parametrize("rows", [1, 2])
def test_nans_are_not_swallowed(device, rows) -> None:
    x, *rest = draw(device, rows, 512, 1, 4, 32, torch.float32, True, False, False, False)
    x[0, 300] = float("nan")
    y = packed_triton.linear_packed(x, *rest, True)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({0: torch.randn(17, 64)}, "17 rows, the kernel takes 1 to 16"),
        ({0: torch.randn(2, 64).double()}, "x is torch.float64"),
        ({1: torch.zeros(2, 8, 64)}, "codes is torch.float32, expected torch.uint8"),
        ({1: torch.zeros(2, 9, 64, dtype=torch.uint8)}, "codes have 9 lines, expected 8 or 16 for 64 columns"),
        ({2: torch.zeros(2, 3, 16).half()}, "scales have 3 groups, expected a divisor of 2"),
        ({2: torch.zeros(2, 2, 16)}, "scales is torch.float32, expected torch.float16"),
        ({3: torch.zeros(2, 1, 16).half()}, "offsets has shape"),
        ({4: torch.randn(31)}, "bias has shape"),
        ({5: torch.randn(31)}, "norm_weight has shape"),
        ({7: torch.randn(1, 32)}, "residual has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_before_anything_runs(bad, said) -> None:
    args = list(draw("cpu", 2, 64, 2, 4, 32, torch.float32, True, True, True, True))
    for at, value in bad.items():
        args[at] = value
    with pytest.raises(ValueError, match=said):
        packed_triton.linear_packed(*args, True)


def test_a_gate_without_its_up_is_refused() -> None:
    args = draw("cpu", 1, 64, 3, 4, 32, torch.float32, True, False, False, False)
    with pytest.raises(ValueError, match="3 panels, expected an even number"):
        packed_triton.gate_up_packed(*args[:-1], 0, True)


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_as_exact_as_torch(device, assert_as_exact, dtype, bits) -> None:
    args = draw(device, 19, 96, 2, bits, 32, dtype, True, True, True, True)
    plain, exact = written_out(args)
    got = linear_packed_wide(*args, True)
    assert_as_exact(got, linear_ref(*plain), in_float64(*exact))
    args = draw(device, 19, 96, 2, bits, 32, dtype, False, False, True, False)
    plain, exact = written_out(args)
    gate, up = in_float64(*exact).chunk(2, dim=-1)
    number, function = ACTIVATIONS["silu"]
    got = gate_up_packed_wide(*args[:-1], number, True)
    assert_as_exact(got, gate_up_ref(*plain[:-1], number), function(gate) * up)
