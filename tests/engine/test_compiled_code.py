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
from fastllama.engine import compiled_code
from fastllama.engine.compiled_code import CompiledCode, cache_folder
from fastllama.engine.graphs import StepKey, Steps

pytestmark = pytest.mark.usefixtures("compiled_steps", "fresh_dynamo")
Call = Callable[..., tuple[list[int], int, int]]
PROMPT = torch.tensor([[5, 1, 80, 33, 7]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture
def call(model, tmp_path, monkeypatch) -> Call:
    """Generates as a process does that finds nothing of torch's: new tokens, and what was compiled and what found."""
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path / "ours"))
    calls = iter(range(10))

    def generate(rows: int = 1, torchs: str | None = None) -> tuple[list[int], int, int]:
        torch._dynamo.reset()
        torch.compiler._cache.CacheArtifactManager.clear()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / (torchs or f"torch{next(calls)}")))
        counters.clear()
        model.release()
        tokens = model.generate(PROMPT.repeat(rows, 1), max_new_tokens=6)[0, PROMPT.shape[1] :].tolist()
        return tokens, counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]

    return generate


def bundles() -> list[Path]:
    folder = cache_folder()
    assert folder is not None
    return sorted(file for file in folder.glob("steps/**/*") if file.is_file())


def test_what_was_compiled_is_found_again(call) -> None:
    tokens, compiled, found = call()
    assert (compiled, found, len(bundles())) == (1, 0, 1)
    assert call() == (tokens, 0, 1)
    assert len(bundles()) == 1


def test_a_further_bucket_is_added(call) -> None:
    tokens, _, _ = call()
    assert call(rows=2)[1:] == (1, 0)
    assert len(bundles()) == 2
    assert call() == (tokens, 0, 1)
    assert call(rows=2) == (tokens, 0, 1)
    assert len(bundles()) == 2


def test_a_process_has_one_bundle_of_all_that_it_compiled(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    torch.compiler._cache.CacheArtifactManager.clear()
    sizes = []
    for rows in (1, 2):
        model.generate(PROMPT.repeat(rows, 1), max_new_tokens=4)
        (bundle,) = bundles()
        sizes.append(bundle.stat().st_size)
    assert sizes[1] > 1.5 * sizes[0]


def test_what_torch_has_kept_is_stored_too(call) -> None:
    tokens, _, _ = call(torchs="kept")
    (bundle,) = bundles()
    bundle.unlink()
    assert call(torchs="kept") == (tokens, 0, 1)
    assert call() == (tokens, 0, 1)


def test_a_stream_that_is_closed_early_leaves_its_step(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    stream = model.stream(PROMPT, max_new_tokens=6)
    next(stream)
    next(stream)
    stream.close()
    assert len(bundles()) == 1


def test_a_damaged_bundle_is_said_and_made_again(call, caplog) -> None:
    tokens, _, _ = call()
    (bundle,) = bundles()
    bundle.write_bytes(bundle.read_bytes()[:-100])
    assert call() == (tokens, 1, 0)
    assert f"{bundle} is damaged" in caplog.text
    caplog.clear()
    assert call() == (tokens, 0, 1)
    assert "is damaged" not in caplog.text


@pytest.mark.parametrize("torchs", [None, "kept"])
def test_stored_code_that_does_something_else_is_not_used(torchs, call, monkeypatch, caplog) -> None:
    tokens, _, _ = call(torchs=torchs)
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
    for bundle in bundles() if torchs else ():
        bundle.unlink()  # so that it comes from torch's folder alone
    assert call(torchs=torchs)[0] == tokens
    assert wrong == [StepKey("decode", 1, 1)]
    assert "gives other results than the step it was made of" in caplog.text
    assert not bundles()


def test_a_load_that_stops_halfway_is_checked_all_the_same(call, monkeypatch) -> None:
    tokens, _, _ = call()
    genuine, asked = torch.compiler.load_cache_artifacts, []

    def load(content: bytes) -> None:
        genuine(content)
        raise OSError("no space left on device")

    def agrees(*_) -> bool:
        asked.append(1)
        return True

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    monkeypatch.setattr("fastllama.engine.machine.agrees", agrees)
    assert call() == (tokens, 0, 1)
    assert asked == [1]


def test_a_folder_that_cannot_be_written_to_is_done_without(call, monkeypatch, caplog) -> None:
    tokens, _, _ = call()
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", "/dev/null/fastllama")
    with caplog.at_level(logging.INFO):
        assert call() == (tokens, 1, 0)
    assert "compiled code is not stored" in caplog.text


def test_a_bundle_that_may_only_be_read_is_used(call, monkeypatch) -> None:
    tokens, _, _ = call()

    def utime(*_) -> None:
        raise PermissionError("not the owner")

    monkeypatch.setattr(os, "utime", utime)
    assert call() == (tokens, 0, 1)


def test_without_a_home_folder_nothing_is_stored(call, monkeypatch) -> None:
    tokens, _, _ = call()

    def expanduser(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    assert cache_folder() is None
    assert call() == (tokens, 1, 0)


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
    folders = {CompiledCode(*decides).folder for decides in [(1, "a"), (1, "b"), (2, "a"), ("1", "a")]}
    assert len(folders) == 4


def test_the_oldest_bundles_go_and_what_was_left_half_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled_code, "MOST_BYTES", 200)
    monkeypatch.setattr(compiled_code, "MOST_BUNDLES", 3)
    code = CompiledCode("e")
    other = code.folder.parent / "other"
    for folder, names in ((code.folder, "dcba"), (other, "zyx")):
        folder.mkdir(parents=True)
        for age, name in enumerate(names):
            (folder / f"{name}.bundle").write_bytes(bytes(40))
            os.utime(folder / f"{name}.bundle", (1000 + age, 1000 + age))
    (code.folder / "new.part-1-2").write_bytes(bytes(40))
    (other / "old.part-1-2").write_bytes(bytes(40))
    os.utime(other / "old.part-1-2", (1000, 1000))
    code._remove_old()
    left = [file.name for file in bundles()]
    assert sorted(left) == ["a.bundle", "b.bundle", "c.bundle", "new.part-1-2", "x.bundle", "y.bundle"]
