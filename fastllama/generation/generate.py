"""generate(): Hugging Face's arguments and results over the engine; streaming.

Shape suffixes: ``b`` batch, ``t`` prompt tokens, ``n`` new tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol

import torch

from fastllama.config import GenerationConfig
from fastllama.engine.runner import Engine, Request
from fastllama.model.rope import static_length

logger = logging.getLogger(__name__)

POLL_STEPS = 8  # decode steps between two looks at the tokens where nobody is waiting for each of them


class Streamer(Protocol):
    """What ``generate(streamer=...)`` takes, as in transformers: the prompt first, then each step's tokens."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ``[b, t]``, later one token a row ``[b]``; int64 on the CPU."""

    def end(self) -> None:
        """Called after the last token."""


def generate(
    engine: Engine,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    streamer: Streamer | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Decode a batch; see :meth:`fastllama.LlamaForCausalLM.generate`."""
    poll_every = POLL_STEPS if streamer is None else 1
    tokens = _start(engine, input_ids, attention_mask, config, settings, poll_every)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    new: list[torch.Tensor] = []
    with closing(tokens):
        for token_b in tokens:
            new.append(token_b)
            if streamer is not None:
                streamer.put(token_b)
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, torch.stack(new, dim=1).to(input_ids)), dim=1)


def stream(
    engine: Engine,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    **settings: Any,
) -> Generator[torch.Tensor, None, None]:
    """Decode a batch step by step; see :meth:`fastllama.LlamaForCausalLM.stream`."""
    return _start(engine, input_ids, attention_mask, config, settings, poll_every=1)


def _start(
    engine: Engine,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    settings: dict[str, Any],
    poll_every: int,
) -> Generator[torch.Tensor, None, None]:
    """Check a call now; the generator that is returned decodes."""
    config = merge_settings(config, settings)
    request = make_request(input_ids, attention_mask, config)
    total, limit = input_ids.shape[1] + request.max_new_tokens, engine.config.max_position_embeddings
    if total > limit and static_length(engine.config) is None:
        logger.warning(
            "prompt and new tokens come to %d, the model was made for %d positions; beyond them it may write nonsense",
            total,
            limit,
        )
    engine.check(request)
    return _columns(engine, request, poll_every)


def _columns(engine: Engine, request: Request, poll_every: int) -> Generator[torch.Tensor, None, None]:
    with closing(engine.decode(request, poll_every)) as bursts:
        for tokens_bn in bursts:
            yield from tokens_bn.unbind(1)


def merge_settings(config: GenerationConfig, settings: dict[str, Any]) -> GenerationConfig:
    """The generation config with a call's own settings over it; None leaves the config's value.

    ``max_length`` given in the call overrules the config's ``max_new_tokens``. Where no length was set at all, 20 new
    tokens are decoded, as in transformers.

    Raises:
        TypeError: for a setting that ``generate`` does not know, naming it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(f"generate() does not know {', '.join(unknown)}; it takes {', '.join(known)}")
    if "max_length" in given and "max_new_tokens" not in given:
        given["max_new_tokens"] = None
    elif config.max_new_tokens is None and config.max_length == GenerationConfig.max_length:
        given.setdefault("max_new_tokens", config.max_length)
    return config.replace(**given)


def make_request(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GenerationConfig) -> Request:
    """Check a call's tensors, unpad its rows and resolve its settings.

    Raises:
        ValueError: ids or mask of another shape or dtype, a row without tokens, no room for a new token.
    """
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"input_ids must be integers [batch, tokens], got {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
            'tokenize with return_tensors="pt"'
        )
    seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    eos = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if eos else 0)
    if attention_mask is None:
        attention_mask = inferred_mask(input_ids, config)
    return Request(
        prompts=unpad(input_ids.long(), attention_mask),
        max_new_tokens=_new_tokens(input_ids.shape[1], config),
        temperature=config.temperature if config.do_sample else 0.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        seed=seed,
        eos_token_ids=eos,
        pad_token_id=pad,
    )


def _new_tokens(prompt_tokens: int, config: GenerationConfig) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length <= prompt_tokens:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and max_length is {config.max_length}, which leaves no room for "
            "a new one; raise max_length or give max_new_tokens"
        )
    return config.max_length - prompt_tokens


def inferred_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor | None:
    """The mask of a call without one: as in transformers, pad ids are padding, unless they may be EOS ids too."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        return None
    return input_ids != config.pad_token_id


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Each row's tokens ``[tokens]`` without its padding, wherever that is.

    Dropping masked tokens changes nothing for the others: they are never attended, and positions count unmasked
    tokens only.

    Raises:
        ValueError: a mask of another shape, or a row of padding alone.
    """
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )
    rows = [ids[mask != 0] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"row {index} of attention_mask is all zeros: that prompt has no tokens")
    return rows
