"""tokenizer.model, through sentencepiece, with the added tokens that sentencepiece does not know."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from fastllama.tokenizer.backend import ids_around
from fastllama.tokenizer.settings import TokenizerError, TokenizerSettings

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space inside a piece


class SentencePieceBackend:
    """A sentencepiece vocabulary; the ids are sentencepiece's, and those of transformers 4's LlamaTokenizer.

    Added tokens are cut out of the text first, the longest at each place. (``normalized`` changes nothing, as
    the text is not rewritten before.) What is left between them gets sentencepiece's prefix space

    - with ``legacy``: in front of each part, so that ``"<s>Hey"`` has the piece ``▁Hey``;
    - without, or where nothing is said, as in transformers 5: only at the very start of the text;
    - with ``add_prefix_space`` false: nowhere. Where that is not said, the model's own flag counts.

    All other spaces stay, while transformers 5 swallows a leading one. BOS is added unless ``add_bos_token``
    is false, EOS if ``add_eos_token`` is true; transformers 5 adds a BOS only if asked. Text is that of
    sentencepiece, with special tokens written out and nothing put between.

    Args:
        model: the content of a tokenizer.model.
        where: its file, for messages.
        settings: the files next to it.

    Raises:
        TokenizerError: it is no sentencepiece model.
    """

    is_llamas = True

    def __init__(self, model: bytes, where: str, settings: TokenizerSettings) -> None:
        self._plain, self._prefixing, has_prefix = load_sentencepiece(model, where)
        prefix_space = settings.config.get("add_prefix_space")
        self._prefix_space: bool = has_prefix if prefix_space is None else prefix_space
        self._legacy = bool(settings.config.get("legacy"))

        plain = self._plain
        pieces = dict(enumerate(map(plain.id_to_piece, range(plain.get_piece_size()))))
        ids = {piece: i for i, piece in pieces.items()}
        named = own_special_tokens(plain) | settings.named
        named = {name: token for name, token in named.items() if settings.config.get(name, "") is not None}
        added = placed_tokens(ids, settings.added, [*named.values(), *settings.extra])
        contents = {i: token.content for i, token in added.items()}

        self._added = {token.content: token for token in added.values()}
        keeps_special = not settings.config.get("split_special_tokens")
        self._pattern = added_token_pattern(token for token in added.values() if keeps_special or not token.special)
        self._tokens = pieces | contents
        self._texts = {i: piece.replace(SPACE, " ") for i, piece in pieces.items()} | contents
        self._ids = ids | {content: i for i, content in contents.items()}
        self._bytes = frozenset(filter(plain.is_byte, pieces))
        self._verbatim = self._bytes.union(added)  # whose first space, if any, is not the prefix

        self.vocab_size = len(pieces)
        self.size = len(self._tokens)
        self.named = {name: token.content for name, token in named.items()}
        textless = [i for i in pieces if plain.is_control(i) or plain.is_unknown(i)]
        self.special_ids = frozenset([*textless, *(i for i, token in added.items() if token.special)])
        self.prefix, self.suffix = ids_around(self, settings, add_bos=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError(
            "where a token lies in a text is known for a tokenizer.json alone; transformers' save_pretrained writes one"
        )

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i in self._tokens]
        text = "".join(
            self._plain.decode(list(run)) if are_bytes else "".join(map(self._texts.__getitem__, run))
            for are_bytes, run in itertools.groupby(known, key=self._bytes.__contains__)
        )
        has_prefix = self._prefix_space and known and known[0] not in self._verbatim
        return text.removeprefix(" ") if has_prefix else text

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokens.get(token_id)

    def reads_as_run(self, token_id: int) -> bool:
        return False

    def _encode(self, text: str) -> list[int]:
        ids = []
        parts = self._pattern.split(text)  # text, added token, text, …, text
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._ids[part])
                continue
            if i > 0 and self._added[parts[i - 1]].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and self._added[parts[i + 1]].lstrip:
                part = part.rstrip()
            if part:
                ids += self._encode_part(part, is_first=i == 0)
        return ids

    def _encode_part(self, part: str, is_first: bool) -> list[int]:
        if self._prefix_space and (is_first or self._legacy):
            return self._prefixing.encode(part)
        if part[0] in (" ", SPACE):  # the prefix stands for this space, which some models would drop
            return self._prefixing.encode(part[1:]) or self._plain.encode(part)
        return self._plain.encode(part)


def load_sentencepiece(model: bytes, where: str) -> tuple[SentencePieceProcessor, SentencePieceProcessor, bool]:
    """The model without and with a prefix space, and whether it asks for one."""

    def with_prefix_space(wanted: bool) -> SentencePieceProcessor:
        # ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3): a protobuf message appended to
        # another one is merged into it.
        return SentencePieceProcessor(model_proto=model + bytes([0x1A, 2, 0x18, wanted]))

    try:
        if not model:
            raise RuntimeError("the file is empty")
        own = SentencePieceProcessor(model_proto=model)
        plain, prefixing = with_prefix_space(False), with_prefix_space(True)
    except RuntimeError as error:
        raise TokenizerError(f"{where} is no sentencepiece model: {what_it_is(model)} ({error}).") from error
    return plain, prefixing, own.encode("a") == prefixing.encode("a")


def what_it_is(model: bytes) -> str:
    """What a tokenizer.model is that sentencepiece does not read, and what to do."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", model):
        return (
            "it is a tiktoken file, as Meta ships with Llama 3; use the tokenizer.json of the same model in "
            "Hugging Face's layout"
        )
    if model.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    return "it is truncated or of another kind; fetch it again"


def own_special_tokens(model: SentencePieceProcessor) -> dict[str, AddedToken]:
    """The special tokens with a role that the model itself declares."""
    ids = {
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
        "pad_token": model.pad_id(),
    }
    return {name: AddedToken(model.id_to_piece(i), special=True) for name, i in ids.items() if i >= 0}


def placed_tokens(
    ids: dict[str, int], added: dict[int, AddedToken], special: Iterable[AddedToken]
) -> dict[int, AddedToken]:
    """All added tokens by id; special ones without one are where the vocabulary has them, or behind it."""
    placed = dict(added)
    contents = {token.content for token in added.values()}
    for token in special:
        if token.content not in contents:
            contents.add(token.content)
            placed[ids.get(token.content, max(len(ids) - 1, *placed, -1) + 1)] = token
    return placed


def added_token_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """A pattern that splits text at added tokens; of several at one place the longest is taken."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    words = [
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in longest_first
    ]
    return re.compile(f"({'|'.join(words) or '(?!)'})")
