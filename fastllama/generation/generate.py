"""generate(): Hugging Face's arguments and results over the engine; streaming.

Shape suffixes: ``b`` batch, ``t`` prompt tokens, ``n`` new tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch

from fastllama import ops
from fastllama.config import GenerationConfig, LlamaConfig
from fastllama.engine.runner import Runner
from fastllama.generation.drafting import Drafting, drafting_of
from fastllama.generation.loop import decode
from fastllama.generation.request import Request, inferred_mask, requests_of
from fastllama.model.cache import CacheOverflowError, StaticCache
from fastllama.model.rope import static_length

logger = logging.getLogger(__name__)

Assistant = tuple[Runner, GenerationConfig]  # engine and generation config of a second model, which drafts
POLL_STEPS = 8  # decode steps between two looks at the tokens where nobody is waiting for each of them


class Streamer(Protocol):
    """What ``generate(streamer=...)`` takes, as in transformers: the prompt first, then each step's tokens."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ``[b, t]``, later one token a row ``[b]``; int64 on the CPU."""

    def end(self) -> None:
        """Called after the last token."""


def generate(
    runner: Runner,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    streamer: Streamer | None = None,
    cache: StaticCache | None = None,
    assistant: Assistant | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Decode a batch; see :meth:`fastllama.LlamaForCausalLM.generate`."""
    poll_every = POLL_STEPS if streamer is None else 1
    tokens = _start(runner, input_ids, attention_mask, config, settings, poll_every, cache, assistant)
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
    new_bn = torch.stack(new, dim=1).to(input_ids)
    return torch.cat((input_ids.repeat_interleave(len(new_bn) // len(input_ids), dim=0), new_bn), dim=1)


def stream(
    runner: Runner,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    assistant: Assistant | None = None,
    **settings: Any,
) -> Generator[torch.Tensor, None, None]:
    """Decode a batch step by step; see :meth:`fastllama.LlamaForCausalLM.stream`."""
    return _start(runner, input_ids, attention_mask, config, settings, 1, None, assistant)


def _start(
    runner: Runner,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    settings: dict[str, Any],
    poll_every: int,
    cache: StaticCache | None,
    assistant: Assistant | None,
) -> Generator[torch.Tensor, None, None]:
    """Check a call now; the generator that is returned decodes."""
    network = runner.config
    requests = requests_of(input_ids, attention_mask, config, settings, network.vocab_size)
    new_tokens = max(request.max_new_tokens for request in requests)
    total, limit = input_ids.shape[1] + new_tokens, network.max_position_embeddings
    if total > limit and static_length(network) is None:
        logger.warning(
            "prompt and new tokens come to %d, the model was made for %d positions; beyond them it may write nonsense",
            total,
            limit,
        )
    if cache is not None and total - 1 > cache.max_cache_len:
        raise CacheOverflowError(
            f"prompt and new tokens come to {total}, of which the cache holds all but the last, and the StaticCache "
            f"that is given has {cache.max_cache_len} slots; allocate it with a larger max_cache_len"
        )
    return _columns(runner, requests, poll_every, cache, drafting_of(config, settings, runner, assistant))


def cache_in_step(
    runner: Runner,
    cache: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    settings: Mapping[str, Any],
) -> bool:
    """Whether the step decodes with a cache that is given: a StaticCache of the first tokens of unpadded prompts."""
    several = (settings.get("num_return_sequences", config.num_return_sequences) or 1) > 1
    if several or not runner.takes(cache) or len(input_ids) > cache.batch_size:
        return False
    mask = inferred_mask(input_ids, config) if attention_mask is None else attention_mask
    return mask is None or (mask.shape == input_ids.shape and bool(mask.all()))


def check_cache(cache: Any, network: LlamaConfig) -> None:
    """Raise ValueError where a StaticCache is of another model's shape."""
    if not isinstance(cache, StaticCache):
        return
    got = (len(cache.key_cache), *cache.key_cache[0].shape[1::2])
    expected = (network.num_hidden_layers, network.num_key_value_heads, ops.kv_columns(network.head_dim, cache.dtype))
    if got != expected:
        raise ValueError(
            f"the cache has (layers, KV heads, columns) {got}, the model {expected}: make it from model.config"
        )


def even_out(cache: Any, rows: int) -> None:
    """Cut a StaticCache to its shortest row: outside the step all rows of a cache have one length."""
    if isinstance(cache, StaticCache) and rows <= cache.batch_size:
        cache.crop(int(cache.length_b[:rows].min()))


def _columns(
    runner: Runner,
    requests: Sequence[Request],
    poll_every: int,
    cache: StaticCache | None,
    drafting: Drafting | None,
) -> Generator[torch.Tensor, None, None]:
    with closing(decode(runner, requests, poll_every, cache, drafting)) as bursts:
        for tokens_bn in bursts:
            yield from tokens_bn.unbind(1)
