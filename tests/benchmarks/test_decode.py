"""fastllama and its peers on the same weights: figures, the gate, disturbances and the grid."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.measure import Bandwidth
from fastllama_benchmarks import contenders
from fastllama_benchmarks import decode as decoding
from fastllama_benchmarks.contenders import EAGER, STATIC, TRANSFORMERS, Task, make, title_of
from fastllama_benchmarks.contenders.fastllama import Eager
from fastllama_benchmarks.decode import compare, disturbances, figures, workload_of
from fastllama_benchmarks.environment import bandwidth
from fastllama_benchmarks.records import new_record
from fastllama_benchmarks.workload import Decode, Unavailable, Workload

DESCRIBED = {"model": "m", "dtype": "float32", "device": "cpu"}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tiny: LlamaConfig, memory: type) -> LlamaForCausalLM:
    """A tiny model whose engine is played by the eager forward."""

    def stream(
        self: LlamaForCausalLM, input_ids: torch.Tensor, mask: torch.Tensor, **settings: Any
    ) -> Iterator[torch.Tensor]:
        assert settings["eos_token_id"] == ()
        assert mask.all()
        return eager(self).steps(input_ids, settings["max_new_tokens"])

    monkeypatch.setattr(LlamaForCausalLM, "stream", stream)
    return LlamaForCausalLM(tiny).eval()


def eager(model: LlamaForCausalLM) -> Eager:
    opened = Eager()
    opened.load(Task("", "float32", lent=model))
    return opened


@pytest.mark.parametrize("batch", [1, 3])
def test_a_comparison_has_checked_figures_of_every_contender(model: LlamaForCausalLM, batch: int) -> None:
    workload = Workload.random(64, batch, 5, 6)
    record = new_record("decode", DESCRIBED | compare(model, workload, rounds=2, peers=(EAGER, TRANSFORMERS)), {})
    assert record["name"] == "fastllama"
    assert list(record["peers"]) == [title_of(EAGER), TRANSFORMERS]
    assert all(each["parity"] and each["same_tokens"] == 6 for each in (record, *record["peers"].values()))
    assert record["floor_ms"] == pytest.approx(1e3 * record["bytes_per_step"] / 1e10)
    assert record["mbu"] == pytest.approx(record["bytes_per_step"] / record["tpot_ms"]["p50"] * 1e3 / 1e10)
    assert record["prompt_tokens_per_second"] == pytest.approx(5e3 * batch / record["ttft_ms"])
    assert all(peer["ratio"] > 0 for peer in record["peers"].values())


@pytest.mark.slow
def test_the_static_cache_of_transformers_gives_the_same_tokens(model: LlamaForCausalLM) -> None:
    workload, peer = Workload.random(64, 2, 5, 6), make(STATIC)
    peer.load(Task("", "float32", lent=model))
    assert [peer.run(workload).tokens for _ in range(2)] == [eager(model).run(workload).tokens] * 2


def test_a_peer_that_is_missing_or_breaks_is_one_line_and_never_dropped(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastllama_benchmarks.contenders.transformers", None)
    monkeypatch.setattr(Eager, "run", lambda self, workload: 1 / 0)
    found = compare(model, Workload.random(64, 1, 5, 3), rounds=1, peers=contenders.NAMES)["peers"]
    assert set(found) == {title_of(EAGER), *contenders.NAMES} - {EAGER}
    missing = {name: peer["unavailable"] for name, peer in found.items()}
    assert missing[title_of(EAGER)] == "ZeroDivisionError: division by zero"
    assert "fastllama[bench]" in missing[TRANSFORMERS]
    assert "--gpt-fast" in missing["gpt-fast"]
    assert all("\n" not in why for why in missing.values())


def test_wrong_tokens_of_the_engine_fail_the_gate(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LlamaForCausalLM, "stream", lambda self, ids, mask, **settings: (torch.tensor([9]) for _ in range(6))
    )
    found = compare(model, Workload.random(64, 1, 5, 6), rounds=1, peers=(EAGER,))
    assert found["parity"] is False
    assert found["peers"][title_of(EAGER)]["parity"] is True


def test_a_capacity_is_made_room_for(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[int, int]] = set()
    monkeypatch.setattr("fastllama.engine.runner.Runner.reserve", lambda self, rows, slots: asked.add((rows, slots)))
    compare(model, Workload.random(64, 2, 5, 3, capacity=99), rounds=1)
    assert asked == {(2, 99)}


def test_figures_follow_from_times_and_bytes() -> None:
    workload, bound = Workload(((1, 2),) * 2, 3), {"bytes_per_step": 10**9, "memory_bandwidth_gb_s": 40.0}
    runs = [Decode(((1, 2, 3), (4, 5, 6)), 0.5, (0.1, 0.1)), Decode(None, 0.7, (0.1, 0.1))]
    found = figures(runs, workload, bound)
    assert (found["ttft_ms"], found["tokens_per_second"]) == pytest.approx((600, 20))
    assert (found["bandwidth_gb_s"], found["mbu"]) == pytest.approx((10, 0.25))
    alone = figures([Decode(None, 0.5, ())], workload, bound)
    assert (alone["tpot_ms"], alone["tokens_per_second"], alone["mbu"]) == (None, 0.0, 0.0)


@pytest.mark.parametrize(
    ("readings", "mbu", "in_cache", "said"),
    [
        ([30.0, 32.0, 34.0], 0.9, False, ""),
        ([24.7, 32.8], 0.9, False, "the memory bandwidth was between 24.7 and 32.8 GB/s within the run"),
        ([30.0], 1.02, False, "fastllama reached 102 % of the memory bandwidth: something slowed the readings"),
        ([30.0], 1.3, True, "fastllama reached 130 % of the memory bandwidth: a step's bytes fit"),
    ],
)
def test_a_run_that_was_disturbed_says_so(readings, mbu, in_cache, said) -> None:
    probe = SimpleNamespace(best=Bandwidth(3e10, "read"), readings=[1e9 * reading for reading in readings])
    found = {"name": "fastllama", "mbu": mbu, "peers": {"x": {}}} | bandwidth(probe)
    assert [line[: len(said)] for line in disturbances(found, in_cache)] == [said] * bool(said)


def test_a_point_that_does_not_fit_is_refused(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"64 \+ 16 tokens do not fit 32 slots"):
        workload_of(model, 1, 64, 16, 32)
    monkeypatch.setattr(decoding, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="the KV cache takes"):
        workload_of(model, 1, 64, 16, None)


def test_transformers_does_not_take_codes(tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    quantized = LlamaForCausalLM.from_pretrained(tmp_path, quantize="int8")
    contender, task = make(TRANSFORMERS), Task("m", "float32", lent=quantized)
    with pytest.raises(Unavailable, match="no matrices of fastllama's codes"):
        contender.load(task)
