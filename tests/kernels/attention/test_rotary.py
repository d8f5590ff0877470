"""Rotary positions in Triton against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.attention.rotary import rotary_write, rotary_write_ref

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = 40


def tables(device, d, slots=SLOTS) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(slots, d // 2, device=device) * 6
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def in_float64(x, cos, sin, position) -> torch.Tensor:
    d = x.shape[-1]
    half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1).double()
    return x.double() * cos[position][:, :, None] + half * sin[position][:, :, None]


@SETTINGS
@given(
    b=st.integers(1, 3), t=st.integers(1, 4), kv_heads=st.integers(1, 3), groups=st.sampled_from([1, 2, 7]),
    d=st.sampled_from([8, 24, 80, 256]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_keys_and_values_go_to_their_slots_and_nowhere_else(
    device, assert_as_exact, b, t, kv_heads, groups, d, dtype
) -> None:
    cos, sin = tables(device, d)
    qkv = torch.randn(b, t, (groups + 2) * kv_heads * d, device=device).to(dtype)
    position = torch.stack([torch.randperm(SLOTS, device=device)[:t] for _ in range(b)])
    ours = torch.full((2, b + 1, kv_heads, SLOTS, d), float("nan"), device=device).to(dtype)
    torchs = ours.clone()
    args = (qkv, cos, sin, position)
    found, reference = rotary_write(*args, *ours), rotary_write_ref(*args, *torchs)
    heads = qkv.view(b, t, -1, d)
    exact = in_float64(heads, cos, sin, position)
    assert_as_exact(found, reference, exact[:, :, : groups * kv_heads])
    written = torch.zeros(b + 1, SLOTS, dtype=torch.bool, device=device)
    for row in range(b):
        written[row, position[row]] = True
        at = groups * kv_heads
        keys, values = ours[:, row][:, :, position[row]].transpose(1, 2)
        assert_as_exact(keys, torchs[0, row][:, position[row]].transpose(0, 1), exact[row, :, at : at + kv_heads])
        assert torch.equal(values, heads[row, :, at + kv_heads :])
    assert ours.isnan().all(-1).all(2)[:, ~written].all()


@pytest.mark.parametrize(
    ("index", "bad", "said"),
    [
        (0, torch.randn(1, 2, 64).bfloat16(), "key_cache is torch.float32"),
        (0, torch.randn(1, 2, 60), "qkv has 60 features"),
        (0, torch.randn(9, 2, 64), "qkv has 9 rows, the cache holds 2"),
        (1, torch.randn(SLOTS, 16).double(), "cos is torch.float64"),
        (1, torch.randn(SLOTS - 1, 16), "sin has shape"),
        (3, torch.zeros(1, 2, dtype=torch.int32), "positions is torch.int32"),
        (4, torch.randn(2, 1, 16, SLOTS).transpose(2, 3), "key_cache has strides"),
        (5, torch.randn(2, 1, SLOTS + 1, 16), "value_cache has shape"),
    ],
    ids=["dtype", "features", "rows", "table dtype", "table length", "positions", "strides", "caches differ"],
)
def test_bad_input_is_refused(index, bad, said) -> None:
    args = [torch.randn(1, 2, 64), *tables("cpu", 16), torch.zeros(1, 2, dtype=torch.long)]
    args += [torch.randn(2, 1, SLOTS, 16), torch.randn(2, 1, SLOTS, 16)]
    args[index] = bad
    with pytest.raises(ValueError, match=said):
        rotary_write(*args)


def test_a_head_dim_that_the_kernel_cannot_take_and_short_tables_are_refused() -> None:
    caches = torch.randn(2, 1, 1, SLOTS, 12)
    with pytest.raises(ValueError, match="head_dim is 12"):
        rotary_write(torch.randn(1, 1, 36), *tables("cpu", 12), torch.zeros(1, 1, dtype=torch.long), *caches)
    caches = torch.randn(2, 1, 1, SLOTS, 16)
    with pytest.raises(ValueError, match="there must be a row for each"):
        rotary_write(torch.randn(1, 1, 48), *tables("cpu", 16, 8), torch.zeros(1, 1, dtype=torch.long), *caches)


def test_schema_and_fake_are_right(triton_on_cpu) -> None:
    position = torch.tensor([[1, 2], [3, 4]])
    caches = torch.randn(2, 2, 1, SLOTS, 16)
    args = (torch.randn(2, 2, 64), *tables("cpu", 16), position, caches[0].clone(), caches[1].clone())
    torch.library.opcheck(torch.ops.fastllama.rotary_write.default, args)
