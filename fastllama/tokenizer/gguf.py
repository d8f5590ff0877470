"""The tokenizer in a GGUF file: its vocabulary as sentencepiece or tokenizers would have it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from fastllama.tokenizer.backend import Backend
from fastllama.tokenizer.json_backend import JsonBackend
from fastllama.tokenizer.sentencepiece_backend import SentencePieceBackend
from fastllama.tokenizer.settings import TokenizerError, TokenizerSettings

if TYPE_CHECKING:
    from fastllama.loading.gguf import Gguf

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # token types, numbered as sentencepiece does
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = "[一-龥\u0800-一가-\ud7ff]+"
#: What cuts a text into words before byte pairs are merged, by ``tokenizer.ggml.pre``: each pattern cuts what the ones
#: before it have left. The names and patterns are those of llama.cpp's src/llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",)
    ),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2"), (GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)
    ),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), (rf"{WORDS}|\p{{N}}|{REST}",)),
    "tekken": (TEKKEN,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # a word in the vocabulary is not merged


def gguf_backend(file: Gguf) -> tuple[Backend, TokenizerSettings]:
    """The vocabulary of a GGUF file, and its settings in the form of Hugging Face's files.

    Raises:
        TokenizerError: the file has none, or one of a kind that is not read.
    """
    kind, tokens = _field(file, "model"), _field(file, "tokens")
    if kind not in ("llama", "gpt2") or not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise TokenizerError(
            f"{file.path} has a tokenizer of the kind {kind!r}; expected 'llama' or 'gpt2', with tokens."
        )
    types = _list(file, "token_type", len(tokens), 1)
    tokens, types = _unique(tokens, types)
    settings = _settings(file, tokens, types, adds_bos=kind == "llama" or _field(file, "pre") in WHOLE_WORDS)
    if kind == "llama":
        scores = _list(file, "scores", len(tokens), 0.0)
        flags = (bool(_field(file, "add_space_prefix", True)), bool(_field(file, "remove_extra_whitespaces", False)))
        model = sentencepiece_model(tokens, scores, types, settings, *flags)
        return SentencePieceBackend(model, str(file.path), settings), settings
    return JsonBackend(_byte_pairs(file, tokens, settings), settings), settings


def _unique(tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    """The tokens, those that are empty or there twice under names of private characters, and unused."""
    tokens, types, taken, seen = list(tokens), list(types), set(tokens), set()
    for i, token in enumerate(tokens):
        if token in seen or not token:
            tokens[i], types[i] = f"\ue000{i}", UNUSED
            while tokens[i] in taken:
                tokens[i] += "\ue000"
        seen.add(tokens[i])
    return tokens, types


def _settings(file: Gguf, tokens: list[str], types: Sequence[int], adds_bos: bool) -> TokenizerSettings:
    added = {
        i: AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    named = {}
    for key, role in ROLES.items():
        token_id = _field(file, f"{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            named[role] = AddedToken(tokens[token_id], special=True, normalized=False)
    config = {
        "add_bos_token": bool(_field(file, "add_bos_token", adds_bos)),
        "add_eos_token": bool(_field(file, "add_eos_token", False)),
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # as llama.cpp, which puts the prefix space behind special tokens too
    }
    return TokenizerSettings(config, named, [], added, _chat_templates(file))


def _chat_templates(file: Gguf) -> str | dict[str, str] | None:
    default = file.fields.get("tokenizer.chat_template")
    names = file.fields.get("tokenizer.chat_templates") or []
    found = {name: file.fields.get(f"tokenizer.chat_template.{name}") for name in names if isinstance(name, str)}
    templates = {name: template for name, template in found.items() if isinstance(template, str)}
    if not templates:
        return default if isinstance(default, str) else None
    return templates | ({"default": default} if isinstance(default, str) else {})


def _byte_pairs(file: Gguf, tokens: list[str], settings: TokenizerSettings) -> tokenizers.Tokenizer:
    name = _field(file, "pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            f"{file.path} cuts words by the rules {name!r}; known are {known}. "
            "Use the tokenizer.json of the same model."
        )
    merges = [tuple(merge.split(" ")) for merge in _field(file, "merges", []) if isinstance(merge, str)]
    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS)  # pyright: ignore
        tokenizer = tokenizers.Tokenizer(model)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{file.path} has merges that its tokens do not fit ({error}); fetch it again.") from error
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer


def sentencepiece_model(
    tokens: list[str],
    scores: Sequence[float],
    types: Sequence[int],
    settings: TokenizerSettings,
    adds_prefix: bool,
    drops_spaces: bool,
) -> bytes:
    """A tokenizer.model, which is a protobuf message, with this vocabulary.

    Source: sentencepiece's src/sentencepiece_model.proto.
    """
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    roles = {"unk_token": 40, "bos_token": 41, "eos_token": 42, "pad_token": 43}
    trainer = _number(3, 2) + _number(35, 1)  # byte pairs, with byte tokens for what they lack
    for role, field in roles.items():
        token = settings.named.get(role)
        trainer += _number(field, -1 if token is None else ids[token.content])
    normalizer = _message(1, b"identity") + _number(3, adds_prefix) + _number(4, drops_spaces) + _number(5, True)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _field(file: Gguf, name: str, default: Any = None) -> Any:
    return file.fields.get(f"tokenizer.ggml.{name}", default)


def _list(file: Gguf, name: str, count: int, default: float) -> list[Any]:
    """One number for each token."""
    values = _field(file, name, [default] * count)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, (int, float)) for v in values):
        raise TokenizerError(f"{file.path} has no {name} for each of its {count} tokens; fetch it again.")
    return values
