"""Pipelines and streamers of transformers, on an accelerated model and on ours."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
import transformers

from fastllama import LlamaForCausalLM
from fastllama.integrations.transformers import accelerate
from fastllama.loading.names import resolve_path

PROMPT = "def read_config(path):\n"
ASKED = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_path("demo"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(resolve_path("demo"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def accelerated() -> Any:
    model = transformers.LlamaForCausalLM.from_pretrained(resolve_path("demo"), dtype=torch.float32).eval()
    return accelerate(model)


@pytest.fixture(scope="module", params=["accelerated", "ours"])
def fast(request) -> Any:
    if request.param == "ours":
        return LlamaForCausalLM.from_pretrained("demo", dtype="float32", progress=False)
    return request.getfixturevalue("accelerated")


@pytest.fixture(scope="module")
def inputs(tokenizer) -> Any:
    return tokenizer(PROMPT, return_tensors="pt")


@pytest.fixture(scope="module")
def expected(theirs, tokenizer, inputs) -> str:
    """The text that transformers writes after the prompt."""
    out = theirs.generate(**inputs, **ASKED)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_text_generation_pipeline_writes_what_it_writes_with_transformers(theirs, accelerated, tokenizer) -> None:
    texts = [PROMPT, "import os\n"]
    asked = {"batch_size": 2, "return_full_text": False, **ASKED}
    results = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, **asked)
        for model in (theirs, accelerated)
    ]
    assert results[1] == results[0]
    assert accelerated.fastllama.engine.cache is not None


def test_a_text_streamer_prints_the_same_text(fast, tokenizer, inputs, expected, capsys) -> None:
    fast.generate(**inputs, **ASKED, streamer=transformers.TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected + "\n"


def test_a_text_iterator_streamer_gives_the_text_to_another_thread(fast, tokenizer, inputs, expected) -> None:
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    decoding = threading.Thread(target=fast.generate, kwargs={**inputs, **ASKED, "streamer": streamer})
    decoding.start()
    pieces = list(streamer)
    decoding.join()
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1


def test_an_async_text_iterator_streamer_gives_the_text_to_an_event_loop(fast, tokenizer, inputs, expected) -> None:
    async def read() -> str:
        streamer = transformers.AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
        decoding = asyncio.to_thread(fast.generate, **inputs, **ASKED, streamer=streamer)
        _, pieces = await asyncio.gather(decoding, collect(streamer))
        return "".join(pieces)

    async def collect(streamer: Any) -> list[str]:
        return [piece async for piece in streamer]

    assert asyncio.run(read()) == expected
