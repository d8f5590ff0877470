"""fastllama and its peers on the same weights."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.measure import Bandwidth
from fastllama_benchmarks import compare as comparing
from fastllama_benchmarks import peers
from fastllama_benchmarks.compare import Comparison, compare
from fastllama_benchmarks.costs import Compilations
from fastllama_benchmarks.figures import common_prefix, figures
from fastllama_benchmarks.harness import Run, Workload
from fastllama_benchmarks.ours import EAGER, OURS, Eager
from fastllama_benchmarks.parity import Parity
from fastllama_benchmarks.peers.transformers import STATIC, Transformers, transformers_twin
from fastllama_benchmarks.prefill import prefill_fields, prefill_flops
from fastllama_benchmarks.records import new_record
from fastllama_benchmarks.table import decode_table, prefill_table

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.5,
)  # fmt: skip
RIGHT = Parity(True, 0.0, 1.0, 3, 3)


class Probe:
    """A machine that is not measured."""

    best = Bandwidth(1e10, "made up")

    def __init__(self, device: torch.device) -> None:
        pass

    def sample(self) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A tiny model whose engine is played by the eager forward."""

    def stream(
        self: LlamaForCausalLM, input_ids: torch.Tensor, mask: torch.Tensor, **settings: Any
    ) -> Iterator[torch.Tensor]:
        assert settings["eos_token_id"] == ()
        assert mask.all()
        return Eager(self)._steps(input_ids, settings["max_new_tokens"])

    monkeypatch.setattr(LlamaForCausalLM, "stream", stream)
    monkeypatch.setattr(comparing, "BandwidthProbe", Probe)
    return LlamaForCausalLM(CONFIG).eval()


def text_of(report: RenderableType) -> str:
    """What is printed on a terminal of 80 columns."""
    output = io.StringIO()
    Console(file=output, width=80).print(report)
    return output.getvalue()


def test_the_twin_of_transformers_shares_the_weights_and_agrees(model: LlamaForCausalLM) -> None:
    twin = transformers_twin(model)
    ours = model.model.layers[0].mlp.up_proj.weight
    assert twin.model.layers[0].mlp.up_proj.weight.data_ptr() == ours.data_ptr()
    input_ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_comparison_has_checked_figures_of_every_contender(model: LlamaForCausalLM, batch: int) -> None:
    workload = Workload.random(64, batch, 5, 6)
    found = compare(model, workload, rounds=2, peers=("eager", "transformers"))
    assert [each.name for each in found.figures] == [OURS, EAGER, "transformers"]
    assert all(each.parity and each.parity.passed and each.same_tokens == 6 for each in found.figures)
    record = new_record("decode", {"model": "m", "dtype": "float32", "device": "cpu"} | found.to_dict(), {})
    assert record["parity"] is True
    assert record["floor_ms"] == pytest.approx(1e3 * record["bytes_per_step"] / 1e10)
    assert record["mbu"] == pytest.approx(record["bytes_per_step"] / record["tpot_ms"]["p50"] * 1e3 / 1e10)
    assert all(math.isfinite(peer["ratio"]) for peer in record["peers"].values())


@pytest.mark.slow
def test_the_static_cache_of_transformers_gives_the_same_tokens(model: LlamaForCausalLM) -> None:
    workload = Workload.random(64, 2, 5, 6)
    peer = Transformers(model, is_static=True)
    assert [peer.run(workload).tokens for _ in range(2)] == [Eager(model).run(workload).tokens] * 2
    assert peer.name == STATIC


