"""Tokenizers of GGUF files against the files of the same vocabulary that they are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from vocabularies import (
    CORPUS,
    LLAMA_3,
    LLAMA_3_SPECIAL,
    PIECES,
    TEXTS,
    fuzz,
    llama_3_json,
    sentencepiece_model,
    written,
)

from fastllama.loading.gguf import Gguf
from fastllama.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from fastllama.tokenizer.gguf import PRE_TOKENIZERS, gguf_backend


def of(**fields: Any) -> Tokenizer:
    """The tokenizer of a file with these fields of ``tokenizer.ggml``."""
    full = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if name != "templates"}
    return Tokenizer(*gguf_backend(Gguf(Path("model.gguf"), full | fields.get("templates", {}), {})))


def byte_pairs(**changes: Any) -> dict[str, Any]:
    content = json.loads(llama_3_json())
    vocabulary = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["model"]["merges"]]
    types = [3 if token in LLAMA_3_SPECIAL else 1 for token in tokens]
    ids = {"bos_token_id": tokens.index("<|begin_of_text|>"), "eos_token_id": tokens.index("<|eot_id|>")}
    return {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "merges": merges,
        "token_type": types,
        **ids,
    } | changes


def pieces(**changes: Any) -> dict[str, Any]:
    own = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())

    def kind(i: int) -> int:
        return 2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 1

    everything = range(PIECES)
    fields = {
        "model": "llama",
        "tokens": [own.id_to_piece(i) for i in everything],
        "scores": [own.get_score(i) for i in everything],
        "token_type": [kind(i) for i in everything],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return fields | changes


@pytest.fixture(scope="module", params=["pieces", "byte pairs"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a GGUF file, and that of the file that its vocabulary is from."""
    folder = tmp_path_factory.mktemp("file")
    if request.param == "pieces":
        return of(**pieces()), load_tokenizer(written(folder, model=sentencepiece_model(), legacy=True))
    return of(**byte_pairs()), load_tokenizer(written(folder, json_file=llama_3_json(), **LLAMA_3))


@fuzz
@given(text=TEXTS)
def test_ids_and_text_are_those_of_the_file_that_the_vocabulary_is_from(both: Any, text: str) -> None:
    ours, file = both
    assert ours.encode(text) == file.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == file.decode(file.encode(text), True)


def test_tokens_that_are_empty_or_there_twice_leave_the_others_as_they_are() -> None:
    fields = pieces()
    usual, tokens = of(**fields), list(fields["tokens"])
    tokens[300], tokens[301], tokens[302] = tokens[299], "", "\ue000301"
    changed = of(**fields | {"tokens": tokens})
    text = "Hello world, this is a test"
    ids = usual.encode(text)
    assert not {300, 301, 302} & set(ids)
    assert changed.encode(text) == ids


def test_roles_flags_and_templates_are_read() -> None:
    templates = {
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "T",
    }
    ours = of(**byte_pairs(add_bos_token=False, add_eos_token=True, padding_token_id=2**32 - 1), templates=templates)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|begin_of_text|>", "<|eot_id|>", None)
    assert ours.encode("a")[-1] == ours.eos_token_id
    messages = [{"role": "user", "content": "Hey"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "Hey"
    assert ours.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "T"
    assert of(**pieces(add_bos_token=False)).encode("a")[0] != 1


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_cut_words_keeps_the_text(pre: str) -> None:
    ours = of(**byte_pairs(pre=pre))
    for text in (*CORPUS, "1234567 12 \r\n\r\n  x=+1;", "don't DON'T"):
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_words_are_cut_as_in_the_files_of_the_models(tmp_path: Path) -> None:
    """SmolLM and GPT-2 write their rules with other building blocks of the tokenizers library."""
    content = json.loads(llama_3_json())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for pre, steps in (("gpt-2", [level]), ("smollm", [digits, level])):
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        content["model"]["ignore_merges"] = False
        file = tokenizers.Tokenizer.from_str(json.dumps(content))
        ours = of(**byte_pairs(pre=pre))
        for text in (*CORPUS, "1234567 12 \r\n\r\n  x=+1;", "don't DON'T"):
            assert ours.encode(text, add_special_tokens=False) == file.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "the kind 'bert'; expected 'llama' or 'gpt2'"),
        (byte_pairs(pre="viking"), "by the rules 'viking'; known are"),
        (byte_pairs(merges=["no such"]), "merges that its tokens do not fit"),
        (byte_pairs(token_type=[1]), "no token_type for each of its"),
        (pieces(scores="x"), "no scores for each of its"),
        (pieces(tokens=[1, 2]), "the kind 'llama'"),
    ],
    ids=["kind", "rules", "merges", "types", "scores", "tokens"],
)
def test_a_vocabulary_that_cannot_be_read_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        of(**fields)
