"""The public class: texts to padded, truncated ids and tensors, ids to text, conversations to prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastllama.tokenizer.backend import Backend
from fastllama.tokenizer.rows import as_tensor, checked_side, checked_texts, padded
from fastllama.tokenizer.settings import TokenizerError, TokenizerSettings, read_settings
from fastllama.tokenizer.streaming import IncrementalDetokenizer

if TYPE_CHECKING:
    import torch

    from fastllama.tokenizer.chat import Messages, Spans

UNLIMITED = 10**20  # a model_max_length from here on means that none is known
PADDINGS = (False, True, "longest", "max_length", "do_not_pad")
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Reads tokenizer.json if there is one, or else tokenizer.model, and the JSON files next to it. An adapter without
    either has its base model's.

    Args:
        name: a folder, a ``.gguf`` file, a hub id, ``"demo"``, or ``"random:SHAPE"`` (which uses the demo tokenizer).

    Raises:
        TokenizerError: there is no tokenizer, or one that cannot be read.
    """
    from fastllama.loading.adapter import base_of, is_adapter
    from fastllama.loading.names import DEMO, is_random, resolve_path  # not at import: they bring torch

    path = resolve_path(DEMO if is_random(name) else name)
    if path.is_file():
        from fastllama.loading.gguf import read_gguf
        from fastllama.tokenizer.gguf import gguf_backend

        return Tokenizer(*gguf_backend(read_gguf(path)))
    has_one = any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    if not has_one and is_adapter(path):
        return load_tokenizer(base_of(path))
    settings = read_settings(path)
    if (path / "tokenizer.json").is_file():
        from fastllama.tokenizer.json_backend import JsonBackend

        return Tokenizer(JsonBackend.from_file(path / "tokenizer.json", settings), settings)
    if (file := path / "tokenizer.model").is_file():
        from fastllama.tokenizer.sentencepiece_backend import SentencePieceBackend

        return Tokenizer(SentencePieceBackend(file.read_bytes(), str(file), settings), settings)
    raise TokenizerError(
        f"{path} has no tokenizer: expected tokenizer.json or tokenizer.model (sentencepiece). "
        "Copy the tokenizer files of the checkpoint there."
    )