def test_a_peer_that_is_missing_or_breaks_is_one_line_and_never_dropped(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(Eager, "run", lambda self, workload: 1 / 0)
    found = compare(model, Workload.random(64, 1, 5, 3), rounds=1, peers=peers.NAMES)
    assert [each.name for each in found.figures] == [OURS]
    assert set(found.missing) == {EAGER, "transformers", "static", "gpt-fast", "llama.cpp"}
    assert found.missing[EAGER] == "ZeroDivisionError: division by zero"
    assert "fastllama[bench]" in found.missing["transformers"]
    assert "--gpt-fast" in found.missing["gpt-fast"]
    assert all("\n" not in why for why in found.missing.values())
    assert found.to_dict()["peers"]["gpt-fast"] == {"unavailable": found.missing["gpt-fast"]}


def test_wrong_tokens_of_the_engine_fail_the_gate(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LlamaForCausalLM, "stream", lambda self, ids, mask, **settings: (torch.tensor([9]) for _ in range(6))
    )
    found = compare(model, Workload.random(64, 1, 5, 6), rounds=1, peers=("eager",))
    assert found.to_dict()["parity"] is False
    assert found.to_dict()["peers"][EAGER]["parity"] is True
    assert "FAILED" in text_of(decode_table(found))


def test_a_capacity_is_made_room_for(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("fastllama.engine.runner.Engine.reserve", lambda self, rows, slots: asked.append((rows, slots)))
    compare(model, Workload.random(64, 2, 5, 3, capacity=99), rounds=1)
    assert set(asked) == {(2, 99)}


def test_figures_follow_from_times_and_bytes() -> None:
    runs = [Run(((1, 2, 3), (4, 5, 6)), 0.5, (0.1, 0.1)), Run(None, 0.7, (0.1, 0.1))]
    found = figures(
        "x", runs, 3.0, batch=2, bytes_per_step=10**9, bytes_per_second=4e10, parity=RIGHT, reference=(1, 2, 4)
    )
    assert found.ttft_ms.p50 == pytest.approx(600)
    assert found.tokens_per_second == pytest.approx(20)
    assert (found.bandwidth_gb_s, found.mbu) == pytest.approx((10, 0.25))
    assert (found.same_tokens, found.first_run_s) == (2, 3.0)
    alone = figures(
        "x", [Run(None, 0.5, ())], 1.0, batch=1, bytes_per_step=1, bytes_per_second=1, parity=None, reference=()
    )
    assert (alone.tpot_ms, alone.tokens_per_second, alone.same_tokens) == (None, 0.0, None)


def test_common_prefix_counts_up_to_the_first_difference_or_the_shorter_end() -> None:
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def comparison(new_tokens: int = 3) -> Comparison:
    """Of made-up runs: one peer with other tokens, one that tells none, two that did not run."""
    workload = Workload(((1,) * 100,), new_tokens)
    steps = (0.123456, 0.124, 0.1299)[: new_tokens - 1]
    runs = [Run(((1, 2, 3)[:new_tokens],), 0.25, steps)]
    known = {"batch": 1, "bytes_per_step": 2_500_000_000, "bytes_per_second": 2e10, "reference": (1, 2, 3)}
    found = (
        figures(OURS, runs, 12.5, parity=RIGHT, **known),
        figures(STATIC, runs, 60.0, parity=RIGHT, **known | {"reference": (1, 2, 4)}),
        figures("llama.cpp", [Run(None, 0.5, steps)], 1.0, parity=None, **known),
    )
    missing = {"gpt-fast": "give its folder", "transformers": "not installed"}
    return Comparison(
        workload, 2, found, Bandwidth(2e10, "made up"), 2_500_000_000, 3 << 30, Compilations(1, 2), missing
    )


def test_the_table_fits_a_terminal_of_80_columns_and_says_what_the_figures_are_worth() -> None:
    text = text_of(decode_table(comparison()))
    words = " ".join(text.split())
    assert "…" not in text
    assert words.index("floor") < words.index(OURS)
    for expected in (
        "1.00 x", "12.5", "100 %", "2500.0 MB", "1 compilations, 2 graph recordings", "3.2 GB", "parity passed: 3 of 3",
        "other tokens from token 3 of 3 on", "llama.cpp does not tell its tokens", "gpt-fast not run: give its folder",
        "transformers not run: not installed",
    ):  # fmt: skip
        assert expected in words, expected


def test_a_prefill_is_counted_in_prompt_tokens(model: LlamaForCausalLM) -> None:
    found = comparison(new_tokens=1)
    fields = prefill_fields(found, flops=1e12)
    assert fields["tokens_per_second"] == pytest.approx(400)
    assert fields["tflops"] == pytest.approx(4)
    assert fields["peers"]["llama.cpp"]["ratio"] == pytest.approx(2)
    assert fields["peers"]["gpt-fast"] == {"unavailable": "give its folder"}
    assert "2.00 x" in text_of(prefill_table(found, 1e12))
    new_record("prefill", {"model": "m", "dtype": "float32", "device": "cpu"} | fields, {})


def test_prefill_operations_are_those_that_torch_counts(model: LlamaForCausalLM) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    workload = Workload.random(64, 2, 32, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(workload.input_ids(), num_logits_to_keep=1, use_cache=False)
    # torch does not count the CPU's fused attention, we not that a token sees itself, nor leave out the norms' weights
    seen = sum(range(1, 33))
    attention = 2 * 2 * 2 * CONFIG.num_hidden_layers * 32 * seen  # rows, products, multiply and add
    assert prefill_flops(model, workload) == pytest.approx(counter.get_total_flops() + attention, rel=0.02)


def test_peers_are_picked_by_name() -> None:
    assert peers.parse("all") == peers.NAMES
    assert peers.parse("none") == ()
    assert peers.parse("eager, static") == ("eager", "static")
    with pytest.raises(ValueError, match="no peer is called vllm; there are eager"):
        peers.parse("vllm")
