"""How fast a model decodes, and how fast the memory of the machine would let it.

Decoding one token reads every weight and the live part of the KV cache once. So bytes per step over memory
bandwidth is the floor of the time per token, and MBU (memory-bandwidth utilisation) is how near a decode is.
Times are seconds, sizes bytes, bandwidths bytes per second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fastllama.config import LlamaConfig
from fastllama.model import LlamaForCausalLM

GIB = 1 << 30
READ_BYTES = GIB  # large beside any processor cache
BANDWIDTH_ROUNDS = 7


# ---- the floor ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bandwidth:
    """Measured memory bandwidth: the best of several passes, as STREAM reports it."""

    bytes_per_second: float
    method: str


def memory_bandwidth(device: torch.device | str = "cpu") -> Bandwidth:
    """Measure the memory bandwidth of a device; about a second on the CPU.

    On the CPU a streaming read of 1 GiB, or of a quarter of the free memory where that is less, with all of
    torch's threads. On CUDA a copy within the device of 1 GiB, or of an eighth of the free memory; it counts
    twice, being read and written.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_copy_bandwidth(device)
    nbytes = min(READ_BYTES, free_memory() // 4) // 8 * 8
    source = torch.ones(nbytes // 8, dtype=torch.int64)
    seconds = min(_seconds(source.sum) for _ in range(BANDWIDTH_ROUNDS))
    return Bandwidth(nbytes / seconds, f"read of {nbytes / GIB:.2g} GiB, {torch.get_num_threads()} threads")


def _cuda_copy_bandwidth(device: torch.device) -> Bandwidth:
    nbytes = min(READ_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(BANDWIDTH_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return Bandwidth(2 * nbytes / best, f"copy of {nbytes / GIB:.2g} GiB within the device")


def free_memory() -> int:
    """Bytes of host memory still to be had; half of all memory where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def parameter_count(model: LlamaForCausalLM) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes_per_step(model: LlamaForCausalLM, batch: int = 1, itemsize: int | None = None) -> int:
    """Bytes of weights that one decode step reads.

    All of them but the embedding, of which a step reads one row for each sequence, unless the head is tied to
    it and reads it whole.

    Args:
        model: the model; its weights may be on the meta device.
        batch: sequences decoded together.
        itemsize: bytes per weight, in place of the weights' own.
    """
    embedding = model.get_input_embeddings().weight
    whole = list(model.parameters())
    rows = 0
    if model.get_output_embeddings().weight is not embedding:
        whole = [parameter for parameter in whole if parameter is not embedding]
        rows = batch * embedding.shape[1] * (itemsize or embedding.itemsize)
    return rows + sum(parameter.numel() * (itemsize or parameter.itemsize) for parameter in whole)


def kv_cache_bytes(config: LlamaConfig, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the keys and values of so many tokens in each of ``batch`` sequences."""
    heads, dim = config.num_key_value_heads or config.num_attention_heads, config.head_dim or 0
    return 2 * config.num_hidden_layers * heads * dim * tokens * batch * itemsize


# ---- timing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """One timed decode.

    Attributes:
        tokens: the new token ids of the row.
        ttft: seconds to the first token.
        tpot: seconds from each token to the next, one fewer than tokens.
    """

    tokens: tuple[int, ...]
    ttft: float
    tpot: tuple[float, ...]

    @classmethod
    def from_times(cls, tokens: Sequence[int], times: Sequence[float]) -> Decode:
        """The decode of these tokens, ``times`` being when it started and when each of them came."""
        gaps = tuple(after - before for before, after in pairwise(times))
        return cls(tuple(tokens), gaps[0] if gaps else 0.0, gaps[1:])


class Stopwatch:
    """Passes the tokens of a decode on and times them: ``for token in watch: ...``, then ``watch.decode``.

    The clock starts when iteration does and includes what the consumer does between tokens.
    """

    def __init__(self, tokens: Iterable[torch.Tensor]) -> None:
        self._source = tokens
        self._tokens: list[int] = []
        self._times: list[float] = []

    def __iter__(self) -> Iterator[int]:
        self._times.append(time.perf_counter())
        for token in self._source:
            self._tokens.append(int(token))
            self._times.append(time.perf_counter())
            yield self._tokens[-1]

    @property
    def decode(self) -> Decode:
        """What was seen so far."""
        return Decode.from_times(self._tokens, self._times)


# ---- results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Percentiles by linear interpolation; zeros where there are no values."""
    if not values:
        return Quantiles(0.0, 0.0, 0.0)
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Quantiles(*found.tolist())


@dataclass(frozen=True)
class Figures:
    """What the timed decodes of one contender come to.

    Attributes:
        name: the contender.
        ttft_ms: median milliseconds to the first token.
        tpot_ms: milliseconds per token after it.
        tokens_per_second: after the first token, over all rounds.
        bandwidth_gb_s: bytes per step over the median time per token, in GB (10⁹ bytes) per second.
        mbu: that as a fraction of the measured memory bandwidth.
        same_tokens: how many tokens of the first round agree with the reference before one differs.
        tokens: tokens of the first round.
    """

    name: str
    ttft_ms: float
    tpot_ms: Quantiles
    tokens_per_second: float
    bandwidth_gb_s: float
    mbu: float
    same_tokens: int
    tokens: int


def figures(
    name: str,
    decodes: Sequence[Decode],
    bytes_per_step: float,
    bandwidth: Bandwidth,
    reference: Sequence[int],
) -> Figures:
    """Sum up the decodes of one contender; ``reference`` are the tokens that it should have given."""
    gaps_ms = [gap * 1e3 for decode in decodes for gap in decode.tpot]
    tpot_ms = quantiles(gaps_ms)
    achieved = bytes_per_step / (tpot_ms.p50 / 1e3) if tpot_ms.p50 else 0.0
    return Figures(
        name=name,
        ttft_ms=quantiles([decode.ttft * 1e3 for decode in decodes]).p50,
        tpot_ms=tpot_ms,
        tokens_per_second=1e3 * len(gaps_ms) / sum(gaps_ms) if gaps_ms else 0.0,
        bandwidth_gb_s=achieved / 1e9,
        mbu=achieved / bandwidth.bytes_per_second,
        same_tokens=common_prefix(decodes[0].tokens, reference),
        tokens=len(decodes[0].tokens),
    )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two decodes share before the first that differs."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
