"""The seeds of a batch's rows, and what a sample depends on: its row's settings, seed and position, nothing else."""

from __future__ import annotations

import pytest
import torch

from fastllama.ops import SamplingParams, row_seed, sample


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, typical_p=1.0) -> SamplingParams:
    return SamplingParams(
        torch.full((rows,), float(temperature)),
        torch.full((rows,), top_k),
        torch.full((rows,), float(top_p)),
        torch.full((rows,), float(min_p)),
        torch.full((rows,), float(typical_p)),
        torch.tensor([row_seed(seed, row) for row in range(rows)]),
    )


def test_each_row_has_settings_of_its_own() -> None:
    logits, position = torch.randn(1, 400).expand(4, 400).contiguous(), torch.arange(4)
    mixed = SamplingParams(
        torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([0, 5, 0, 3]), torch.tensor([0.5, 1.0, 1.0, 0.2]),
        torch.tensor([0.0, 0.0, 0.2, 0.9]), torch.tensor([1.0, 0.8, 0.3, 0.5]), torch.arange(4),
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
    assert len({row_seed(7, row) for row in range(64)}) == 64
    assert row_seed(7, 0) == 7
    assert row_seed(-1, 3) != row_seed(1, 3)


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (7, [7, -4658895280553007682, 9128953512603536245, 4470058232050528556]),
        (-1, [2**63 - 1, -4564476756301768122]),
        (2**70 + 3, [3, -4658895280553007686]),
    ],
)
def test_a_rows_seed_never_changes_and_is_a_signed_64_bit_integer(seed, seeds) -> None:
    assert [row_seed(seed, row) for row in range(len(seeds))] == seeds
    assert torch.tensor([row_seed(seed, row) for row in range(1000)]).dtype == torch.int64
