"""linear and gate_up: the CPU kernels against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.common import build
from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear import op
from fastllama_kernels.linear.op import gate_up_ref, linear_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**31)
LEAST_OUTPUTS = 2048
linear, gate_up = torch.ops.fastllama.linear, torch.ops.fastllama.gate_up


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


def draw(rows, k, n, dtype, bias, norm, residual) -> tuple:
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return (
        x,
        weight,
        torch.randn(n).to(dtype) if bias else None,
        torch.rand(k).to(dtype) if norm else None,
        1e-5,
        torch.randn(rows, n).to(dtype) if residual else None,
    )


def compare(assert_as_exact, outputs: int, one: Callable[[], tuple]) -> None:
    """Take enough outputs: torch may by chance have rounded a few to the right side, and twice its error is nothing."""
    draws = [one() for _ in range(-(-LEAST_OUTPUTS // outputs))]
    assert_as_exact(*map(torch.cat, zip(*draws, strict=True)))


def exact(args: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in args)


def norm_in_float64(x, weight, eps) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear_in_float64(x, weight, bias, norm_weight, eps, residual) -> torch.Tensor:
    x = x if norm_weight is None else norm_in_float64(x, norm_weight, eps)
    y = x @ weight.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 16), k=st.sampled_from([1, 5, 16, 31, 32, 64, 123, 700]), n=st.sampled_from([1, 3, 4, 37, 123]),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), norm=st.booleans(), residual=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_linear_is_as_exact_as_torch(assert_as_exact, rows, k, n, dtype, bias, norm, residual, seed) -> None:
    torch.manual_seed(seed)

    def one() -> tuple:
        args = draw(rows, k, n, dtype, bias, norm, residual)
        return linear(*args), linear_ref(*args), linear_in_float64(*exact(args))

    compare(assert_as_exact, rows * n, one)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9), k=st.sampled_from([5, 32, 123]), f=st.sampled_from([1, 3, 64, 123]),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), norm=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)), seed=SEEDS,
)  # fmt: skip
def test_gate_up_is_as_exact_as_torch(assert_as_exact, rows, k, f, dtype, bias, norm, activation, seed) -> None:
    torch.manual_seed(seed)
    number, function = ACTIVATIONS[activation]

    def one() -> tuple:
        args = draw(rows, k, 2 * f, dtype, bias, norm, False)[:5]
        gate, up = linear_in_float64(*exact(args), None).chunk(2, dim=-1)
        return gate_up(*args, number), gate_up_ref(*args, number), function(gate) * up

    compare(assert_as_exact, rows * f, one)


def test_leading_dimensions_are_kept() -> None:
    assert linear(torch.randn(2, 3, 8), torch.randn(5, 8)).shape == (2, 3, 5)
    assert gate_up(torch.randn(2, 3, 8), torch.randn(10, 8)).shape == (2, 3, 5)


@pytest.mark.parametrize("op", [linear, gate_up])
def test_infinities_and_nans_are_not_swallowed(op) -> None:
    x = torch.ones(1, 64)
    x[0, 40] = float("nan")
    assert op(x, torch.ones(4, 64)).isnan().all()


@pytest.mark.parametrize("op", [linear, gate_up])
@pytest.mark.parametrize(
    "bad",
    [
        {"x": torch.randn(8, 2).T},
        {"weight": torch.randn(8, 4).T},
        {"weight": torch.randn(4, 7)},
        {"weight": torch.randn(4, 8).bfloat16()},
        {"x": torch.randn(2, 8).double(), "weight": torch.randn(4, 8).double()},
        {"bias": torch.randn(5)},
        {"norm_weight": torch.randn(7)},
        {"norm_weight": torch.randn(8).bfloat16()},
        {"x": torch.randn(2, 0), "weight": torch.randn(4, 0)},
    ],
    ids=["x strided", "weight strided", "k differs", "dtype differs", "float64", "bias", "norm", "norm dtype", "empty"],
)
def test_bad_input_is_refused_before_anything_runs(op, bad) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        op(**({"x": torch.randn(2, 8), "weight": torch.randn(4, 8)} | bad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [40, 128, 200, 1000])
def test_a_row_is_the_same_alone_and_among_others(dtype, k) -> None:
    x, weight, bias, norm_weight, eps, residual = draw(9, k, 22, dtype, True, True, True)
    whole = linear(x, weight, bias, norm_weight, eps, residual)
    gated = gate_up(x, weight, bias, norm_weight, eps, 0)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7), slice(8, 9)):
        part = (x[rows].contiguous(), weight, bias, norm_weight, eps)
        assert torch.equal(linear(*part, residual[rows].contiguous()), whole[rows])
        assert torch.equal(gate_up(*part, 0), gated[rows])


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="residual"):
        linear(torch.randn(2, 8), torch.randn(4, 8), residual=torch.randn(1, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_schema_and_fake_are_right(dtype) -> None:
    args = draw(3, 32, 8, dtype, True, True, True)
    torch.library.opcheck(torch.ops.fastllama.linear.default, args)
    torch.library.opcheck(torch.ops.fastllama.gate_up.default, (*args[:5], 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "norm", "residual"), [(False, False, False), (True, True, True)])
@pytest.mark.parametrize("multiplies", [False, True])
def test_many_rows_are_as_exact_as_torch(monkeypatch, assert_as_exact, dtype, multiplies, bias, norm, residual) -> None:
    monkeypatch.setattr(op, "multiplies", lambda dtype: multiplies)
    monkeypatch.setattr(op, "SLAB_BYTES", 4 * 10 * 123)  # ten rows, and a last slab of seven
    args = draw(9, 123, 37, dtype, bias, norm, residual)
    args = (args[0].view(3, 3, 123), *args[1:5], None if args[5] is None else args[5].view(3, 3, 37))
    assert_as_exact(op.linear_slabs(*args), linear_ref(*args), linear_in_float64(*exact(args)))
    args = draw(9, 123, 74, dtype, bias, norm, False)[:5]
    gate, up = linear_in_float64(*exact(args), None).chunk(2, dim=-1)
    number, function = ACTIVATIONS["silu"]
    assert_as_exact(op.gate_up_slabs(*args, number), gate_up_ref(*args, number), function(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_norm_and_the_gated_activation_are_as_exact_as_torch(assert_as_exact, dtype, name) -> None:
    number, function = ACTIVATIONS[name]
    x = (torch.randn(3, 5, 106) * 3).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    ours, torchs = torch.ops.fastllama.silu_mul(x, number), op.silu_mul_ref(x, number)
    assert_as_exact(ours, torchs, function(gate) * up)
    weight = torch.rand(106).to(dtype)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_as_exact(torch.ops.fastllama.rms_norm(x, weight, 1e-5), op.rms_norm_ref(x, weight, 1e-5), exact)


def test_the_norm_and_the_gated_activation_refuse_what_they_would_misread() -> None:
    x = torch.randn(4, 6)
    for call in (
        lambda: torch.ops.fastllama.rms_norm(x.t(), torch.ones(4), 1e-5),
        lambda: torch.ops.fastllama.rms_norm(x, torch.ones(5), 1e-5),
        lambda: torch.ops.fastllama.rms_norm(x, torch.ones(6).double(), 1e-5),
        lambda: torch.ops.fastllama.silu_mul(x[:, :5].contiguous(), 0),
        lambda: torch.ops.fastllama.silu_mul(x, 99),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()
