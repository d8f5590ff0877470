"""Products with codes against float64; their layout, and how weights become codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.common import build
from fastllama_kernels.common.activations import ACTIVATIONS
from fastllama_kernels.linear import packed, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.fastllama


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(n, k, bits, group, has_offsets=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    code_nk = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale_ng = (torch.rand(n, k // group) + 0.1) / k**0.5 / 2 ** (bits - 2)
    offset_ng = -scale_ng * 2 ** (bits - 1) * torch.rand(n, k // group)
    scales, offsets = packed.by_panel(scale_ng).half(), packed.by_panel(offset_ng).half()
    return packed.packed(code_nk, bits), scales, offsets if has_offsets else None


def weights_by_definition(codes, scales, offsets, bits) -> torch.Tensor:
    """Weight by weight, in float64, as the module's text has it."""
    panels, groups, _ = scales.shape
    columns = 32 // bits
    k = codes.shape[1] * columns
    weight = torch.empty(panels * 16, k, dtype=torch.float64)
    for n in range(panels * 16):
        p, r = divmod(n, 16)
        for column in range(k):
            line, i = divmod(column, columns)
            byte = int(codes[p, line, 4 * r + i % 4])
            code = byte if bits == 8 else byte >> 4 if i >= 4 else byte & 15
            g = column // (k // groups)
            scale = float(scales[p, g, r])
            if offsets is None:
                weight[n, column] = scale * (code - 2 ** (bits - 1))
            else:
                weight[n, column] = scale * code + float(offsets[p, g, r])
    return weight


def inputs_by_definition(x: torch.Tensor, norm_weight, eps, codes_inputs) -> torch.Tensor:
    """norm(x) in float64, rounded to codes of float32's norm(x) where those are asked for."""
    x64 = x.double()
    if norm_weight is not None:
        x64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * norm_weight.double()
    return packed.rounded_inputs(x64.float()).double() if codes_inputs else x64


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_codes_stand_for_the_weights_that_the_text_defines(bits, has_offsets) -> None:
    matrix = draw(32, 64, bits, 32, has_offsets)
    weight = weights_by_definition(*matrix, bits)
    assert torch.equal(packed.dequantized(*matrix, 64, torch.float64), weight)
    ids, like = torch.tensor([[3, 31], [16, 0]]), torch.empty(64)
    for embed in (packed.embed_packed_ref, ops.embed_packed):
        torch.testing.assert_close(embed(like, ids, *matrix), weight[ids].float())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_out_as_they_went_in(bits) -> None:
    code_nk = torch.randint(0, 2**bits, (48, 96), dtype=torch.uint8)
    codes = packed.packed(code_nk, bits)
    assert codes.shape == (3, 96 * bits // 32, 64)
    assert torch.equal(packed.unpacked(codes, bits), code_nk)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 19), groups=st.integers(1, 3), group=st.sampled_from([32, 64, 160]), panels=st.integers(1, 5),
    bits=st.sampled_from([4, 8]), has_offsets=st.booleans(), dtype=st.sampled_from(DTYPES),
    codes_inputs=st.booleans(), bias=st.booleans(), norm=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_linear_is_its_formula(
    rows, groups, group, panels, bits, has_offsets, dtype, codes_inputs, bias, norm, residual
) -> None:
    n, k = 16 * panels, group * groups
    matrix = draw(n, k, bits, group, has_offsets)
    x = torch.randn(rows, k).to(dtype)
    added = [
        torch.randn(shape).to(dtype) if wanted else None for shape, wanted in (((n,), bias), ((rows, n), residual))
    ]
    norm_weight = torch.rand(k).to(dtype) if norm else None
    y = ops.linear_packed(x, *matrix, added[0], norm_weight, 1e-5, added[1], codes_inputs)
    exact = inputs_by_definition(x, norm_weight, 1e-5, codes_inputs)
    exact = exact @ packed.dequantized(*matrix, k, torch.float64).T
    exact = sum((each.double() for each in added if each is not None), exact)
    # One rounding of the result; a code that float32's norm rounds to the neighbour is 1/127 of a block's largest.
    unit = torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps + codes_inputs * norm * 2e-3
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= unit * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "has_offsets"), [(4, False), (4, True), (8, False), (8, True)])
def test_panels_are_written_out_as_what_they_stand_for(dtype, bits, has_offsets) -> None:
    matrix, like = draw(80, 96, bits, 32, has_offsets), torch.empty(3, 96, dtype=dtype)
    args = (like, *matrix, 1, 4)
    written, exact = ops.written_out(*args), packed.dequantized(*matrix, 96, torch.float64)[16:64]
    torch.testing.assert_close(written, packed.written_out_ref(*args))
    torch.testing.assert_close(written, exact.to(dtype))
    torch.library.opcheck(ops.written_out.default, args)
    for first, last in ((-1, 2), (2, 2), (0, 6)):
        with pytest.raises(RuntimeError, match="expected some of 5"):
            ops.written_out(like, *matrix, first, last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "norm", "residual"), [(False, False, False), (True, True, True)])
