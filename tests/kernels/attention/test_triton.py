"""Decode attention in Triton against float64, next to torch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama_kernels.attention import triton as op
from fastllama_kernels.attention.op import MAX_HEAD_DIM, MAX_TOKENS, rotary_attention_ref, rotate

pytestmark = pytest.mark.triton
SETTINGS = settings(deadline=None, max_examples=10 if torch.cuda.is_available() else 40)  # a GPU's are compiled each
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = 300


def draw(device, b, t, kv_heads, groups, d, dtype, starts, cache_rows=None) -> list[torch.Tensor]:
    """Arguments of rotary_attention; the slots from each row's start on are poisoned with NaN."""
    angle = torch.rand(SLOTS, d // 2) * 6
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    qkv = torch.randn(b, t, (groups + 2) * kv_heads * d).to(dtype)
    position = torch.tensor(starts)[:, None] + torch.arange(t)
    caches = torch.randn(2, cache_rows or b, kv_heads, SLOTS, d).to(dtype)
    for row, start in enumerate(starts):
        caches[:, row, :, start:] = float("nan")
    return [x.to(device) for x in (qkv, cos, sin, position, caches[0].clone(), caches[1].clone())]


def attend_in_float64(q, position, k_cache, v_cache, start=None) -> torch.Tensor:
    """The definition, one query at a time: ``[b, t, h, d]``."""
    groups, out = q.shape[2] // k_cache.shape[1], torch.zeros(q.shape, dtype=torch.double, device=q.device)
    for row in range(len(q)):
        first = 0 if start is None else int(start[row])
        for i, p in enumerate(position[row].tolist()):
            seen = slice(first, p + 1)
            for head in range(q.shape[2]):
                keys, values = (cache[row, head // groups, seen].double() for cache in (k_cache, v_cache))
                out[row, i, head] = (keys @ q[row, i, head].double() / q.shape[3] ** 0.5).softmax(-1) @ values
    return out


def run(args: list[torch.Tensor], splits: int | None, **others) -> torch.Tensor:
    qkv, cos, sin, position, *caches = args
    launch, out = op.plan_launch(qkv, position, *caches, tables=(cos, sin), splits=splits, **others)
    launch.run()
    return out


@SETTINGS
@given(
    t=st.integers(1, MAX_TOKENS), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 2, 4, 7, 32]),
    d=st.integers(1, MAX_HEAD_DIM // 8).map(lambda eights: 8 * eights), dtype=st.sampled_from(DTYPES),
    starts=st.lists(st.integers(0, SLOTS - MAX_TOKENS), min_size=1, max_size=2),
    splits=st.sampled_from([1, 2, 3, 8, None]), seed=st.integers(0, 999),
)  # fmt: skip
def test_rotary_attention_is_as_exact_as_torch(
    device, assert_as_exact, assert_same_keys, t, kv_heads, groups, d, dtype, starts, splits, seed
) -> None:
    torch.manual_seed(seed)
    args = draw(device, len(starts), t, kv_heads, groups, d, dtype, starts)
    torchs = [x.clone() for x in args]
    for cache in torchs[4:]:
        cache.nan_to_num_()  # the masked reference reads every slot
    reference = rotary_attention_ref(*torchs)
    arrived = torch.zeros(len(starts) * kv_heads * groups, dtype=torch.int32, device=device)  # as the engine has them
    found = run(args, splits, arrived=arrived)
    assert not arrived.any()  # as the next launch expects it
    heads = args[0].view(len(starts), t, -1, d)[:, :, : groups * kv_heads]
    q = rotate(heads, args[1][args[3]][:, :, None], args[2][args[3]][:, :, None])
    exact = attend_in_float64(q, args[3], *torchs[4:])
    assert_as_exact(found, reference, exact.flatten(2))
    for ours, theirs in zip(args[4:], torchs[4:], strict=True):
        for row, last in enumerate(args[3][:, -1].tolist()):
            assert_same_keys(ours[row, :, : last + 1], theirs[row, :, : last + 1])
            assert ours[row, :, last + 1 :].isnan().all()


@SETTINGS
@given(
    t=st.integers(1, MAX_TOKENS), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 3, 5, 32]),
    d=st.integers(1, MAX_HEAD_DIM // 8).map(lambda eights: 8 * eights), dtype=st.sampled_from(DTYPES), data=st.data(),
    splits=st.sampled_from([1, 4]), seed=st.integers(0, 999),
)  # fmt: skip
def test_attention_between_start_and_position_is_as_exact_as_torch(
    device, assert_as_exact, t, kv_heads, groups, d, dtype, data, splits, seed
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, t, kv_heads * groups, d, device=device).to(dtype)
    caches = torch.randn(2, 3, kv_heads, SLOTS, d, device=device).to(dtype)
    first = [data.draw(st.integers(0, SLOTS - t - 1)) for _ in range(2)]
    last = [data.draw(st.integers(low, SLOTS - t)) for low in first]
    start = torch.tensor(first, device=device)
    position = torch.tensor(last, device=device)[:, None] + torch.arange(t, device=device)
    torchs = caches.clone()
    for row in range(2):
        caches[:, row, :, : first[row]] = caches[:, row, :, last[row] + t :] = float("nan")
    launch, found = op.plan_launch(q, position, *(cache.clone() for cache in caches), start_b=start, splits=splits)
    launch.run()
    reference = op.decode_attention_ref(q, position, *torchs, start)
    assert_as_exact(found, reference, attend_in_float64(q, position, *torchs, start))


def test_copies_of_the_last_token_change_nothing(device) -> None:
    qkv, cos, sin, position, k_cache, v_cache = draw(device, 1, 4, 2, 2, 16, torch.float32, [40])
    short = [qkv[:, :3].contiguous(), cos, sin, position[:, :3].contiguous(), k_cache.clone(), v_cache.clone()]
    qkv[:, 3:], position[:, 3:] = qkv[:, 2:3], position[:, 2:3]
    torch.testing.assert_close(run([qkv, cos, sin, position, k_cache, v_cache], 3)[:, :3], run(short, 3))
    torch.testing.assert_close(k_cache, short[4], equal_nan=True)


def test_rows_of_the_cache_beyond_the_batch_are_left_alone(device) -> None:
    args = draw(device, 1, 1, 2, 2, 16, torch.float32, [5], cache_rows=3)
    args[4][1:], args[5][1:] = 1.0, 2.0
    run(args, 2)
    assert (args[4][1:] == 1.0).all()
    assert (args[5][1:] == 2.0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_a_position_beyond_the_cache_writes_nothing_and_sees_all_of_it(device, splits) -> None:
    args = draw(device, 1, 1, 2, 2, 16, torch.float32, [SLOTS - 1])
    for cache in args[4:]:
        cache.nan_to_num_()
    args[3].fill_(SLOTS + 700)
    before = [cache.clone() for cache in args[4:]]
    assert run(args, splits).isfinite().all()
    assert all(torch.equal(cache, held) for cache, held in zip(args[4:], before, strict=True))


@pytest.mark.parametrize("splits", [1, 4])
def test_a_query_that_sees_nothing_gives_zeros(device, splits) -> None:
    q, caches = torch.randn(1, 2, 4, 16, device=device), torch.randn(2, 1, 2, 64, 16, device=device)
    position, start = torch.tensor([[3, 4]], device=device), torch.tensor([9], device=device)
    launch, found = op.plan_launch(q, position, *caches, start_b=start, splits=splits)
    launch.run()
    assert (found == 0).all()


def test_a_start_before_the_cache_is_its_beginning(device) -> None:
    q, caches = torch.randn(1, 1, 4, 16, device=device), torch.randn(2, 1, 2, 64, 16, device=device)
    position, start = torch.tensor([[40]], device=device), torch.tensor([-900], device=device)
    torch.testing.assert_close(
        op.decode_attention(q, position, *caches, start), op.decode_attention(q, position, *caches)
    )


def test_one_launch_serves_every_length() -> None:
    launches = []
    for live in (1, 299):
        args = draw("cpu", 1, 1, 2, 2, 16, torch.float32, [live])
        launches.append(op.plan_launch(args[0], args[3], *args[4:], tables=tuple(args[1:3]))[0])
    assert launches[0].signature == launches[1].signature
    assert (launches[0].constants, launches[0].grid) == (launches[1].constants, launches[1].grid)


def test_launches_are_as_many_as_fill_the_chip_and_no_shorter_than_a_tile() -> None:
    def splits(slots: int, batch: int) -> int:
        cache = torch.empty(batch, 8, slots, 64, dtype=torch.bfloat16, device="meta")
        q = torch.empty(batch, 1, 32, 64, dtype=torch.bfloat16, device="meta")
        position = torch.empty(batch, 1, dtype=torch.int64, device="meta")
        return op.plan_launch(q, position, cache, cache, chip=(9, 0))[0].grid[0]

    assert splits(128, 1) == 1
    assert splits(512, 1) == 4
    assert splits(32768, 1) == 33
    assert splits(32768, 8) == 5
    assert splits(32768, 64) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"q": torch.randn(1, 9, 4, 16)}, "9 query tokens a row, the kernel takes 1 to 8"),
        ({"q": torch.randn(1, 1, 3, 16)}, "a multiple of 2 heads"),
        ({"q": torch.randn(3, 1, 4, 16)}, "q has 3 rows, the cache holds 2"),
        ({"q": torch.randn(1, 1, 4, 16).half()}, "key_cache is torch.float32"),
        ({"start_b": torch.zeros(2, dtype=torch.long)}, "start has shape"),
        ({"arrived": torch.zeros(1, dtype=torch.int32)}, "arrived has 1 counters, expected at least 2"),
        ({"position_bt": torch.zeros(1, 2, dtype=torch.long)}, "positions has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(bad, said) -> None:
    good = {
        "q": torch.randn(1, 1, 4, 16), "position_bt": torch.zeros(1, 1, dtype=torch.long),
        "k_cache_bksd": torch.randn(2, 2, 8, 16), "v_cache_bksd": torch.randn(2, 2, 8, 16),
    }  # fmt: skip
    if "q" in bad and bad["q"].shape[1] == 9:
        bad = bad | {"position_bt": torch.zeros(1, 9, dtype=torch.long)}
    if "q" in bad and len(bad["q"]) == 3:
        bad = bad | {"position_bt": torch.zeros(3, 1, dtype=torch.long)}
    with pytest.raises(ValueError, match=said):
        op.plan_launch(**(good | bad))


def test_schema_and_fake_are_right() -> None:
    q, caches = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 8, 16)
    position = torch.tensor([[1, 2], [3, 4]])
    args = (q, position, caches[0].clone(), caches[1].clone(), torch.tensor([0, 2]))
    torch.library.opcheck(torch.ops.fastllama.decode_attention.default, args)


def test_schema_and_fake_of_the_rotary_form_are_right(triton_on_cpu) -> None:
    args = draw("cpu", 2, 2, 2, 2, 16, torch.float32, [3, 4])
    for cache in args[4:]:
        cache.nan_to_num_()
    counters = torch.zeros(8, dtype=torch.int32)
    torch.library.opcheck(torch.ops.fastllama.rotary_attention_split.default, (*args, counters))
