"""Contenders by turns, on the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama import compare as comparing
from fastllama.compare import EAGER, OURS, TRANSFORMERS, compare, interleave, transformers_twin
from fastllama.measure import Bandwidth, Decode


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A tiny model whose engine is played by the eager forward, on a machine that is not measured."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )

    def stream(self: LlamaForCausalLM, input_ids: torch.Tensor, **settings: Any) -> Iterator[torch.Tensor]:
        assert settings["eos_token_id"] == ()
        return comparing._eager_tokens(self, input_ids, settings["max_new_tokens"])

    monkeypatch.setattr(LlamaForCausalLM, "stream", stream)
    monkeypatch.setattr(comparing, "memory_bandwidth", lambda device: Bandwidth(1e10, "made up"))
    return LlamaForCausalLM(config).eval()


def test_contenders_take_turns_after_one_unmeasured_run_of_each() -> None:
    order: list[str] = []

    def contender(name: str) -> comparing.Contender:
        return lambda: Decode((len(order),), 0.0, ())

    decodes = interleave({name: contender(name) for name in "ab"}, rounds=3, on_start=order.append)
    warm_up, measured = order[:2], order[2:]
    assert sorted(warm_up) == ["a", "b"]
    assert "".join(measured) in {"abbaab", "baabba"}
    assert [len(runs) for runs in decodes.values()] == [3, 3]


def test_the_twin_of_transformers_shares_the_weights_and_agrees(model: LlamaForCausalLM) -> None:
    twin = transformers_twin(model)
    ours = model.model.layers[0].mlp.up_proj.weight
    assert twin.model.layers[0].mlp.up_proj.weight.data_ptr() == ours.data_ptr()
    input_ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids).logits, model(input_ids).logits)


def test_a_comparison_has_figures_of_every_contender_and_finds_the_same_tokens(
    model: LlamaForCausalLM,
) -> None:
    found = compare(model, torch.randint(64, (1, 5)), 6, rounds=2, peers=(EAGER, TRANSFORMERS))
    assert [figures.name for figures in found.figures] == [OURS, EAGER, TRANSFORMERS]
    assert all((figures.same_tokens, figures.tokens) == (6, 6) for figures in found.figures)
    record = found.to_dict()
    assert record["parity"] is True
    assert set(record["peers"]) == {EAGER, TRANSFORMERS}
    assert record["floor_ms"] == pytest.approx(1e3 * record["bytes_per_step"] / 1e10)
    assert all(math.isfinite(peer["ratio"]) for peer in record["peers"].values())


def test_a_peer_that_is_not_installed_is_skipped_with_its_reason(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    found = compare(model, torch.randint(64, (1, 5)), 3, rounds=1, peers=(TRANSFORMERS,))
    assert [figures.name for figures in found.figures] == [OURS]
    assert "transformers" in found.skipped[TRANSFORMERS]