def test_slabs_are_the_product_with_what_codes_stand_for(monkeypatch, dtype, bias, norm, residual) -> None:
    monkeypatch.setattr(packed, "SLAB_BYTES", 2 * 16 * 96 * dtype.itemsize)  # two panels, and a last slab of one
    matrix, x = draw(80, 96, 4, 32, has_offsets=True), torch.randn(3, 4, 96).to(dtype)
    bias_n, norm_weight = torch.randn(80).to(dtype) if bias else None, torch.rand(96).to(dtype) if norm else None
    added = torch.randn(3, 4, 80).to(dtype) if residual else None
    y = packed.linear_packed_slabs(x, *matrix, bias_n, norm_weight, 1e-5, added, True)
    torchs = packed.linear_packed_ref(x, *matrix, bias_n, norm_weight, 1e-5, added, False)
    bound = 4 * torch.finfo(dtype).eps * torchs.abs().max().clamp(min=1)
    assert y.dtype == dtype
    assert (y - torchs).abs().max() <= bound
    matrix = draw(64, 96, 8, 96)
    gated = packed.gate_up_packed_slabs(x, *matrix, None, norm_weight, 1e-5, 0, True)
    torchs = packed.gate_up_packed_ref(x, *matrix, None, norm_weight, 1e-5, 0, False)
    assert (gated - torchs).abs().max() <= 4 * torch.finfo(dtype).eps * torchs.abs().max().clamp(min=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gate_up_is_the_gated_activation_of_linear(activation, bias) -> None:
    matrix = draw(64, 96, 4, 32)
    x, norm_weight = torch.randn(5, 96), torch.rand(96)
    args = (x, *matrix, torch.randn(64) if bias else None, norm_weight, 1e-5)
    number, function = ACTIVATIONS[activation]
    gate, up = ops.linear_packed(*args, None, True).chunk(2, dim=-1)
    torch.testing.assert_close(ops.gate_up_packed(*args, number, True), function(gate) * up)


def test_the_silu_of_any_number_is_no_larger_than_that_number_allows() -> None:
    code_nk = torch.tensor([0, 9], dtype=torch.uint8).repeat_interleave(16)[:, None].repeat(1, 32)  # gate < 0 < up
    codes, scales = packed.packed(code_nk, 4), packed.by_panel(torch.full((32, 1), 0.01)).half()
    x = torch.tensor([1e-3, 1.0, 30.0, 35.0, 1e3, 1e30])[:, None].repeat(1, 32)
    gate, up = ops.linear_packed(x, codes, scales, None, None, None, 0.0, None, False).double().chunk(2, dim=-1)
    found = ops.gate_up_packed(x, codes, scales, None, None, None, 0.0, ACTIVATIONS["silu"][0], False)
    assert gate.min() < -1e29
    torch.testing.assert_close(found.double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_float32_ones_rounded_to_nearest(dtype) -> None:
    matrix, x = draw(64, 96, 8, 96), torch.randn(7, 96).to(dtype)
    x[2], x[3] = 3e4, -6e4  # beyond float16
    found = ops.linear_packed(x, *matrix, None, None, 0.0, None, True)
    assert torch.equal(found, ops.linear_packed(x.float(), *matrix, None, None, 0.0, None, True).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_a_row_is_the_same_alone_and_on_any_number_of_threads(bits, rows, threads) -> None:
    matrix, x = draw(16 * 137, 256, bits, 32, True), torch.randn(rows, 256)
    alone = [ops.linear_packed(row[None], *matrix, None, None, 0.0, None, True) for row in x]
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(ops.linear_packed(x, *matrix, None, None, 0.0, None, True), torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "has_offsets"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("codes_inputs", [False, True])
def test_a_row_is_the_same_alone_and_among_others(dtype, bits, has_offsets, codes_inputs) -> None:
    matrix, x = draw(16 * 6, 320, bits, 64, has_offsets), torch.randn(9, 320).to(dtype)
    norm_weight = torch.rand(320).to(dtype)
    whole = ops.linear_packed(x, *matrix, None, norm_weight, 1e-5, None, codes_inputs)
    gated = ops.gate_up_packed(x, *matrix, None, norm_weight, 1e-5, 0, codes_inputs)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7), slice(8, 9)):
        part = x[rows].contiguous()
        assert torch.equal(ops.linear_packed(part, *matrix, None, norm_weight, 1e-5, None, codes_inputs), whole[rows])
        assert torch.equal(ops.gate_up_packed(part, *matrix, None, norm_weight, 1e-5, 0, codes_inputs), gated[rows])


@pytest.mark.parametrize("codes_inputs", [True, False])
def test_the_torch_reference_agrees(codes_inputs) -> None:
    args = (torch.randn(2, 96), *draw(32, 96, 4, 32, True), torch.randn(32), None, 0.0)
    residual = torch.randn(2, 32)
    expected = packed.linear_packed_ref(*args, residual, codes_inputs)
    torch.testing.assert_close(ops.linear_packed(*args, residual, codes_inputs), expected)
    expected = packed.gate_up_packed_ref(*args, 0, codes_inputs)
    torch.testing.assert_close(ops.gate_up_packed(*args, 0, codes_inputs), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codes_inputs", [True, False])
def test_what_is_no_number_stays_none(bad, codes_inputs) -> None:
    x = torch.randn(2, 64)
    x[1, 40] = bad
    y = ops.linear_packed(x, *draw(16, 64, 8, 32), None, None, 0.0, None, codes_inputs)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-38, 1e-30, 1e30])
def test_inputs_of_any_size_are_taken(largest) -> None:
    matrix = draw(16, 32, 8, 32)
    x = torch.ones(1, 32) * largest
    x[0, 1] = 0
    y = ops.linear_packed(x, *matrix, None, None, 0.0, None, True)
    torch.testing.assert_close(y, x @ packed.dequantized(*matrix, 32, torch.float32).T, rtol=1e-4, atol=1e-34)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]), group=st.sampled_from([32, 96]), dtype=st.sampled_from(DTYPES),
    panels=st.integers(1, 4), has_offsets=st.booleans(),
)  # fmt: skip
def test_weights_become_the_codes_of_the_formula(bits, group, dtype, panels, has_offsets) -> None:
    weight = (torch.randn(16 * panels, 192) * 0.02).to(dtype)
    weight[0], weight[1] = 0, 0.25
    has_offsets = has_offsets and bits == 4

    def error(made) -> torch.Tensor:
        difference = restored(*made, 192) - weight.float()
        return difference.unflatten(1, (-1, group)).square().sum(2)

    made, expected = (
        ops.quantize(weight, bits, group, has_offsets),
        quantize.quantize_ref(weight, bits, group, has_offsets),
    )
    assert [each.shape for each in made] == [each.shape for each in expected]
    # Ties between scales, and sums in another order: other codes of nearly the same error, over all groups.
    assert (made[0] != expected[0]).float().mean() < 0.1
    torch.testing.assert_close(error(made).mean(), error(expected).mean(), rtol=1e-2, atol=1e-12)
    assert not restored(*made, 192)[0].any()
    torch.testing.assert_close(restored(*made, 192)[1], torch.full((192,), 0.25), rtol=1e-3, atol=0)


