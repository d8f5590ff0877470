"""Who holds an engine, who waits for it, and what becomes of iterators that nobody goes on with."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.engine import callers

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_call_that_waits_says_what_for_and_goes_on(model, monkeypatch, caplog) -> None:
    monkeypatch.setattr(callers, "PATIENCE_S", 0.01)
    expected = model.generate(IDS, max_new_tokens=4).tolist()
    stream = model.stream(IDS, max_new_tokens=4)
    next(stream)
    said, got = threading.Event(), []
    monkeypatch.setattr(callers.logger, "filter", lambda record: said.set() or True)
    waiting = threading.Thread(target=lambda: got.append(model.generate(IDS, max_new_tokens=4).tolist()))
    with caplog.at_level(logging.WARNING, "fastllama"):
        waiting.start()
        assert said.wait(60)
    assert not got
    stream.close()
    waiting.join(60)
    assert got == [expected]
    assert "a call waits for the model, which thread 'MainThread' has held for" in caplog.text


def test_who_does_not_wait_long_says_nothing(model, caplog) -> None:
    threads = [threading.Thread(target=model.generate, args=(IDS,), kwargs={"max_new_tokens": 2}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "waits" not in caplog.text
    assert threading.active_count() < 20, "no timer is left"


@pytest.mark.parametrize("begun", [False, True])
def test_an_iterator_that_is_dropped_lets_others_in(model, begun) -> None:
    stream = model.stream(IDS, max_new_tokens=20)
    if begun:
        next(stream)
    del stream
    gc.collect()
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)


def test_an_iterator_that_another_thread_has_dropped_lets_others_in(model) -> None:
    def begin() -> None:
        next(model.stream(IDS, max_new_tokens=20))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(60)
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)


def test_a_streamer_that_raises_leaves_the_engine_usable(model) -> None:
    class Broken:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise OSError("the terminal is gone")

        def end(self) -> None: ...

    with pytest.raises(OSError, match="the terminal is gone"):
        model.generate(IDS, max_new_tokens=4, streamer=Broken())
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)
