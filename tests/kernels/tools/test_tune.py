"""The table of tile sizes: what tuning writes, and that it goes on where it was cut short. Times are made up."""

from __future__ import annotations

import json

import pytest
import torch

from fastllama_kernels.common import tiles
from fastllama_kernels.common.tiles import AttentionTile, GemvTile
from fastllama_kernels.tools import tune

H200 = torch.device("cuda", 0)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, ...]]:
    """The matrices that are measured, in their order; measuring takes no GPU here."""
    found = []

    def gemv(rows, n, k, gated, device):
        found.append((rows, n, k))
        return GemvTile(4, 1024, 4, 3), 1e-6, 2 * n * k

    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "an H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "_best_gemv", gemv)
    monkeypatch.setattr(tune, "_best_attention", lambda shape, device: (AttentionTile(64, 4, 3), 1e-6, 1))
    tiles.capability.cache_clear()
    yield found
    tiles.capability.cache_clear()


def test_every_matrix_of_a_shape_is_in_the_table_with_its_hardware(measured, tmp_path) -> None:
    file = tmp_path / "tiles.json"
    lines = list(tune.tune(["llama-3.2-1b"], H200, file))
    assert len(lines) == 2 * 5 + 1
    table = json.loads(file.read_text())
    entry = table["gemv"]["sm_90"]
    assert entry["hardware"] == "an H200"
    key = tiles.gemv_key(1, 8192, 2048, torch.bfloat16, gated=True)
    assert entry["tiles"][key] == GemvTile(4, 1024, 4, 3)._asdict()
    assert len(table["decode_attention"]["sm_90"]["tiles"]) == 1


def test_a_run_that_was_cut_short_goes_on_where_it_was(measured, tmp_path) -> None:
    file = tmp_path / "tiles.json"
    run = tune.tune(["llama-3.2-1b"], H200, file)
    for _ in range(3):
        next(run)
    run.close()
    before = list(measured)
    list(tune.tune(["llama-3.2-1b"], H200, file))
    assert not set(before) & set(measured[len(before) :])
    assert len(measured) == 10


def test_what_other_hardware_measured_is_measured_again(measured, tmp_path, monkeypatch) -> None:
    file = tmp_path / "tiles.json"
    list(tune.tune(["llama-3.2-1b"], H200, file))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "an H100")
    list(tune.tune(["llama-3.2-1b"], H200, file))
    assert len(measured) == 20
    assert json.loads(file.read_text())["gemv"]["sm_90"]["hardware"] == "an H100"
