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
    expected = demo.generate(ids, tokenizer=theirs, **asked)
    assert demo.generate(ids, tokenizer=ours, **asked).tolist() == expected.tolist()


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
