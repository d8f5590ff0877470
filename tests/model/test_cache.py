"""StaticCache and DynamicCache by themselves."""

from __future__ import annotations

import pytest
import torch

from fastllama import CacheOverflowError, LlamaConfig, StaticCache
from fastllama.model.cache import DynamicCache

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)


def write(cache, t: int, rows: int = 2, cache_position=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write random tokens to every layer; returns what was written."""
    written = []
    for layer in range(3):
        keys, values = torch.randn(2, rows, 2, t, 8).unbind(0)
        kwargs = None if cache_position is None else {"cache_position": cache_position}
        cache.update(keys, values, layer, kwargs)
        written.append((keys, values))
    return written


@pytest.fixture
def cache() -> StaticCache:
    return StaticCache(CONFIG, batch_size=2, max_cache_len=6)


def test_memory_is_allocated_once_and_never_moves(cache) -> None:
    addresses = [x.data_ptr() for x in cache.key_cache + cache.value_cache]
    write(cache, 4)
    cache.crop(2)
    write(cache, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert addresses == [x.data_ptr() for x in cache.key_cache + cache.value_cache]
    assert cache.nbytes == 2 * 3 * (2 * 2 * 6 * 8) * 4
    assert cache.get_max_length() == cache.get_max_cache_shape() == 6


def test_tokens_follow_each_other_in_every_layer(cache) -> None:
    first, second = write(cache, 3), write(cache, 2)
    assert cache.get_seq_length() == 5
    for layer in range(3):
        for held, index in ((cache.key_cache, 0), (cache.value_cache, 1)):
            expected = torch.cat((first[layer][index], second[layer][index]), dim=2)
            assert torch.equal(held[layer][:, :, :5], expected)


def test_rows_are_written_at_positions_of_their_own(cache) -> None:
    ((keys, _), *_) = write(cache, 1, cache_position=torch.tensor([[1], [4]]))
    assert torch.equal(cache.key_cache[0][0, :, 1], keys[0, :, 0])
    assert torch.equal(cache.key_cache[0][1, :, 4], keys[1, :, 0])
    assert cache.length_b.tolist() == [2, 5]


def test_fewer_rows_than_the_cache_has_may_be_written(cache) -> None:
    write(cache, 2, rows=1)
    assert cache.length_b.tolist() == [2, 0]


@pytest.mark.parametrize("position", [torch.arange(4, 8), torch.tensor([-1])])
def test_writing_outside_is_an_error_before_anything_is_written(cache, position) -> None:
    with pytest.raises(CacheOverflowError, match="6 slots"):
        write(cache, len(position), cache_position=position)
    assert not cache.key_cache[0].any()


def test_growing_past_the_capacity_is_an_error(cache) -> None:
    write(cache, 6)
    with pytest.raises(CacheOverflowError, match="position 6"):
        write(cache, 1)


def test_more_rows_than_the_cache_has_are_refused(cache) -> None:
    with pytest.raises(ValueError, match="got 3 rows"):
        write(cache, 1, rows=3)


@pytest.mark.parametrize(("to", "left"), [(2, [2, 2]), (4, [3, 4]), (-1, [3, 3]), (-9, [0, 0])])
def test_crop_forgets_the_end_of_each_row(cache, to, left) -> None:
    write(cache, 1, cache_position=torch.tensor([[2], [3]]))
    cache.crop(to)
    assert cache.length_b.tolist() == left
    assert cache.get_seq_length() == max(left)


def test_reset_starts_over(cache) -> None:
    write(cache, 5)
    cache.reset()
    again = write(cache, 2)
    assert cache.get_seq_length() == 2
    assert torch.equal(cache.key_cache[1][:, :, :2], again[1][0])


def test_reorder_moves_rows_and_their_lengths(cache) -> None:
    write(cache, 1, cache_position=torch.tensor([[1], [4]]))
    before = [x.clone() for x in cache.key_cache + cache.value_cache]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.length_b.tolist() == [5, 5]
    for held, old in zip(cache.key_cache + cache.value_cache, before, strict=True):
        assert torch.equal(held, old[[1, 1]])
    cache.reorder_cache(torch.tensor([0, 0]))
    write(cache, 1)
    assert cache.length_b.tolist() == [6, 6]


@pytest.mark.parametrize("beam_idx", [torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([-1, 0])])
def test_reorder_refuses_rows_that_do_not_exist(cache, beam_idx) -> None:
    with pytest.raises(ValueError, match="beam_idx"):
        cache.reorder_cache(beam_idx)


@pytest.mark.parametrize(("rows", "slots"), [(0, 4), (1, 0), (-1, 4)])
def test_a_cache_needs_rows_and_slots(rows, slots) -> None:
    with pytest.raises(ValueError, match="positive"):
        StaticCache(CONFIG, rows, slots)


def test_the_dtype_is_the_configs_unless_given() -> None:
    assert StaticCache(CONFIG.replace(dtype="bfloat16"), 1, 4).dtype == torch.bfloat16
    assert StaticCache(CONFIG, 1, 4, dtype=torch.float16).key_cache[0].dtype == torch.float16


def test_a_dynamic_cache_grows() -> None:
    cache = DynamicCache()
    assert cache.get_seq_length() == 0
    write(cache, 3)
    write(cache, 1)
    assert cache.get_seq_length() == 4
    assert cache.get_max_length() is None


def test_a_cache_in_8_bits_gives_back_what_its_codes_stand_for() -> None:
    cache, plain = StaticCache(CONFIG, 2, 6, dtype=torch.int8), StaticCache(CONFIG, 2, 6)
    assert cache.nbytes == 2 * 3 * (2 * 2 * 6 * (8 + 4))
    for t in (3, 1):
        for layer in range(3):
            new = torch.randn(2, 2, 2, t, 8).unbind(0)
            for ours, exact in zip(cache.update(*new, layer), plain.update(*new, layer), strict=True):
                assert ours.dtype == torch.float32
                step = exact.abs().amax(-1, keepdim=True) / 127
                assert ((ours - exact).abs() <= 0.501 * step).all()
    assert cache.get_seq_length() == 4
    cache.resize(4, 8)
    assert cache.key_cache[0].shape == (4, 2, 8, 12)
    assert cache.key_cache[0].dtype == torch.int8
