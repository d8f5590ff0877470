"""The model of a decode step: its bytes against the model's own sizes."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from fastllama.loading.names import RANDOM_SHAPES
from fastllama_kernels.__main__ import main
from fastllama_kernels.tools.plan import GPUS, rows
from fastllama_kernels.tools.step import SHAPES


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"])
def test_shapes_are_the_published_ones(name) -> None:
    shape, config = SHAPES[name], RANDOM_SHAPES[name]
    assert all(getattr(config, field) == size for field, size in asdict(shape).items())


def test_a_step_moves_the_weights_and_the_live_cache_and_little_else() -> None:
    shape = SHAPES["llama-3.2-1b"]
    *kernels, total = rows(shape, GPUS["h200"], torch.bfloat16, batch=1, live=512)
    weights = 2 * 1_235_814_400
    cache = 2 * 512 * 16 * 8 * 64 * 2
    assert weights + cache < total.nbytes < 1.01 * (weights + cache)
    assert total.launches == sum(row.launches for row in kernels) == 5 * 16 + 5
    assert total.floor == pytest.approx(total.nbytes / 4.3e12)
    assert total.predicted > total.floor


def test_the_plan_is_printed_kernel_by_kernel(capsys) -> None:
    assert main(["plan", "--shape", "llama-3.1-8b", "--gpu", "h100", "--batch", "8", "--live", "4096"]) == 0
    text = capsys.readouterr().out
    assert "nine tenths of the data sheet" in text
    assert text.splitlines()[-1].endswith("step")
    for name in ("norm, q/k/v", "rotary, KV write, attention", "norm, gate/up, silu", "norm, head", "sample: race"):
        assert name in text


def test_more_rows_than_the_kernels_take_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--batch", "32"])
    assert "32 rows" in capsys.readouterr().err.splitlines()[-1]
