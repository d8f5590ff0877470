"""Rotary, KV write and attention: the CPU kernels against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.attention.codes import decoded, encoded
from fastllama_kernels.attention.op import MAX_TOKENS, rotary_attention_ref
from fastllama_kernels.common import build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = 300  # more than two chunks of the kernel


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert build.load() is None


def draw(b, t, kv_heads, groups, d, dtype, starts, cache_rows=None) -> list[torch.Tensor]:
    """Arguments of the op; the slots from each row's start on are poisoned with NaN."""
    angle = torch.rand(SLOTS, d // 2) * 6
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    qkv = torch.randn(b, t, (groups + 2) * kv_heads * d).to(dtype)
    position = torch.tensor(starts)[:, None] + torch.arange(t)
    caches = torch.randn(2, cache_rows or b, kv_heads, SLOTS, d).to(dtype)
    for row, start in enumerate(starts):
        caches[:, row, :, start:] = float("nan")
    return [qkv, cos, sin, position, *caches]


def rotary_attention(qkv, *others) -> torch.Tensor:
    """The decode kernel or the prefill's op, by the number of tokens, as :mod:`fastllama.ops` chooses."""
    if qkv.shape[1] > MAX_TOKENS:
        return torch.ops.fastllama.prefill_attention(qkv, *others)
    return torch.ops.fastllama.rotary_attention(qkv, *others)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def in_float64(qkv, cos, sin, position, k_cache, v_cache) -> torch.Tensor:
    """The definition, one query at a time."""
    b, t, _ = qkv.shape
    kv_heads, d = k_cache.shape[1], k_cache.shape[3]
    _, k, v = qkv.double().view(b, t, -1, d).split((qkv.shape[2] // d - 2 * kv_heads, kv_heads, kv_heads), 2)
    k_cache, v_cache = k_cache.double(), v_cache.double()
    for row in range(b):
        for i, p in enumerate(position[row].tolist()):
            k_cache[row, :, p], v_cache[row, :, p] = rotated(k[row, i], cos[p], sin[p]), v[row, i]
    return attend_in_float64(qkv, cos, sin, position, k_cache, v_cache)


def attend_in_float64(qkv, cos, sin, position, k_cache, v_cache) -> torch.Tensor:
    """The definition where the cache has the new tokens, one query at a time."""
    b, t, _ = qkv.shape
    kv_heads, d = k_cache.shape[1], k_cache.shape[3]
    q = qkv.double().view(b, t, -1, d)[:, :, : qkv.shape[2] // d - 2 * kv_heads]
    out = torch.empty(b, t, q.shape[2], d, dtype=torch.double)
    for row in range(b):
        for i, p in enumerate(position[row].tolist()):
            for head in range(q.shape[2]):
                kv = head // (q.shape[2] // kv_heads)
                scores = k_cache[row, kv, : p + 1] @ rotated(q[row, i, head], cos[p], sin[p]) / d**0.5
                out[row, i, head] = scores.softmax(-1) @ v_cache[row, kv, : p + 1]
    return out.flatten(2)


def check(assert_as_exact, assert_same_keys, args: list[torch.Tensor]) -> None:
    """The op on these arguments, against float64 and next to torch's own error."""
    ours_args = [x.clone() for x in args]
    ours, exact = rotary_attention(*ours_args), in_float64(*args)
    torch_args = [x.clone() for x in args]
    for cache in torch_args[4:]:
        cache.nan_to_num_()  # the masked reference reads every slot
    torchs = rotary_attention_ref(*torch_args)
    assert_as_exact(ours, torchs, exact)
    assert_caches_equal(assert_same_keys, ours_args, torch_args, args[3])


def assert_caches_equal(
    assert_same_keys, ours: list[torch.Tensor], torchs: list[torch.Tensor], position: torch.Tensor
) -> None:
    """Same keys and values up to each row's last position; beyond it nothing was written."""
    for mine, reference in zip(ours[4:], torchs[4:], strict=True):
        for row, last in enumerate(position[:, -1].tolist()):
            live = slice(0, last + 1)
            assert_same_keys(mine[row, :, live], reference[row, :, live])
            assert mine[row, :, last + 1 :].isnan().all()
        assert torch.equal(mine[len(position) :], reference[len(position) :])


@settings(deadline=None, max_examples=50)
@given(
    t=st.integers(1, MAX_TOKENS + 4), kv_heads=st.integers(1, 3), groups=st.sampled_from([1, 2, 4, 7, 32]),
    d=st.sampled_from([2, 8, 24, 64, 80, 128]), dtype=st.sampled_from(DTYPES),
    starts=st.lists(st.integers(0, SLOTS - MAX_TOKENS - 4), min_size=1, max_size=3),
)  # fmt: skip
def test_attention_is_as_exact_as_torch(
    assert_as_exact, assert_same_keys, t, kv_heads, groups, d, dtype, starts
) -> None:
    check(assert_as_exact, assert_same_keys, draw(len(starts), t, kv_heads, groups, d, dtype, starts))


@settings(deadline=None, max_examples=25)
@given(
    t=st.one_of(st.integers(1, MAX_TOKENS + 4), st.just(40)), groups=st.sampled_from([1, 4, 7]),
    d=st.sampled_from([4, 24, 30, 64, 80]), dtype=st.sampled_from(DTYPES),
    starts=st.lists(st.integers(0, SLOTS - 40), min_size=1, max_size=2),
)  # fmt: skip
def test_attention_over_codes_is_as_exact_as_torch_over_what_they_stand_for(
    assert_as_exact, t, groups, d, dtype, starts
) -> None:
    args = draw(len(starts), t, 2, groups, d, dtype, starts)
    coded = [*args[:4], *(encoded(cache) for cache in args[4:])]
    out = rotary_attention(*coded)
    qkv, cos, sin, position, *numbers = (x.clone() for x in args)
    torchs = rotary_attention_ref(qkv, cos, sin, position, *(encoded(cache.nan_to_num()) for cache in numbers))
    in_float64(qkv, cos, sin, position, *(double := [cache.double() for cache in args[4:]]))
    for ours, written, before in zip(coded[4:], double, args[4:], strict=True):
        assert ours.dtype == torch.int8
        for row, start in enumerate(starts):
            live, new = slice(0, start), slice(start, start + t)
            assert torch.equal(ours[row, :, live], encoded(before)[row, :, live])
            half = ours[row, :, new, -4:].contiguous().view(torch.float32) * 0.51
            rounding = torch.finfo(dtype).eps * 4
            assert ((decoded(ours, torch.float64)[row, :, new] - written[row, :, new]).abs() <= half + rounding).all()
    # The new keys are rotated again here, which the codes have been: what they stand for is taken instead.
    k_cache, v_cache = (decoded(cache, torch.float64) for cache in coded[4:])
    exact = attend_in_float64(qkv, cos, sin, position, k_cache, v_cache)
    assert_as_exact(out, torchs, exact)


def test_a_head_of_codes_is_within_half_a_step_and_keeps_what_is_no_number() -> None:
    x = torch.randn(3, 5, 16) * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((decoded(encoded(x), torch.float64) - x).abs() <= 0.5001 * step).all()
    assert torch.equal(decoded(encoded(torch.zeros(2, 8)), torch.float32), torch.zeros(2, 8))
    x[0, 0, 3], x[1, 1, 2] = torch.nan, torch.inf
    bad = decoded(encoded(x), torch.float32).isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 0], [1, 1]]


@settings(deadline=None, max_examples=25)
@given(
    t=st.integers(MAX_TOKENS + 1, 100), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 3, 4, 8]),
    d=st.sampled_from([2, 30, 64, 128]), dtype=st.sampled_from(DTYPES),
    starts=st.lists(st.integers(0, SLOTS - 100), min_size=1, max_size=2),
)  # fmt: skip
def test_prompts_are_as_exact_as_torch(
    assert_as_exact, assert_same_keys, t, kv_heads, groups, d, dtype, starts
) -> None:
    check(assert_as_exact, assert_same_keys, draw(len(starts), t, kv_heads, groups, d, dtype, starts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_in_chunks_is_the_same_to_the_last_bit(dtype) -> None:
    qkv, cos, sin, position, *caches = draw(1, 150, 2, 3, 64, dtype, [0])
    qkv[:, :10, -128:] = 0.0  # whatever of later tokens' values came to these would be seen
    whole = torch.ops.fastllama.prefill_attention(qkv, cos, sin, position, *(cache.clone() for cache in caches))
    chunks = [
        torch.ops.fastllama.prefill_attention(qkv_1tn.contiguous(), cos, sin, position_1t.contiguous(), *caches)
        for qkv_1tn, position_1t in zip(qkv.split((37, 64, 49), 1), position.split((37, 64, 49), 1), strict=True)
    ]
    assert torch.equal(torch.cat(chunks, 1), whole)


def test_sizes_that_no_head_has_are_refused() -> None:
    for heads, kv_heads, d in ((5, 2, 16), (2, 2, 15), (0, 2, 16)):
        qkv, position = torch.randn(1, 9, (heads + 2 * kv_heads) * d), torch.arange(9)[None]
        tables, caches = torch.ones(2, SLOTS, d), torch.zeros(2, 1, kv_heads, SLOTS, d)
        for op in (torch.ops.fastllama.prefill_attention, torch.ops.fastllama.rotary_attention):
            with pytest.raises(RuntimeError, match="expected a multiple"):
                op(qkv, *tables, position, *caches)


def test_a_prompt_of_many_tokens_and_heads(assert_as_exact) -> None:
    slots = 700
    angle = torch.rand(slots, 8) * 6
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    args = [torch.randn(1, 600, 13 * 16), cos, sin, torch.arange(600)[None] + 50]
    args += [*torch.randn(2, 1, 1, slots, 16)]
    exact = in_float64(*(x.clone() for x in args))
    torchs = rotary_attention_ref(*(x.clone() for x in args))
    assert_as_exact(rotary_attention(*args), torchs, exact)


def test_tokens_of_a_prompt_may_lie_in_any_order(assert_as_exact) -> None:
    qkv, cos, sin, position, *caches = draw(1, 40, 2, 2, 16, torch.float32, [5])
    for cache in caches:
        cache.nan_to_num_()
    order = torch.randperm(40)
    args = [qkv[:, order].contiguous(), cos, sin, position[:, order].contiguous(), *caches]
    exact = in_float64(*(x.clone() for x in args))
    torchs = rotary_attention_ref(*(x.clone() for x in args))
    assert_as_exact(rotary_attention(*args), torchs, exact)


def test_rows_of_the_cache_beyond_the_batch_are_left_alone(assert_as_exact, assert_same_keys) -> None:
    args = draw(1, 1, 2, 2, 16, torch.float32, [5], cache_rows=3)
    args[4][1:], args[5][1:] = 1.0, 2.0
    check(assert_as_exact, assert_same_keys, args)


@pytest.mark.parametrize("t", [4, MAX_TOKENS + 4])
def test_copies_of_the_last_token_change_nothing(t) -> None:
    qkv, cos, sin, position, k_cache, v_cache = draw(1, t, 2, 2, 16, torch.float32, [5])
    short = [qkv[:, :3].contiguous(), cos, sin, position[:, :3].contiguous(), k_cache.clone(), v_cache.clone()]
    qkv[:, 3:], position[:, 3:] = qkv[:, 2:3], position[:, 2:3]
    padded = [qkv, cos, sin, position, k_cache, v_cache]
    torch.testing.assert_close(rotary_attention(*padded)[:, :3], rotary_attention(*short))
    torch.testing.assert_close(k_cache, short[4], equal_nan=True)


@pytest.mark.parametrize("t", [1, MAX_TOKENS + 1])
@pytest.mark.parametrize("start", [-1, SLOTS])
def test_a_position_outside_the_cache_is_refused_before_anything_is_written(t, start) -> None:
    args = draw(1, t, 2, 2, 16, torch.float32, [5])
    args[3] = args[3] - 5 + start if start > 0 else args[3] - 6
    before = args[4].clone()
    with pytest.raises((RuntimeError, IndexError), match="position"):
        rotary_attention(*args)
    torch.testing.assert_close(args[4], before, equal_nan=True)


def test_wrong_layouts_are_refused() -> None:
    args = draw(1, 1, 2, 2, 16, torch.float32, [5])
    for index, bad in (
        (0, args[0].bfloat16()),
        (1, args[1].double()),
        (3, args[3].int()),
        (4, args[4].transpose(2, 3)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            rotary_attention(*args[:index], bad, *args[index + 1 :])


@pytest.mark.parametrize("t", [1, MAX_TOKENS + 1])
def test_schema_and_fake_are_right(t) -> None:
    overload = torch.ops.fastllama.rotary_attention if t == 1 else torch.ops.fastllama.prefill_attention
    args = draw(2, t, 2, 2, 16, torch.float32, [5, 7])
    for cache in args[4:]:
        cache.nan_to_num_()
    torch.library.opcheck(overload.default, args)


def test_what_is_no_number_stays_none() -> None:
    qkv, cos, sin, position, k_cache, v_cache = draw(1, 1, 1, 4, 16, torch.float32, [290])
    qkv[0, 0, :16] = torch.nan  # the first query head
    for cache in (k_cache, v_cache):
        cache.nan_to_num_()
    out = rotary_attention(qkv, cos, sin, position, k_cache, v_cache)
    assert out[0, 0, :16].isnan().all()
    assert out[0, 0, 16:].isfinite().all()