def restored(codes, scales, offsets, k) -> torch.Tensor:
    """The weights that codes stand for, in float32."""
    return packed.dequantized(codes, scales, offsets if len(offsets) else None, k, torch.float32)


def test_weights_that_lie_on_sixteen_levels_come_back() -> None:
    levels = torch.randint(0, 16, (32, 2, 32))
    levels[:, :, 0], levels[:, :, 1] = 0, 15
    step, first = (torch.rand(32, 2, 1) * 0.01 + 0.01).half().float(), torch.randn(32, 2, 1).half().float()
    weight = (levels * step + first).flatten(1)
    assert (restored(*ops.quantize(weight, 4, 32, True), 64) - weight).abs().max() < 2e-3 * weight.abs().max()
    torch.testing.assert_close(restored(*ops.quantize(weight, 4, 32, True), 64), weight, rtol=1e-3, atol=2e-4)


def test_no_scale_on_a_fine_grid_leaves_a_much_smaller_error_in_four_bits() -> None:
    weight = torch.randn(64, 32)
    ours = (restored(*ops.quantize(weight, 4, 32, False), 32) - weight).square().sum(1)
    assert (restored(*ops.quantize(weight, 4, 32, True), 32) - weight).square().sum() < 0.9 * ours.sum()
    grid = torch.linspace(4, 12, 400)
    steps = torch.cat([grid, -grid])[:, None, None] / weight.abs().amax(1, keepdim=True)
    least = (((weight * steps).round().clamp(-8, 7) / steps - weight).square().sum(2)).amin(0)
    assert (ours / least).mean() < 1.02


