"""Damaged folders and files: each ends in a load or in one clear error, never in a crash, a hang or much memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, load_tokenizer
from fastllama.loading.gguf_writer import write_gguf
from fastllama.loading.names import resolve_path

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
QUICK, ALL = 200, 1000
SECONDS, BYTES = 30, 400 * 2**20
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**40, -(10**40), 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "x", "llama", "\ud800", [], [1], [[]], {}, {"a": {"b": []}}, [None], ["full_attention"], "9" * 5000,
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in two files with a tokenizer, and a GGUF file."""
    root = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(root / "folder", max_shard_size=20000)
    for file in resolve_path("demo").glob("tokenizer*"):
        shutil.copy(file, root / "folder")
    write_gguf(model, root / "model.gguf")
    return root


def mutated_json(content: Any, draw: random.Random) -> Any:
    """The content with one value, somewhere, that is another one, or a key that is not there or new."""
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(list(content))
        action = draw.random()
        if action < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if action < 0.25:
            return content | {draw.choice(["x", "qk_norm", "text_config", "rope_scaling"]): draw.choice(VALUES)}
        return content | {key: mutated_json(content[key], draw)}
    if isinstance(content, list) and content and draw.random() < 0.5:
        index = draw.randrange(len(content))
        return [*content[:index], mutated_json(content[index], draw), *content[index + 1 :]]
    return draw.choice(VALUES)


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """The content with bytes changed, cut out or put in, most often near the beginning, where the headers are."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(min(len(changed), draw.choice([16, 64, 1000, 10**9])) or 1)
        action = draw.random()
        if action < 0.5:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif action < 0.7:
            changed[at : at + 8] = draw.getrandbits(64).to_bytes(8, "little")
        elif action < 0.8:
            changed[at : at + 8] = (255).to_bytes(1, "little") * 8
        elif action < 0.9:
            del changed[at : at + draw.randrange(1, 100)]
        else:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
    return bytes(changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.1 else changed)


def mutate(folder: Path, draw: random.Random) -> Path:
    """Damage one file; return what is to be loaded."""
    if draw.random() < 0.3:
        file = folder / "model.gguf"
        file.write_bytes(mutated_bytes(file.read_bytes(), draw))
        return file
    file = draw.choice(sorted((folder / "folder").iterdir()))
    if file.suffix == ".json" and draw.random() < 0.7:
        file.write_text(json.dumps(mutated_json(json.loads(file.read_text()), draw)), errors="surrogatepass")
    elif draw.random() < 0.05:
        file.unlink()
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), draw))
    return folder / "folder"


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails a test that takes too long or too much memory."""

    def late(*_: Any) -> None:
        raise AssertionError(f"still not done after {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < BYTES


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[] if n < QUICK else [pytest.mark.slow]) for n in range(ALL)]
)  # fmt: skip
def test_a_damaged_checkpoint_loads_or_is_one_clear_error(seed, originals, tmp_path, bounded):
    shutil.copytree(originals, tmp_path / "copy")
    target = mutate(tmp_path / "copy", random.Random(seed))
    for load in (LlamaForCausalLM.from_pretrained, load_tokenizer):
        try:
            loaded = load(target)
        except (ValueError, NotImplementedError, FileNotFoundError) as caught:
            error = caught
        else:
            error = None
        if error is not None:
            assert 10 < len(str(error)) < 5000
            continue
        if isinstance(loaded, LlamaForCausalLM):
            with torch.no_grad():
                assert loaded(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)
        else:
            loaded.decode(loaded.encode("def f(x): return 1"))