class Encoding(dict[str, Any]):
    """``input_ids`` and ``attention_mask``, as keys and as attributes: ``model.generate(**encoding)``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an encoding has {', '.join(self)}, not {name}") from None

    def to(self, device: str | torch.device) -> Encoding:
        """Return the same encoding with its tensors on ``device``."""
        return Encoding({name: value.to(device) for name, value in self.items()})


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_token, eos_token, unk_token, pad_token: the special tokens, or None. ``pad_token`` may be set to any
            token of the vocabulary.
        chat_template: a Jinja template, templates by name, or None; may be set.
        padding_side, truncation_side: ``"left"`` or ``"right"``; may be set. If tokenizer_config.json does not say,
            padding goes left for Llama's own tokenizer classes and right for others, as in transformers;
            generation takes either.
        model_max_length: maximum number of tokens of a text, or None if unknown.
    """

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        config = settings.config
        is_llama = backend.is_llamas or "Llama" in str(config.get("tokenizer_class"))
        self._backend = backend
        self._roles = dict(backend.named)
        self.bos_token = self._roles.pop("bos_token", None)
        self.eos_token = self._roles.pop("eos_token", None)
        self.unk_token = self._roles.pop("unk_token", None)
        self.pad_token = self._roles.pop("pad_token", None)
        self.chat_template = settings.chat_template
        self.padding_side: str = config.get("padding_side", "left" if is_llama else "right")
        self.truncation_side: str = config.get("truncation_side", "right")
        longest = config.get("model_max_length") or UNLIMITED
        if not isinstance(longest, (int, float)):
            raise TokenizerError(f"model_max_length is {longest!r:.100} in tokenizer_config.json; expected a number.")
        self.model_max_length: int | None = int(longest) if longest < UNLIMITED else None

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {self.special_tokens_map})"

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.size

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the base vocabulary, without the added ones."""
        return self._backend.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        return self._role_id("bos_token", self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text."""
        return self._role_id("eos_token", self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id for text that the vocabulary cannot express."""
        return self._role_id("unk_token", self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """The id that pads short rows; may be set."""
        return self._role_id("pad_token", self.pad_token)

    @pad_token_id.setter
    def pad_token_id(self, token_id: int | None) -> None:
        token = None if token_id is None else self._backend.id_to_token(token_id)
        if token is None and token_id is not None:
            raise ValueError(f"pad_token_id {token_id} is not in the vocabulary of {len(self)} tokens.")
        self.pad_token = token

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by role, such as ``{"bos_token": "<s>"}``."""
        roles = {name: getattr(self, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {name: token for name, token in (roles | self._roles).items() if token is not None}

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return sorted(self._backend.special_ids)

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Encode a text or a batch of texts.

        Args:
            text: one text, or several.
            add_special_tokens: whether to add BOS and EOS, as the tokenizer's files say.
            padding: True or ``"longest"`` pads rows to the longest one, ``"max_length"`` to max_length.
            truncation: whether to cut rows to max_length. None: if max_length is given and padding is not.
            max_length: in tokens, special ones included; by default model_max_length.
            padding_side: ``"left"`` or ``"right"``, by default the tokenizer's.
            return_tensors: ``"pt"`` for LongTensors [b, t] (b is 1 for a single text), None for lists.

        Returns:
            input_ids and attention_mask (1: token, 0: padding).

        Raises:
            TypeError: the text is neither a string nor a list of strings.
            ValueError: a text that is not Unicode, padding without a pad token, rows of different lengths as one
                tensor, or an argument that is not one of those listed.
        """
        is_single = isinstance(text, str)
        texts = checked_texts([text] if is_single else text)
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is None or 'pt', got {return_tensors!r}.")
        if padding not in PADDINGS:
            raise ValueError(f"padding is one of {', '.join(map(repr, PADDINGS))}, got {padding!r}.")
        if padding == "do_not_pad":
            padding = False
        if truncation is None:
            truncation = max_length is not None and padding is False

        rows = self._backend.encode(texts)
        if truncation:
            rows = self._truncated(rows, self._limit(max_length, "truncation"), add_special_tokens)
        if add_special_tokens:
            rows = [[*self._backend.prefix, *row, *self._backend.suffix] for row in rows]
        mask = [[1] * len(row) for row in rows]
        if padding:
            width = max(map(len, rows), default=0)
            if padding == "max_length":
                width = self._limit(max_length, "padding='max_length'")
            side = checked_side(padding_side or self.padding_side)
            rows, mask = padded(rows, width, self._required_pad_id(), side), padded(mask, width, 0, side)
        if return_tensors == "pt":
            return Encoding(input_ids=as_tensor(rows), attention_mask=as_tensor(mask))
        return Encoding(input_ids=rows[0] if is_single else rows, attention_mask=mask[0] if is_single else mask)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of one text."""
        return self(text, add_special_tokens=add_special_tokens).input_ids

    def decode(
        self,
        token_ids: int | Sequence[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of ids; ids past the vocabulary (some models have spare ones) have no text.

        Args:
            token_ids: one id, several, or a tensor [t].
            skip_special_tokens: whether to leave out BOS, EOS and the like.
            clean_up_tokenization_spaces: whether to drop spaces before punctuation and English contractions, by
                transformers' rules. (transformers 5 does not follow this flag for BPE; here it always counts.)
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids  # pyright: ignore
        ids = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError(f"{min(ids)} is no token id; drop ignored positions (like label -100) first.")
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._backend.special_ids]
        text = self._backend.decode(ids)
        if clean_up_tokenization_spaces:
            for old, new in CLEAN_UP:
                text = text.replace(old, new)
        return text

    def batch_decode(
        self,
        sequences: Sequence[Sequence[int]] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """Return the text of each row of ids, which are a list of lists or a tensor [b, t]; see ``decode``."""
        return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in sequences]

    def detokenizer(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """Return a detokenizer, which decodes one growing sequence token by token."""
        skip = self._backend.special_ids if skip_special_tokens else frozenset()
        return IncrementalDetokenizer(self._backend, skip)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        """Return the id of a token, or the ids of several; unk_token_id for a token that is not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._backend.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Return the token of an id, or the tokens of several, as the vocabulary writes them; None if there is none."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(i)) for i in ids]

    def apply_chat_template(
        self,
        conversation: Messages | list[Messages],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        *,
        chat_template: str | None = None,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        return_dict: bool = False,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        **variables: Any,
    ) -> Any:
        """Write a conversation, or a batch of them, as a prompt for a chat model.

        Args:
            conversation: messages like ``{"role": "user", "content": "Hey"}``.
            add_generation_prompt: whether to open the assistant's turn at the end.
            tokenize: False returns the prompt as text.
            return_tensors, padding, max_length: as when the tokenizer is called.
            truncation: whether to cut rows to max_length.
            chat_template: a template or the name of one, by default the tokenizer's own.
            tools: functions that the model may call: their JSON schemas, or functions with type hints and a docstring,
                of which transformers makes the schemas.
            documents: texts that the model may use, as dicts.
            continue_final_message: leave the last message open, for the model to continue; a string names its field.
            return_assistant_tokens_mask: add ``assistant_masks`` to the Encoding, 1 for tokens that the template puts
                inside ``{% generation %}``; needs ``return_dict`` and a tokenizer.json.
            return_dict: whether to return an Encoding rather than its input_ids.
            variables: further variables of the template.

        Raises:
            NotImplementedError: functions as tools without transformers; masks of a tokenizer.model.
            TypeError: tools or documents of another kind.
            ValueError: there is no template, or it refuses the conversation; arguments that exclude each other.
        """
        from fastllama.tokenizer.chat import choose_template, render  # not at import: they bring jinja2

        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask needs return_dict=True and tokenize=True.")
        template = choose_template(self.chat_template, chat_template, tools is not None)
        is_batch = isinstance(conversation, list) and bool(conversation) and isinstance(conversation[0], list)
        variables = self.special_tokens_map | variables
        variables |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        conversations: Any = conversation if is_batch else [conversation]
        rendered = [render(template, messages, continue_final_message, **variables) for messages in conversations]
        prompts = [prompt for prompt, _ in rendered]
        prompt = prompts if is_batch else prompts[0]
        if not tokenize:
            return prompt
        encoding = self(
            prompt,
            add_special_tokens=False,  # the template writes them
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        if return_assistant_tokens_mask:
            masks = [self._mask_of(prompt, spans) for prompt, spans in rendered]
            rows = encoding.input_ids if is_batch or return_tensors else [encoding.input_ids]
            masks = [self._cut_like(mask, len(row)) for mask, row in zip(masks, rows, strict=True)]
            if return_tensors == "pt":
                encoding["assistant_masks"] = as_tensor(masks)
            else:
                encoding["assistant_masks"] = masks if is_batch else masks[0]
        return encoding if return_dict else encoding.input_ids

    def _cut_like(self, mask: list[int], width: int) -> list[int]:
        """A row's mask, truncated or padded to a width as the row was."""
        kept = mask[:width] if self.truncation_side == "right" else mask[max(0, len(mask) - width) :]
        return padded([kept], width, 0, self.padding_side)[0]

    def _mask_of(self, prompt: str, spans: Spans) -> list[int]:
        """For each token of a prompt whether it begins or ends in a span, or lies between two that do."""
        inside = [False] * len(prompt)
        for start, stop in spans:
            inside[start:stop] = [True] * (stop - start)
        return [int(any(inside[start:stop])) for start, stop in self._backend.offsets(prompt)]

    def _role_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name} is {token!r}, which is not in the vocabulary; choose one that is.")
        return token_id

    def _required_pad_id(self) -> int:
        pad_id = self.pad_token_id
        if pad_id is None:
            raise ValueError(
                "this tokenizer has no pad token, so it cannot pad; choose one first, "
                "e.g. tokenizer.pad_token = tokenizer.eos_token."
            )
        return pad_id

    def _limit(self, max_length: int | None, what_for: str) -> int:
        limit = self.model_max_length if max_length is None else max_length
        if limit is None:
            raise ValueError(f"{what_for} needs max_length: the tokenizer's files name no limit.")
        return limit

    def _truncated(self, rows: list[list[int]], limit: int, add_special_tokens: bool) -> list[list[int]]:
        room = limit - add_special_tokens * (len(self._backend.prefix) + len(self._backend.suffix))
        if room < 0:
            raise ValueError(f"max_length={limit} has no room for the special tokens.")
        if checked_side(self.truncation_side) == "right":
            return [row[:room] for row in rows]
        return [row[max(0, len(row) - room) :] for row in rows]
