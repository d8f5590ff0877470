"""The seeds of a batch's rows, and what a draw depends on: its row's settings, seed and position, nothing else."""

from __future__ import annotations

import pytest
import torch

from fastllama.sampling import SamplingParams, row_seeds, sample


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingParams:
    return SamplingParams(
        torch.full((rows,), float(temperature)),
        torch.full((rows,), top_k),
        torch.full((rows,), float(top_p)),
        torch.full((rows,), float(min_p)),
        row_seeds(seed, rows),
    )


def test_each_row_has_settings_of_its_own() -> None:
    logits, position = torch.randn(1, 400).expand(4, 400).contiguous(), torch.arange(4)
    mixed = SamplingParams(
        torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([0, 5, 0, 3]), torch.tensor([0.5, 1.0, 1.0, 0.2]),
        torch.tensor([0.0, 0.0, 0.2, 0.9]), torch.arange(4),
    )  # fmt: skip
    together = sample(logits, mixed, position)
    for row in range(4):
        alone = SamplingParams(*(x[row : row + 1] for x in mixed))
        assert torch.equal(together[row : row + 1], sample(logits[:1], alone, position[row : row + 1]))
    assert together[3] == logits[3].argmax()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_draw_depends_on_seed_and_position_not_on_the_batch(top_p) -> None:
    logits = torch.randn(1, 100).expand(8, 100).contiguous()
    position = torch.full((8,), 5)
    whole = sample(logits, params(8, top_p=top_p, seed=3), position)
    assert torch.equal(sample(logits[:2], params(2, top_p=top_p, seed=3), position[:2]), whole[:2])
    assert len(set(whole.tolist())) > 1
    assert not torch.equal(sample(logits, params(8, top_p=top_p, seed=4), position), whole)
    assert not torch.equal(sample(logits, params(8, top_p=top_p, seed=3), position + 1), whole)


def test_rows_have_seeds_of_their_own_the_first_one_whatever_the_batch() -> None:
    assert len(set(row_seeds(7, 64).tolist())) == 64
    assert torch.equal(row_seeds(7, 64)[:3], row_seeds(7, 3))
    assert not torch.equal(row_seeds(-1, 4), row_seeds(1, 4))
