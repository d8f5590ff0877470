"""From settings to what changes a row's logits: numbers, biases and a token mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fastllama import ops
from fastllama.config import GenerationConfig
from fastllama.config.tokens import as_list, bias_items
from fastllama.engine.row import MAX_BIAS_TOKENS, MAX_BIASES, Bias, Changes

#: Writes which tokens may follow to a token mask, int32 ``[words]`` on the CPU, given the row's number and its tokens.
TokenMask = Callable[[int, torch.Tensor, torch.Tensor], None]


class Biases(NamedTuple):
    """What a config comes to as biases, by the setting that asks for them; and the tokens that never come."""

    by_setting: dict[str, list[Bias]]
    banned: frozenset[int]

    @property
    def all(self) -> tuple[Bias, ...]:
        """The biases of all settings."""
        return tuple(bias for biases in self.by_setting.values() for bias in biases)


def changes_of(config: GenerationConfig, width: int, vocab_size: int) -> Changes:
    """What a row's logits are changed by, besides a token mask.

    Args:
        config: of the row.
        width: tokens of its prompt, with padding.
        vocab_size: of the model.

    Raises:
        NotImplementedError: more than the compiled step does.
        ValueError: a token outside the vocabulary.
    """
    if beyond := beyond_the_step(config):
        raise NotImplementedError(
            f"the compiled step does not do {', '.join(beyond)} as it is given (docs/generate.md has its limits), and "
            "nothing else does what differs from prompt to prompt"
        )
    found = biases_of(config, width)
    used = [*_tokens_of("sequence_bias", config), *_tokens_of("bad_words_ids", config)]
    forced_first = config.forced_bos_token_id if width == 1 else None
    forced_last = as_list(config.forced_eos_token_id)
    _check_vocabulary([*used, *as_list(forced_first), *forced_last], vocab_size)
    if suppressed := sorted({*as_list(forced_first), *forced_last} & {*(config.suppress_tokens or ())}):
        raise ValueError(f"token {suppressed[0]} is forced, and in suppress_tokens; take it out of one of them")
    return Changes(
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        forced_first=-1 if forced_first is None else forced_first,
        forced_last=forced_last[0] if forced_last else -1,
        biases=tuple(bias for bias in found.all if bias.tokens[-1] < vocab_size),
    )


def biases_of(config: GenerationConfig, width: int) -> Biases:
    """What a config asks for as biases; ``width`` tokens come before the new ones."""
    eos, min_new = config.eos_token_id, config.min_new_tokens
    until = max(0, config.min_length - width) if min_new is None else min_new
    bad = [tuple(tokens) for tokens in config.bad_words_ids or () if not (len(tokens) == 1 and tokens[0] in eos)]
    return Biases(
        {
            "sequence_bias": [Bias(tokens, value) for tokens, value in bias_items(config.sequence_bias or {})],
            "bad_words_ids": [Bias(tokens) for tokens in bad if len(tokens) > 1],
            "begin_suppress_tokens": [Bias((token,), until=1) for token in config.begin_suppress_tokens or ()],
            "min_new_tokens": [Bias((token,), until=until) for token in eos if until > 0],
        },
        frozenset(config.suppress_tokens or ()) | {tokens[0] for tokens in bad if len(tokens) == 1},
    )


def beyond_the_step(config: GenerationConfig) -> list[str]:
    """The settings that ask for more than the compiled step's buffers hold."""
    found = biases_of(config, width=0)
    names = {
        name for name, biases in found.by_setting.items() if any(len(bias.tokens) > MAX_BIAS_TOKENS for bias in biases)
    }
    if len(found.all) > MAX_BIASES:
        names |= {name for name, biases in found.by_setting.items() if biases}
    if config.no_repeat_ngram_size > ops.MAX_NGRAM:
        names.add("no_repeat_ngram_size")
    if len(as_list(config.forced_eos_token_id)) > 1:
        names.add("forced_eos_token_id")
    if config.forced_bos_token_id is not None and config.begin_suppress_tokens:
        names.add("begin_suppress_tokens")  # after a forced token it is about the next one
    return sorted(names)


def allowed_tokens(config: GenerationConfig, vocab_size: int) -> torch.Tensor | None:
    """The token mask of a config, int32 ``[words]`` on the CPU; None where it allows all."""
    banned = biases_of(config, width=0).banned
    return _all_but(banned, vocab_size) if banned else None


@functools.lru_cache(maxsize=64)
def _all_but(banned: frozenset[int], vocab_size: int) -> torch.Tensor:
    tokens = torch.tensor([token for token in banned if token < vocab_size], dtype=torch.long, device="cpu")
    return ~ops.token_mask(tokens, vocab_size)


def token_masks(settings: Mapping[str, Any], vocab_size: int) -> list[TokenMask]:
    """What writes the token masks of a call.

    Raises:
        TypeError: a setting that is no function.
    """
    names = ("prefix_allowed_tokens_fn", "token_mask")
    functions = {name: settings[name] for name in names if settings.get(name) is not None}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} is {function!r}; expected one function for all rows, which is given their numbers")
    if "prefix_allowed_tokens_fn" in functions:
        functions["prefix_allowed_tokens_fn"] = _prefix_mask(functions["prefix_allowed_tokens_fn"], vocab_size)
    return [*functions.values()]


def fill_mask(
    masks: Iterable[TokenMask], row: int, prompt: torch.Tensor, new_tokens: torch.Tensor, allowed: torch.Tensor
) -> None:
    """Take from what is allowed what some token masks do not allow after a row's new tokens."""
    tokens = torch.cat((prompt, new_tokens.to(prompt)))
    for fill in masks:
        own = torch.full_like(allowed, -1)  # so that none of them undoes what another one forbids
        fill(row, tokens, own)
        allowed &= own


def _prefix_mask(allowed_tokens: Callable[[int, torch.Tensor], Any], vocab_size: int) -> TokenMask:
    """The token mask of transformers' ``prefix_allowed_tokens_fn``."""

    def fill(row: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        allowed = torch.as_tensor(allowed_tokens(row, tokens), dtype=torch.long, device="cpu")
        if not len(allowed):
            raise ValueError(f"prefix_allowed_tokens_fn returned no token for row {row}: nothing can follow")
        _check_vocabulary(allowed.tolist(), vocab_size)
        mask &= ops.token_mask(allowed, vocab_size)

    return fill


def _tokens_of(name: str, config: GenerationConfig) -> list[int]:
    value = getattr(config, name) or {}
    sequences = [tokens for tokens, _ in bias_items(value)] if name == "sequence_bias" else value
    return [token for tokens in sequences for token in tokens]


def _check_vocabulary(tokens: Iterable[int], vocab_size: int) -> None:
    outside = sorted({token for token in tokens if not 0 <= token < vocab_size})
    if outside:
        raise ValueError(f"got token id {outside[0]}, outside the vocabulary of {vocab_size}")
