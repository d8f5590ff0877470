"""A real model, SmolLM2-135M-Instruct as GGUF in Q4_1: what it says, against transformers in float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.quantization.linear import packed_modules
from fastllama.quantization.quality import quality, windows
from fastllama_benchmarks.quality import held_out_text

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
NOT_REACHED = 3  # tools/real_model.py
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,", "1, 2, 3, 4,")


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file."""
    command = [sys.executable, str(ROOT / "tools" / "real_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NOT_REACHED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def model(file: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(file, dtype="float32", quantize="none")


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Any:
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def greedy(model: Any, input_ids: torch.Tensor, new: int, **options: Any) -> list[list[int]]:
    made = model.generate(input_ids, max_new_tokens=new, do_sample=False, **options)
    return made[:, input_ids.shape[1] :].tolist()


def test_logits_and_greedy_tokens_are_those_of_transformers(model, tokenizer, theirs):
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            got, want = model(ids).logits, theirs(ids).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert greedy(model, ids, 48, eos_token_id=None) == greedy(theirs, ids, 48, eos_token_id=None)


@pytest.mark.parametrize(("quantize", "cost"), [(None, 0.01), ("int8", 0.01), ("int4", 0.04)])
def test_codes_and_activations_in_8_bits_stay_within_their_gates(model, tokenizer, file, quantize, cost):
    ids = tokenizer.encode(held_out_text(docstrings=True), add_special_tokens=False)[:2048]
    read = list(windows(ids, 512, tokenizer.bos_token_id))
    kept = LlamaForCausalLM.from_pretrained(file, dtype="float32", quantize=quantize)
    assert packed_modules(kept)
    found, plain = quality(kept, model, read), quality(model, model, read)
    assert found.perplexity <= (1 + cost) * plain.perplexity
    assert found.agreement > 0.9


def test_a_converted_folder_gives_the_same_tokens(model, tokenizer, tmp_path):
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    expected = greedy(model, ids, 32)
    assert greedy(LlamaForCausalLM.from_pretrained(tmp_path), ids, 32) == expected
    assert greedy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids, 32) == expected


def test_ids_are_those_of_transformers(tokenizer, file):
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (*TEXTS, "Grüße 日本語 😀", "  two  spaces\n\nand\ttabs", "3.14159 and 1000000"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_a_chat_knows_paris_and_stops_at_the_end_of_the_turn(model, tokenizer):
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    (new,) = greedy(model, ids, 100)
    assert len(new) < 100
    assert tokenizer.convert_ids_to_tokens(new[-1]) == "<|im_end|>"
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert "Paris" in text
    assert "<|" not in text
    assert "<|im_start|>user" in tokenizer.decode(ids[0])


def test_rows_of_a_left_padded_batch_are_those_of_each_alone(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(TEXTS), padding=True, padding_side="left", return_tensors="pt")
    together = greedy(model, batch.input_ids, 24, attention_mask=batch.attention_mask, eos_token_id=None)
    alone = [greedy(model, tokenizer(text, return_tensors="pt").input_ids, 24, eos_token_id=None)[0] for text in TEXTS]
    assert together == alone


def test_streamed_text_is_the_text(model, tokenizer):
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    stream = tokenizer.detokenizer()
    pieces = [stream.put(token) for token in model.stream(ids, max_new_tokens=60, do_sample=False)]
    streamed = "".join([*pieces, stream.end()])
    assert streamed == tokenizer.decode(greedy(model, ids, 60)[0], skip_special_tokens=True)
    assert sum(map(bool, pieces)) > 3


@pytest.mark.parametrize("length", [600, 2100, 8100])
def test_long_prompts_are_continued_as_in_transformers(model, theirs, tokenizer, length):
    text = (ROOT / "docs" / "kernels.md").read_text() + (ROOT / "docs" / "how-it-works.md").read_text()
    ids = torch.tensor([(tokenizer.encode(text) * 4)[:length]])
    new = 8 if length < 8000 else 2
    assert greedy(model, ids, new, eos_token_id=None) == greedy(theirs, ids, new, eos_token_id=None)
