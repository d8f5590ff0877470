"""The compiled engine against the eager forward and transformers: same weights and prompt, by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastllama.measure import (
    Bandwidth,
    Decode,
    Figures,
    Stopwatch,
    figures,
    kv_cache_bytes,
    memory_bandwidth,
    weight_bytes_per_step,
)
from fastllama.model import LlamaForCausalLM

OURS = "fastllama"
EAGER = "eager forward"
TRANSFORMERS = "transformers"

Contender = Callable[[], Decode]
"""Runs one greedy decode of one row, past any eos token, and times it."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured.

    Attributes:
        figures: one entry per contender, fastllama first.
        skipped: contenders that did not run, and why.
        bandwidth: memory bandwidth, measured in the same run.
        bytes_per_step: weights and live KV cache that one step reads, at the middle of the decode.
    """

    figures: tuple[Figures, ...]
    bandwidth: Bandwidth
    bytes_per_step: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def floor_ms(self) -> float:
        """Milliseconds per token if only reading the bytes of a step took time."""
        return 1e3 * self.bytes_per_step / self.bandwidth.bytes_per_second

    def ratio(self, other: Figures) -> float:
        """Tokens per second of fastllama over those of another contender."""
        return self.figures[0].tokens_per_second / (other.tokens_per_second or float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fastllama's at the top and the others' under ``peers``."""
        ours, *others = self.figures
        peers = {other.name: asdict(other) | {"ratio": self.ratio(other)} for other in others}
        return asdict(ours) | {
            "bytes_per_step": self.bytes_per_step,
            "memory_bandwidth_gb_s": self.bandwidth.bytes_per_second / 1e9,
            "memory_bandwidth_method": self.bandwidth.method,
            "floor_ms": self.floor_ms,
            "parity": all(figure.same_tokens == figure.tokens for figure in self.figures),
            "peers": peers,
            "skipped": self.skipped,
        }


def compare(
    model: LlamaForCausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    rounds: int = 2,
    peers: Sequence[str] = (EAGER,),
    on_start: Callable[[str], None] | None = None,
) -> Comparison:
    """Decode the same prompt with the engine and its peers by turns, and measure the memory's bandwidth.

    Args:
        model: the model; its engine compiles now if it has not yet.
        input_ids: prompt ``[1, t]``.
        max_new_tokens: tokens of each decode, at least two.
        rounds: timed decodes of each contender.
        peers: which of ``EAGER`` and ``TRANSFORMERS`` to run.
        on_start: told what is about to run.
    """
    contenders: dict[str, Contender] = {OURS: lambda: _decode_compiled(model, input_ids, max_new_tokens)}
    skipped: dict[str, str] = {}
    if EAGER in peers:
        contenders[EAGER] = lambda: _decode_eager(model, input_ids, max_new_tokens)
    if TRANSFORMERS in peers:
        try:
            twin = transformers_twin(model)
            _decode_transformers(twin, input_ids, 2)
            contenders[TRANSFORMERS] = lambda: _decode_transformers(twin, input_ids, max_new_tokens)
        except Exception as error:  # whatever breaks a peer is told and does not end the run
            skipped[TRANSFORMERS] = f"{type(error).__name__}: {error}"
    decodes = interleave(contenders, rounds, on_start)
    if on_start is not None:
        on_start("memory bandwidth")
    bandwidth = memory_bandwidth(model.device)
    live_tokens = input_ids.shape[1] + max_new_tokens // 2
    bytes_per_step = weight_bytes_per_step(model) + kv_cache_bytes(
        model.config, live_tokens, itemsize=model.dtype.itemsize
    )
    reference = decodes.get(EAGER, decodes[OURS])[0].tokens
    found = (figures(name, runs, bytes_per_step, bandwidth, reference) for name, runs in decodes.items())
    return Comparison(tuple(found), bandwidth, bytes_per_step, skipped)


def interleave(
    contenders: Mapping[str, Contender], rounds: int, on_start: Callable[[str], None] | None = None
) -> dict[str, list[Decode]]:
    """Run every contender ``rounds`` times, in the order A B B A, after one unmeasured run of each.

    Args:
        contenders: what to time, by name.
        rounds: timed runs of each.
        on_start: told the name of a contender before each run.
    """
    decodes: dict[str, list[Decode]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            if on_start is not None:
                on_start(name)
            decode = contenders[name]()
            if number >= 0:
                decodes[name].append(decode)
    return decodes


def transformers_twin(model: LlamaForCausalLM) -> Any:
    """transformers' model of the same config on the same weights, which are shared and not copied.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import GenerationConfig, LlamaConfig
    from transformers import LlamaForCausalLM as Twin

    config = LlamaConfig(**model.config.to_dict())
    with torch.device("meta"):
        twin = Twin(config)
    twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config).to(model.device)
    twin.generation_config = GenerationConfig(pad_token_id=0)
    return twin.eval()


def _decode_compiled(model: LlamaForCausalLM, input_ids: torch.Tensor, max_new_tokens: int) -> Decode:
    return _exhaust(model.stream(input_ids, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=()))


def _decode_eager(model: LlamaForCausalLM, input_ids: torch.Tensor, max_new_tokens: int) -> Decode:
    return _exhaust(_eager_tokens(model, input_ids, max_new_tokens))


@torch.inference_mode()
def _eager_tokens(model: Any, input_ids: torch.Tensor, max_new_tokens: int) -> Iterator[torch.Tensor]:
    """The public forward with a growing cache."""
    cache = None
    ids = input_ids
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, num_logits_to_keep=1)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(dim=-1)
        yield ids.cpu()


def _exhaust(tokens: Iterable[torch.Tensor]) -> Decode:
    watch = Stopwatch(tokens)
    for _ in watch:
        pass
    return watch.decode


def _decode_transformers(twin: Any, input_ids: torch.Tensor, max_new_tokens: int) -> Decode:
    clock = _StreamerClock()
    with torch.inference_mode():
        twin.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=clock,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return clock.decode


class _StreamerClock:
    """transformers' streamer protocol: ``put`` the prompt, ``put`` each token, ``end``; times the tokens."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._times = [time.perf_counter()]
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._tokens.append(int(value))
            self._times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass

    @property
    def decode(self) -> Decode:
        return Decode.from_times(self._tokens, self._times)
