"""tokenizer.json, through the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from fastllama.tokenizer.backend import ids_around
from fastllama.tokenizer.settings import TokenizerError, TokenizerSettings

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class JsonBackend:
    """A vocabulary as tokenizer.json writes it, to the letter.

    transformers 4 and ``PreTrainedTokenizerFast`` read the file so too; for a ``LlamaTokenizer``,
    transformers 5 replaces the file's normalizer by its own. Which ids go around a text is said by the file's
    post-processor; for Llama's own classes, and where there is neither a class nor a post-processor, by
    ``add_bos_token`` and ``add_eos_token`` of the config, as in transformers 4.

    Args:
        tokenizer: what the file holds.
        settings: the files next to it; special tokens that the file lacks are added to it.
    """

    is_llamas = False

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_tokens(tokens_to_add(self._tokenizer, settings))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        self.size = self._tokenizer.get_vocab_size()
        self.named = {name: token.content for name, token in settings.named.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder = self._tokenizer.decoder
        self._has_byte_runs = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._tokenizer.encode_special_tokens = bool(settings.config.get("split_special_tokens"))
        kind = settings.config.get("tokenizer_class")
        is_llama = kind in LLAMA_CLASSES and "bos_token" in settings.named
        if is_llama or (kind is None and self._tokenizer.post_processor is None):
            self.prefix, self.suffix = ids_around(self, settings, add_bos=is_llama)
        else:
            self.prefix, self.suffix = self._own_ids_around()

    @classmethod
    def from_file(cls, path: Path, settings: TokenizerSettings) -> JsonBackend:
        """Read a tokenizer.json.

        Raises:
            TokenizerError: the file is broken.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is no whole tokenizer.json ({error}); fetch it again.") from error
        return cls(tokenizer, settings)

    def encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def reads_as_run(self, token_id: int) -> bool:
        # One broken byte turns the whole run of byte tokens into replacement characters.
        return self._has_byte_runs and bool(BYTE_TOKEN.fullmatch(self.id_to_token(token_id) or ""))

    def _own_ids_around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor puts before and after a text."""
        encoding = self._tokenizer.encode("a")
        inside = [i for i, is_put in enumerate(encoding.special_tokens_mask) if not is_put]
        first, last = (inside[0], inside[-1]) if inside else (len(encoding.ids), len(encoding.ids))
        return encoding.ids[:first], encoding.ids[last + 1 :]


def tokens_to_add(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> list[AddedToken]:
    """Return the tokens listed next to tokenizer.json, whose flags count, and the special ones found in neither."""
    listed = [token for _, token in sorted(settings.added.items())]
    present = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *listed)}
    special = (*settings.named.values(), *settings.extra)
    return listed + [token for token in special if token.content not in present]
