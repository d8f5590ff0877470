"""Bytes per step, bandwidth and timing of decodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, StaticCache
from fastllama.measure import (
    Decode,
    Stopwatch,
    kv_cache_bytes,
    memory_bandwidth,
    parameter_count,
    quantiles,
    weight_bytes_per_step,
)

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_a_step_reads_every_weight_but_only_one_row_of_the_embedding_for_each_sequence() -> None:
    model = LlamaForCausalLM(TINY)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(model) == whole
    assert weight_bytes_per_step(model) == 4 * (whole - 64 * 32 + 32)
    assert weight_bytes_per_step(model.bfloat16(), batch=3) == 2 * (whole - 64 * 32 + 3 * 32)


def test_a_tied_embedding_is_read_whole_and_counted_once() -> None:
    model = LlamaForCausalLM(replace(TINY, tie_word_embeddings=True))
    untied = LlamaForCausalLM(TINY)
    assert parameter_count(model) == parameter_count(untied) - 64 * 32
    assert weight_bytes_per_step(model) == 4 * parameter_count(model)


def test_sizes_are_the_same_for_a_model_without_memory() -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(TINY)
    assert weight_bytes_per_step(skeleton) == weight_bytes_per_step(LlamaForCausalLM(TINY))


def test_kv_cache_bytes_are_those_of_the_static_cache() -> None:
    cache = StaticCache(TINY, 3, 20, torch.device("cpu"), torch.bfloat16)
    assert kv_cache_bytes(TINY, tokens=20, batch=3, itemsize=2) == cache.nbytes


def test_memory_bandwidth_is_that_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.measure.READ_BYTES", 1 << 25)
    assert 1e8 < memory_bandwidth("cpu").bytes_per_second < 1e14


@pytest.mark.gpu
def test_memory_bandwidth_of_a_gpu_is_that_of_a_gpu() -> None:
    assert 1e10 < memory_bandwidth("cuda").bytes_per_second < 1e14


def test_a_stopwatch_passes_tokens_on_and_keeps_when_they_came() -> None:
    watch = Stopwatch(torch.tensor([token]) for token in (5, 6, 7))
    assert list(watch) == [5, 6, 7]
    assert watch.decode.tokens == (5, 6, 7)
    assert len(watch.decode.tpot) == 2
    assert min(watch.decode.ttft, *watch.decode.tpot) >= 0


def test_a_stopwatch_knows_what_came_before_an_interruption() -> None:
    watch = Stopwatch(torch.tensor([token]) for token in (5, 6, 7))
    assert next(iter(watch)) == 5
    assert watch.decode.tokens == (5,)
    assert Stopwatch([]).decode == Decode((), 0.0, ())


def test_quantiles_interpolate() -> None:
    found = quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.p20, found.p50, found.p80) == pytest.approx((2.0, 3.5, 5.0))
    assert quantiles([]).p50 == 0
