"""Stop strings with tokenizers of ours and of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.generation.stop_strings import StopStrings
from fastllama.loading.names import resolve_path


@pytest.fixture(scope="module")
def demo() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("demo", dtype="float32", progress=False)


@pytest.mark.parametrize("strings", ["\n", ["self.", "):\n    return"], ["(self, "], "zzzz"])
@pytest.mark.parametrize("prompt", ["def read(path):\n    return", "class A:\n    def __init__(self"])
def test_a_row_ends_where_it_ends_with_transformers_tokenizer(demo, strings, prompt) -> None:
    ours = load_tokenizer("demo")
    theirs = transformers.AutoTokenizer.from_pretrained(resolve_path("demo"))
    ids = ours(prompt, return_tensors="pt").input_ids
    asked = {"max_new_tokens": 40, "do_sample": False, "stop_strings": strings}
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_path("demo"), dtype=torch.float32)
    expected = model.generate(ids, tokenizer=theirs, **asked).tolist()
    for tokenizer in (ours, theirs):
        assert demo.generate(ids, tokenizer=tokenizer, **asked).tolist() == expected
        assert demo.generate(ids, tokenizer=tokenizer, speculate="auto", **asked).tolist() == expected
        streamed = torch.stack([*demo.stream(ids, tokenizer=tokenizer, **asked)], dim=1)
        assert streamed[0].tolist() == expected[0][ids.shape[1] :]


def test_rows_end_one_by_one(demo) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["def read(path):", "class A:", "x = 1"], padding=True, padding_side="left", return_tensors="pt")
    asked = {"max_new_tokens": 40, "do_sample": False, "stop_strings": [")", ":\n"], "pad_token_id": 0}
    theirs = transformers.AutoTokenizer.from_pretrained(resolve_path("demo"))
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_path("demo"), dtype=torch.float32)
    expected = model.generate(**batch, tokenizer=theirs, **asked).tolist()
    assert demo.generate(**batch, tokenizer=tokenizer, **asked).tolist() == expected
    assert demo.generate(**batch, tokenizer=tokenizer, num_beams=1, max_time=60.0, **asked).tolist() == expected


def test_without_a_tokenizer_it_is_asked_for(demo) -> None:
    with pytest.raises(ValueError, match="no tokenizer is given; pass tokenizer="):
        demo.generate(torch.tensor([[1]]), stop_strings="x")


class Bytes:
    """A vocabulary of bytes."""

    def decode(self, token_ids) -> str:
        return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "ended"),
    [
        ("a stop", "stop", True),
        ("a stop.", "stop", False),  # it was complete before
        ("aaa", "aa", True),
        ("tab\u00e9", "\u00e9", True),
        ("stop", "sto", False),
        ("", "x", False),
    ],
)
def test_the_newest_token_completes_a_string(text, stop, ended) -> None:
    ids = torch.tensor([list(b"." * 20 + text.encode())])
    assert StopStrings(stop, Bytes())(ids, None).tolist() == [ended]


@pytest.mark.parametrize("strings", ["", [], ["a", ""], [3]])
def test_strings_that_nothing_can_complete_are_named(demo, strings) -> None:
    with pytest.raises(ValueError, match="stop_strings is"):
        demo.generate(torch.tensor([[1]]), stop_strings=strings or [""], tokenizer=load_tokenizer("demo"))


def test_token_healing_names_the_tokenizer_that_it_takes(demo) -> None:
    with pytest.raises(NotImplementedError, match="token_healing takes a tokenizer of transformers"):
        demo.generate(torch.tensor([[1]]), token_healing=True, tokenizer=load_tokenizer("demo"))
