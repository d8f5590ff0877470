"""How fast a model decodes, and how fast the memory of the machine would let it.

Decoding one token reads every weight and the live part of the KV cache once. So bytes per step over memory
bandwidth bounds the time per token, and MBU (memory-bandwidth utilisation) is how near a decode is.
Times are seconds, sizes bytes, bandwidths bytes per second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.model.cache import free_memory
from fastllama.model.llama import Llama
from fastllama.quantization.linear import is_tied, packed_modules

GIB = 1 << 30
READ_BYTES = GIB  # far larger than any processor cache
BANDWIDTH_PASSES = 7


# ---- the bound ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bandwidth:
    """Measured memory bandwidth, and how."""

    bytes_per_second: float
    method: str


class BandwidthProbe:
    """Measures the memory bandwidth of a device, now and again, over the same buffers.

    On the CPU a streaming read of 1 GiB, or of a quarter of the free memory where that is less, with all of torch's
    threads: by a kernel that only reads, or by torch's sum where the C++ kernels cannot be built. On CUDA a copy within
    the device of 1 GiB, or of an eighth of the free memory; it counts twice, being read and written.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            nbytes = min(READ_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
            self._method = f"copy of {nbytes / GIB:.2g} GiB within the device"
        else:
            nbytes = min(READ_BYTES, free_memory() // 4)
            reader = ops.memory_reader()
            self._read_bytes = reader or torch.sum
            by = "" if reader else " by torch's sum"
            self._method = f"read of {nbytes / GIB:.2g} GiB{by}, {torch.get_num_threads()} threads"
        self._source = torch.ones(nbytes // 8, dtype=torch.int64, device=device)
        self._target = torch.empty_like(self._source) if self._is_cuda else None
        self._seconds: list[list[float]] = []  # of each pass of each sample

    def sample(self, passes: int = 3) -> None:
        """Go over the memory that number of times."""
        self._seconds.append([self._copy() if self._is_cuda else self._read() for _ in range(passes)])

    @property
    def best(self) -> Bandwidth:
        """The fastest pass so far, as STREAM reports it; samples if there was none."""
        if not self._seconds:
            self.sample(BANDWIDTH_PASSES)
        return Bandwidth(max(self.readings), self._method)

    @property
    def readings(self) -> tuple[float, ...]:
        """Bytes per second of the fastest pass of each sample; where they differ much, the run was disturbed."""
        moved = self._source.nbytes * (2 if self._is_cuda else 1)
        return tuple(moved / min(seconds) for seconds in self._seconds)

    def _read(self) -> float:
        start = time.perf_counter()
        self._read_bytes(self._source)
        return time.perf_counter() - start

    def _copy(self) -> float:
        assert self._target is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def memory_bandwidth(device: torch.device | str = "cpu") -> Bandwidth:
    """Measure the memory bandwidth of a device; about a second on the CPU."""
    return BandwidthProbe(device).best


def last_level_cache(device: torch.device) -> int:
    """Bytes of the caches next to memory, all of them together; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found: dict[tuple[int, str], int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        with suppress(OSError, ValueError):
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            units = {"K": 2**10, "M": 2**20, "G": 2**30}
            found[int(level), shared] = int(size.rstrip("KMG")) * units.get(size[-1:], 1)
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def parameter_count(model: Llama) -> int:
    """Number of weights; tied ones count once, quantized ones as the weights that they stand for."""
    quantized = {id(module.codes): math.prod(module.shape) for module in packed_modules(model).values()}
    return sum(parameter.numel() for parameter in model.parameters()) + sum(quantized.values())


def weight_bytes_per_step(model: Llama, batch: int = 1) -> int:
    """Bytes of weights that one decode step reads.

    All of them but the embedding, of which a step reads one row for each sequence, unless the head is tied to
    it and reads it whole.

    Args:
        model: the model; its weights may be on the meta device.
        batch: sequences decoded together.
    """
    table, whole = model.get_input_embeddings(), [*model.parameters(), *model.buffers()]
    rows = 0
    if not is_tied(model):
        own = [*table.parameters(), *table.buffers()]
        whole = [tensor for tensor in whole if all(tensor is not each for each in own)]
        rows = sum(tensor.nbytes for tensor in own) // table.num_embeddings
    return batch * rows + sum(tensor.nbytes for tensor in whole)


def kv_cache_bytes(config: LlamaConfig, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the keys and values of ``tokens`` tokens in each of ``batch`` sequences.

    With an ``itemsize`` of 1 they are codes, whose scales are counted too.
    """
    heads, dim = config.num_key_value_heads or config.num_attention_heads, config.head_dim or 0
    columns = ops.kv_columns(dim, torch.int8) if itemsize == 1 else dim
    return 2 * config.num_hidden_layers * heads * columns * tokens * batch * itemsize


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