def test_eight_bits_err_by_half_a_step() -> None:
    weight = torch.randn(32, 64)
    error = (restored(*ops.quantize(weight, 8, 64, False), 64) - weight).abs()
    assert (error <= 0.502 * weight.abs().amax(1, keepdim=True) / 127).all()


GOOD = {
    "x": torch.zeros(1, 64), "codes": torch.zeros(2, 8, 64, dtype=torch.uint8), "scales": torch.ones(2, 2, 16).half(),
    "offsets": None, "bias": None, "norm_weight": None, "eps": 0.0, "residual": None, "codes_inputs": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 48)}, "x has 48 columns"),
        ({"x": torch.zeros(1, 0)}, "x has 0 columns"),
        ({"x": torch.zeros(1, 96)}, "8 lines of codes for 96 columns, expected 12 or 24"),
        ({"x": torch.zeros(64, 2).t()}, "strided"),
        ({"codes": torch.zeros(2, 8, 64)}, "uint8"),
        ({"codes": torch.zeros(2, 8, 32, dtype=torch.uint8)}, "in lines of 64"),
        ({"scales": torch.ones(2, 2, 16)}, "scales has dtype"),
        ({"scales": torch.ones(1, 2, 16).half()}, "dimension 0 of scales is 1, expected 2"),
        ({"scales": torch.ones(2, 3, 16).half()}, "groups of a multiple of 32"),
        ({"offsets": torch.ones(2, 2, 16)}, "offsets has dtype"),
        ({"offsets": torch.ones(2, 1, 16).half()}, "dimension 1 of offsets is 1, expected 2"),
        ({"bias": torch.ones(16)}, "dimension 0 of bias is 16, expected 32"),
        ({"norm_weight": torch.ones(32)}, "norm_weight"),
        ({"residual": torch.ones(1, 16)}, "residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_bad_input_is_refused(changes, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.linear_packed(*(GOOD | changes).values())


def test_ids_outside_an_embedding_are_refused() -> None:
    with pytest.raises(RuntimeError, match="id 16 of an embedding of 16 rows"):
        ops.embed_packed(torch.empty(32), torch.tensor([16]), *draw(16, 32, 8, 32))


@pytest.mark.parametrize("codes_inputs", [True, False])
def test_schemas_and_fakes_are_right(codes_inputs) -> None:
    x, matrix = torch.randn(2, 64), draw(32, 64, 4, 32, True)
    torch.library.opcheck(ops.linear_packed.default, (x, *matrix, None, None, 0.0, None, codes_inputs))
    torch.library.opcheck(ops.gate_up_packed.default, (x, *matrix, None, None, 0.0, 0, codes_inputs))
    torch.library.opcheck(ops.embed_packed.default, (torch.empty(64), torch.tensor([[3]]), *matrix))
    torch.library.opcheck(ops.quantize.default, (torch.randn(16, 64), 4, 32, codes_inputs))
