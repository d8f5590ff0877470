"""Tile sizes from the table and from the rules; which chips launch dependents."""

from __future__ import annotations

import pytest
import torch

from fastllama_kernels.common import pdl, tiles
from fastllama_kernels.common.tiles import AttentionTile, GemvTile


def test_a_measured_entry_comes_before_the_rule(monkeypatch) -> None:
    gemv, attention = GemvTile(64, 64, 8, 5), AttentionTile(32, 2, 4)
    key = tiles.gemv_key(8, 2048, 4096, torch.bfloat16, gated=False)
    entries = {
        "gemv": {"sm_90": {"tiles": {key: gemv._asdict()}}},
        "decode_attention": {"sm_90": {"tiles": {tiles.attention_key(64, torch.bfloat16, 16): attention._asdict()}}},
    }
    monkeypatch.setattr(tiles, "table", lambda: entries)
    assert tiles.gemv((9, 0), 16, 2048, 4096, torch.float16, gated=False) == gemv
    for others in (
        ((8, 0), 16, 2048, 4096, torch.bfloat16, False), ((9, 0), 1, 2048, 4096, torch.bfloat16, False),
        ((9, 0), 16, 2048, 4096, torch.bfloat16, True), ((9, 0), 16, 2048, 4096, torch.float32, False),
    ):  # fmt: skip
        assert tiles.gemv(*others) != gemv
    assert tiles.decode_attention((9, 0), 64, torch.bfloat16, 16) == attention
    assert tiles.decode_attention((9, 0), 64, torch.bfloat16, 32) != attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k_in", [24, 256, 1000, 2048, 14336])
def test_a_row_of_the_tile_is_one_wide_load_of_every_thread(dtype, k_in) -> None:
    tile = tiles.gemv((9, 0), 1, 4096, k_in, dtype, gated=True)
    assert tile.block_k * dtype.itemsize == 16 * 32 * tile.warps


@pytest.mark.parametrize(("chip", "used"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_kernels_are_dependents_from_compute_capability_9_on(chip, used) -> None:
    assert pdl.used(torch.device("meta"), chip) == used
    assert not pdl.used(torch.device("cpu"))


def test_dependent_launches_can_be_switched_off(monkeypatch) -> None:
    pdl.used.cache_clear()
    monkeypatch.setenv(pdl.SWITCH, "0")
    assert not pdl.used(torch.device("meta"), (9, 0))
    pdl.used.cache_clear()
