"""The JSON files next to a vocabulary: special and added tokens, flags, chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllama.config.fields import CONFIG_NAME, read_json, shortened
from fastllama.config.keys import text_part

if TYPE_CHECKING:
    from tokenizers import AddedToken

ADDED_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class TokenizerError(ValueError):
    """A tokenizer's files are missing, broken, or of an unsupported kind."""


@dataclass(frozen=True)
class TokenizerSettings:
    """tokenizer_config.json and its companions, in one form.

    Attributes:
        config: tokenizer_config.json, overridden by special_tokens_map.json where it applies.
        named: special tokens with a role, e.g. ``{"bos_token": AddedToken("<s>")}``.
        extra: further special tokens, in the order listed.
        added: added tokens by id (``added_tokens_decoder``, or else added_tokens.json).
        chat_template: one Jinja template, or templates by name, or none.
    """

    config: dict[str, Any]
    named: dict[str, AddedToken]
    extra: list[AddedToken]
    added: dict[int, AddedToken]
    chat_template: str | dict[str, str] | None


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the JSON files of a folder; each of them may be missing.

    special_tokens_map.json and added_tokens.json belong to an older layout. They count only where
    tokenizer_config.json has no ``added_tokens_decoder`` (as in transformers).

    Raises:
        TokenizerError: a file does not hold a JSON object, or holds one of another form.
    """
    try:
        return _read_settings(folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(
            f"tokenizer_config.json in {folder}, or a file next to it, has another form than Hugging Face's "
            f"({type(error).__name__}: {shortened(str(error))}); fetch them again."
        ) from error


def _read_settings(folder: Path) -> TokenizerSettings:
    from tokenizers import AddedToken

    config = _read(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") is None and _is_llama(folder / CONFIG_NAME):
        config["tokenizer_class"] = "LlamaTokenizerFast"  # as transformers 4 takes for such a model
    older_layout = "added_tokens_decoder" not in config
    if older_layout:
        config |= _read(folder / "special_tokens_map.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = config | (extra if isinstance(extra, dict) else {})
    settings = TokenizerSettings(
        config=config,
        named={
            name: added_token(token, special=True)
            for name, token in named.items()
            if name.endswith("_token") and isinstance(token, str | dict) and added_token(token).content
        },
        extra=[] if isinstance(extra, dict) else [added_token(token, special=True) for token in extra if token],
        added={int(i): added_token(token) for i, token in config.get("added_tokens_decoder", {}).items()},
        chat_template=read_chat_template(folder, config),
    )
    special = {token.content for token in (*settings.named.values(), *settings.extra)}
    if older_layout:
        for content, token_id in _read(folder / "added_tokens.json").items():
            settings.added[token_id] = AddedToken(content, special=content in special)
    for token in settings.added.values():
        token.special = token.special or token.content in special
    return settings


def added_token(token: str | dict[str, Any], **flags: bool) -> AddedToken:
    """An added token from its JSON form, ``flags`` overriding what that says."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, **flags)
    return AddedToken(token["content"], **{f: token[f] for f in ADDED_TOKEN_FLAGS if f in token} | flags)


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template(s): chat_template.jinja and additional_chat_templates/ count before the config."""
    default, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {path.stem: path for path in sorted(others.glob("*.jinja"))}
    if default.is_file():
        files["default"] = default
    if files:
        templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        return templates["default"] if list(templates) == ["default"] else templates
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template


def _is_llama(path: Path) -> bool:
    """Whether a config.json is a Llama's, or has a Llama's text part; one that cannot be read says nothing here."""
    try:
        config = read_json(path)
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "llama" or text_part(config) is not None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is no such file."""
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{error}; fetch the file again.") from error
