"""A matrix: its product, its bytes, rows joined and cut over the same memory, and what torch.compile makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastllama import ops
from fastllama.quantization.matrix import Matrix, shared

EPS = 1e-5


def linear(n: int, k: int, bias: bool) -> nn.Linear:
    return nn.Linear(k, n, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_product_is_norm_linear_bias_and_residual(bias, rows) -> None:
    layer, norm = linear(12, 8, bias), nn.RMSNorm(8, EPS)
    nn.init.normal_(norm.weight)
    x, residual = torch.randn(rows, 2, 8), torch.randn(rows, 2, 12)
    matrix = Matrix.of(layer)
    with torch.no_grad():
        torch.testing.assert_close(matrix(x), layer(x))
        found = matrix(x, norm_weight=norm.weight, eps=EPS, residual=residual)
        torch.testing.assert_close(found, layer(norm(x)) + residual)


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_product_is_that_of_gate_and_up(bias) -> None:
    gate, up, norm = linear(6, 8, bias), linear(6, 8, bias), nn.RMSNorm(8, EPS)
    matrix, x = Matrix.joined([gate, up]), torch.randn(3, 8)
    with torch.no_grad():
        expected = nn.functional.silu(gate(norm(x))) * up(norm(x))
        torch.testing.assert_close(matrix.gated(x, norm.weight, EPS, "silu"), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_joined_rows_are_the_memory_of_the_parameters_they_come_from(bias) -> None:
    parts = [linear(n, 8, bias) for n in (3, 5, 4)]
    held = [parameter for part in parts for parameter in part.parameters()]
    values = [parameter.detach().clone() for parameter in held]
    matrix = Matrix.joined(parts)
    assert matrix.weight.shape == (12, 8)
    assert held == [parameter for part in parts for parameter in part.parameters()], "the same Parameter objects"
    assert all(torch.equal(now, before) for now, before in zip(held, values, strict=True))
    with torch.no_grad():
        parts[1].weight.fill_(7.0)
    assert (matrix.weight[3:8] == 7.0).all()
    assert matrix.rows(3, 8).weight.data_ptr() == parts[1].weight.data_ptr()


def test_linears_of_which_only_some_have_a_bias_are_not_joined() -> None:
    parts = [linear(3, 8, True), linear(5, 8, False)]
    with pytest.raises(ValueError, match="1 of 2 linears have a bias"):
        Matrix.joined(parts)


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_cut_rows_are_the_parts_of_the_whole_product(bias) -> None:
    matrix, x = Matrix.of(linear(10, 8, bias)), torch.randn(2, 8)
    parts = [matrix.rows(0, 4), matrix.rows(4, 10)]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=-1), matrix(x))
    assert sum(part.nbytes for part in parts) == matrix.nbytes == 4 * (80 + 10 * bias)


def test_a_matrix_has_the_tensors_of_its_kind() -> None:
    for bias, kind in ((False, ops.DENSE), (True, ops.DENSE_BIAS)):
        matrix = Matrix.of(linear(10, 8, bias))
        assert matrix.kind == kind
        assert [name for name, _ in matrix.named_parameters()] == list(ops.TENSORS[kind])
        assert all(a is b for a, b in zip(matrix.tensors, matrix.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in matrix.parameters())


def test_a_parameter_that_it_is_made_of_stays_the_same_one() -> None:
    parameter = shared(torch.randn(4, 8))
    assert Matrix(parameter).weight is parameter


def test_compiled_without_guards_it_reads_the_weights_as_they_are_then() -> None:
    matrix, x = Matrix.of(linear(10, 8, False)), torch.randn(5, 8)
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(lambda x: matrix(x), fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), matrix(x))
        matrix.weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), matrix(x))
