"""Compiled steps are stored, found again, and compared with what they were made of before they are used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shapes import SHAPE
from torch._dynamo.utils import counters

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.engine.compiled_code import CompiledCode, agrees, cache_folder
from fastllama.engine.graphs import StepKey, Steps
from fastllama.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("compiled_steps", "fresh_dynamo")
PROMPT = torch.tensor([[5, 1, 80, 33, 7]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture
def call(model, tmp_path, monkeypatch) -> Callable[[], tuple[list[int], int, int]]:
    """Generates as a process does that finds nothing of torch's: new tokens, and what was compiled and what found."""
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path / "ours"))
    calls = iter(range(10))

    def generate() -> tuple[list[int], int, int]:
        torch._dynamo.reset()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"torch{next(calls)}"))
        counters.clear()
        model.release()
        tokens = model.generate(PROMPT, max_new_tokens=6)[0, PROMPT.shape[1] :].tolist()
        return tokens, counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]

    return generate


def bundles() -> list[Path]:
    return sorted(cache_folder().glob("steps/*"))


def test_what_was_compiled_is_found_again(call) -> None:
    tokens, compiled, found = call()
    assert (compiled, found, len(bundles())) == (1, 0, 1)
    assert call() == (tokens, 0, 1)


def test_a_damaged_bundle_is_said_and_made_again(call, caplog) -> None:
    tokens, _, _ = call()
    (bundle,) = bundles()
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[:-100])
    assert call() == (tokens, 1, 0)
    assert f"{bundle} is damaged" in caplog.text
    assert len(bundle.read_bytes()) > len(whole) - 100
    assert call() == (tokens, 0, 1)


def test_code_that_does_something_else_is_not_used(call, monkeypatch, caplog) -> None:
    tokens, _, _ = call()
    genuine, wrong = Steps.bound, []

    def bound(self: Steps, key: StepKey, step, net, rows, *rest):
        run = genuine(self, key, step, net, rows, *rest)
        if wrong:
            return run
        wrong.append(key)

        def other() -> None:
            run()
            rows.ids_b1.add_(1).remainder_(SHAPE["vocab_size"])

        return other

    monkeypatch.setattr(Steps, "bound", bound)
    assert call()[0] == tokens
    assert wrong == [StepKey("decode", 1, 1)]
    assert "gives other logits than the step it was made of" in caplog.text
    assert not bundles()


def test_a_folder_that_cannot_be_written_to_is_done_without(call, monkeypatch, caplog) -> None:
    tokens, _, _ = call()
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", "/dev/null/fastllama")
    with caplog.at_level(logging.INFO):
        assert call() == (tokens, 1, 0)
    assert "compiled code is not stored" in caplog.text


def test_what_torch_cannot_take_over_is_compiled(call, monkeypatch, caplog) -> None:
    tokens, _, _ = call()

    def full(content: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", full)
    with caplog.at_level(logging.INFO):
        assert call() == (tokens, 1, 0)
    assert "is not used: no space left on device" in caplog.text


def test_a_disk_that_is_full_leaves_no_part_of_a_file(call, monkeypatch) -> None:
    genuine = Path.write_bytes

    def write_bytes(self: Path, content: bytes) -> int:
        genuine(self, content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    call()
    assert not bundles()


def test_engines_that_differ_have_bundles_of_their_own() -> None:
    files = {CompiledCode(*decides)._file for decides in [(1, "a"), (1, "b"), (2, "a"), ("1", "a")]}
    assert len(files) == 4


def test_the_oldest_bundles_go(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fastllama.engine.compiled_code.MOST_BYTES", 100)
    (tmp_path / "steps").mkdir()
    for age, name in enumerate("dcba"):
        (tmp_path / "steps" / f"{name}.bundle").write_bytes(bytes(40))
        os.utime(tmp_path / "steps" / f"{name}.bundle", (1000 + age, 1000 + age))
    CompiledCode("e")._remove_old()
    assert [file.name for file in bundles()] == ["a.bundle", "b.bundle"]


def interrupted() -> None:
    raise KeyboardInterrupt


STEPS = [("decode", 1), ("decode_processed", 1), ("draft", 4), ("verify", 1), ("verify", 4), ("prefill", 8)]


@pytest.mark.parametrize(("kind", "tokens"), STEPS)
def test_a_step_is_compared_with_the_network(model, kind, tokens, monkeypatch) -> None:
    monkeypatch.setattr(Steps, "_compile", lambda self, step: (step, step))  # as it is written
    monkeypatch.setattr(Steps, "bound", lambda self, key, step, *args: lambda: step(*args))
    runner, key = Runner(model), StepKey(kind, 2, tokens)
    with runner.session():
        runner.reserve(2, 64)
        buffers = runner._ready
        buffers.rows(2).ids_b1.copy_(torch.tensor([[3], [9]]))
        buffers.rows(2).position_b1.copy_(torch.tensor([[20], [31]]))
        for cache in (*buffers.memory.k_caches, *buffers.memory.v_caches):
            cache.normal_()
        step = runner._compiled(*key)
        everything = [*buffers.rows(2).tensors, *buffers.memory.k_caches, *buffers.memory.v_caches]
        before = [x.clone() for x in everything]
        assert agrees(runner._net, buffers, key, step)
        assert all(torch.equal(x, y) for x, y in zip(everything, before, strict=True))
        with pytest.raises(KeyboardInterrupt):
            agrees(runner._net, buffers, key, interrupted)
        assert all(torch.equal(x, y) for x, y in zip(everything, before, strict=True))

        def forgets_a_layer() -> None:
            kept = buffers.memory.v_caches[1].clone()
            step()
            buffers.memory.v_caches[1].copy_(kept)

        buffers.memory.v_caches[1].zero_()
        assert not agrees(runner._net, buffers, key, forgets_a_layer)
        assert not agrees(runner._net, buffers, key, lambda: None)
        if kind == "verify":
            assert not agrees(runner._net, buffers, key, lambda: (step(), buffers.logits(2, tokens).mul_(1.1)))
        assert all(torch.equal(x, y) for x, y in zip(buffers.rows(2).tensors, before, strict=False))
