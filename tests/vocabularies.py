"""Small vocabularies of every kind, and folders that hold them, for the tests of tokenizers."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, this is a test of it's and isn't and we've and you're.",
    "def f(x):\n\treturn x + 1  # two  spaces",
    "日本語のテキストです。",
    "Привет, как дела?",
    "Grüße aus Köln, e\u0301tude",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "한국어 문장",
    "   leading and   inner spaces ",
) * 3
FRAGMENTS = (
    *(
        "Hello",
        " world",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        ".",
        " .",
        " it's",
        "123",
        "a  b",
        "\x00",
        "\u200b",
    ),
    *(
        "日本語",
        "漢",
        "тест",
        "é",
        "e\u0301",
        "ก็",
        "नमस्ते",
        "مرحبا",
        "ﬁ",
        "İ",
        "\u00a0",
        "😀",
        "👩‍👩‍👧",
        "\ufffd",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<mask>",
        "<tool>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<",
        "s>",
        "<0x41>",
    ),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
PIECES = 480

fuzz = settings(max_examples=60, deadline=None, database=None, derandomize=True)


# Vocabularies and folders


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """A small sentencepiece model as Llama's are: BPE, byte fallback, all spaces kept."""
    defaults = {
        "model_type": "bpe",
        "vocab_size": PIECES,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(defaults | options))
    return model.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@functools.cache
def llama_2_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of the sentencepiece model, as transformers takes them out."""
    own = processor(sentencepiece_model())
    vocab = {own.id_to_piece(i): i for i in range(PIECES)}
    return vocab, generate_merges(vocab, {own.id_to_piece(i): own.get_score(i) for i in range(PIECES)})


def llama_2_json(metaspace: bool = False, template: bool = True) -> tokenizers.Tokenizer:
    """tokenizer.json as published for Llama 2, or with the pre-tokenizer of newer conversions."""
    vocab, merges = llama_2_bpe()
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def llama_3_json() -> str:
    """tokenizer.json as Llama 3 has it: byte-level BPE, split by a regex."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(LLAMA_3_SPECIAL))
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    around = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    return tokenizer.to_str()


def written(folder: Path, model: bytes | None = None, json_file: Any = None, **config: Any) -> Path:
    """A folder with a vocabulary and a tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    if json_file is not None:
        text = json_file if isinstance(json_file, str) else json_file.to_str()
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def listed(content: str, **flags: bool) -> dict[str, Any]:
    """A token as ``added_tokens_decoder`` lists it."""
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | usual | flags


LLAMA_2: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_3: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "clean_up_tokenization_spaces": True,
    "model_max_length": 131072,
}
EXTENDED: dict[str, Any] = LLAMA_2 | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<mask>"],
    "added_tokens_decoder": {
        "0": listed("<unk>"),
        "1": listed("<s>"),
        "2": listed("</s>"),
        str(PIECES): listed("<pad>"),
        str(PIECES + 1): listed("<mask>", lstrip=True),
        str(PIECES + 2): listed("<tool>", special=False, rstrip=True),
    },
}
