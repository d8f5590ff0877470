"""``bench decode``: fastllama, its peers and the bound interleaved in one run, outputs checked, over a grid of sizes."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastllama import LlamaForCausalLM
from fastllama.measure import BandwidthProbe, free_memory, kv_cache_bytes, quantiles, weight_bytes_per_step

from .contenders import Task, open_peers
from .contenders.fastllama import Engine, EngineAt
from .costs import Compilations, counting, last_level_cache, peak_memory
from .parity import Parity, check_all
from .rounds import WARMUP_RUNS, Results, Say, interleave
from .workload import Decode, Workload

STEADY = 1.15  # largest over smallest reading of the bandwidth in a run that was not disturbed


class CountedEngine(Engine):
    """The engine, and what each of its runs has compiled and recorded."""

    def __init__(self) -> None:
        self.costs: list[Compilations] = []

    def run(self, workload: Workload) -> Decode:
        """Decode once."""
        with counting() as cost:
            done = super().run(workload)
        self.costs.append(cost)
        return done


@dataclass(frozen=True)
class Bound:
    """What bounds a decode: the bytes that a step must read, and how fast the memory was in this run.

    Attributes:
        bytes_per_step: weights and live KV cache, half way through the decode.
        bytes_per_second: the memory's bandwidth, the fastest reading of the run.
        method: how that was measured.
        readings: bytes per second of each reading.
    """

    bytes_per_step: int
    bytes_per_second: float
    method: str
    readings: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record; ``floor_ms`` is a step's milliseconds if only reading its bytes took time."""
        return {
            "bytes_per_step": self.bytes_per_step,
            "memory_bandwidth_gb_s": self.bytes_per_second / 1e9,
            "memory_bandwidth_method": self.method,
            "memory_bandwidth_readings_gb_s": [reading / 1e9 for reading in self.readings],
            "floor_ms": 1e3 * self.bytes_per_step / self.bytes_per_second,
        }


def compare(
    model: LlamaForCausalLM,
    workload: Workload,
    *,
    rounds: int,
    warmups: int = WARMUP_RUNS,
    peers: Sequence[str] = (),
    places: Mapping[str, str | None] | None = None,
    beside: int | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Decode the same workload with the engine and its peers, interleaved; the fields of a record."""
    task = task_of(model, workload, places)
    engine = CountedEngine()
    engine.load(task)
    say("first run: fastllama")
    start = time.perf_counter()
    engine.run(workload)
    first_run_s, peak = time.perf_counter() - start, peak_memory(model.device)
    probe = BandwidthProbe(model.device)
    with tempfile.TemporaryDirectory(prefix="fastllama-peers-") as workspace:
        opened, missing = open_peers(peers, replace(task, workspace=workspace))
        if beside is not None:
            opened.insert(0, EngineAt(beside))
            opened[0].load(task)
        try:
            results = interleave(
                [engine, *opened], workload, rounds, warmups=warmups, say=say, between=probe.sample
            )
            info = {peer.name: peer.info or None for peer in opened if peer.name in results.runs}
        finally:
            for peer in opened:
                peer.close()
    results.first_seconds[engine.name] = first_run_s
    say("checking the tokens")
    parities = check_all(model, workload, {name: runs[0].tokens for name, runs in results.runs.items()})
    bound = Bound(step_bytes(model, workload), probe.best.bytes_per_second, probe.best.method, probe.readings)
    compiled = sum((Counter(asdict(cost)) for cost in engine.costs[-rounds:]), Counter())
    in_cache = bound.bytes_per_step <= last_level_cache(model.device)
    found = entries(workload, results, bound, parities, info, missing | results.broken)
    return found | {
        "batch": workload.batch,
        "prompt_len": workload.prompt_len,
        "new_tokens": workload.new_tokens,
        "capacity": workload.capacity,
        "live_tokens": workload.live_tokens,
        "rounds": rounds,
        **bound.to_dict(),
        "peak_memory_bytes": peak,
        "compiles_after_warmup": compiled["graphs"],
        "recordings_after_warmup": compiled["recordings"],
        "disturbed": disturbances(found, bound, in_cache),
    }


def task_of(model: LlamaForCausalLM, workload: Workload, places: Mapping[str, str | None] | None) -> Task:
    """What the contenders of one comparison load."""
    slots = max(workload.capacity or 0, workload.prompt_len + workload.new_tokens)
    dtype = str(model.dtype).removeprefix("torch.")
    return Task("", dtype, str(model.device), workload.batch, slots, lent=model, **(places or {}))


def step_bytes(model: LlamaForCausalLM, workload: Workload) -> int:
    """Bytes of weights and live KV cache that a decode step reads, half way through the workload."""
    batch, itemsize = workload.batch, model.dtype.itemsize
    return weight_bytes_per_step(model, batch) + kv_cache_bytes(model.config, workload.live_tokens, batch, itemsize)


# ---- from timed runs to figures --------------------------------------------------------------------------------------


def entries(
    workload: Workload,
    results: Results,
    bound: Bound,
    parities: Mapping[str, Parity | None],
    info: Mapping[str, Any],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """fastllama's figures, and under ``peers`` those of the others, or why there are none."""
    reference = next(iter(results.runs.values()))[0].tokens
    assert reference is not None
    found = {}
    for name, runs in results.runs.items():
        seconds = results.first_seconds[name]
        found[name] = figures(name, runs, seconds, workload, bound, parities[name], reference[0])
    ours, *others = found.values()
    speed = ours["tokens_per_second"]
    peers = {
        each["name"]: each
        | {"ratio": speed / each["tokens_per_second"] if each["tokens_per_second"] else None, "info": info[each["name"]]}
        for each in others
    }
    return ours | {"peers": peers | {name: {"unavailable": why} for name, why in missing.items()}}


def figures(
    name: str,
    runs: Sequence[Decode],
    first_run_s: float,
    workload: Workload,
    bound: Bound,
    parity: Parity | None,
    reference: Sequence[int],
) -> dict[str, Any]:
    """What the runs of one contender come to; the fields are explained in docs/measuring.md."""
    steps = [seconds for run in runs for seconds in run.tpot]
    ttft_ms = quantiles([1e3 * run.ttft for run in runs])
    tpot_ms = quantiles([1e3 * seconds for seconds in steps]) if steps else None
    achieved = bound.bytes_per_step / (tpot_ms.p50 / 1e3) if tpot_ms else 0.0
    tokens = runs[0].tokens
    return {
        "name": name,
        "ttft_ms": ttft_ms.p50,
        "ttft_ms_quantiles": asdict(ttft_ms),
        "prompt_tokens_per_second": 1e3 * workload.batch * workload.prompt_len / ttft_ms.p50,
        "tpot_ms": asdict(tpot_ms) if tpot_ms else None,
        "tokens_per_second": workload.batch * len(steps) / sum(steps) if steps else 0.0,
        "bandwidth_gb_s": achieved / 1e9,
        "mbu": achieved / bound.bytes_per_second,
        "first_run_s": first_run_s,
        "parity": None if parity is None else parity.passed,
        "parity_detail": None if parity is None else asdict(parity),
        "same_tokens": None if tokens is None else common_prefix(tokens[0], reference),
    }


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two decodes share before the first that differs."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def disturbances(found: Mapping[str, Any], bound: Bound, in_cache: bool) -> list[str]:
    """Why the figures of a run may not hold, one line each."""
    lines = []
    if bound.readings and max(bound.readings) > STEADY * min(bound.readings):
        low, high = min(bound.readings) / 1e9, max(bound.readings) / 1e9
        lines.append(f"the memory bandwidth was between {low:.1f} and {high:.1f} GB/s within the run")
    for each in (found, *found["peers"].values()):
        if each.get("mbu", 0) > 1:
            cause = "a step's bytes fit the processor's cache" if in_cache else "something slowed the readings"
            lines.append(f"{each['name']} reached {100 * each['mbu']:.0f} % of the memory bandwidth: {cause}")
    return lines


# ---- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One decode of a grid.

    Attributes:
        batch, prompt_len, new_tokens, capacity: of its workload.
        beside: slots of a second engine that takes part, where capacities are compared.
    """

    batch: int
    prompt_len: int
    new_tokens: int
    capacity: int | None = None
    beside: int | None = None

    def __str__(self) -> str:
        slots = f", {self.capacity} slots" if self.capacity else ""
        return f"batch {self.batch}, prompt of {self.prompt_len}{slots}"

    def workload(self, vocab_size: int) -> Workload:
        """Its random prompts."""
        return Workload.random(vocab_size, self.batch, self.prompt_len, self.new_tokens, self.capacity)


def grid(
    batches: Sequence[int], prompt_lens: Sequence[int], capacities: Sequence[int | None], new_tokens: int
) -> Iterator[Point]:
    """Every combination; each capacity but the first takes part in one run with the first that holds the tokens."""
    for batch, prompt_len, capacity in itertools.product(batches, prompt_lens, capacities):
        roomy = (slots for slots in capacities if slots and slots >= prompt_len + new_tokens)
        beside = next(roomy, None) if len(capacities) > 1 else None
        yield Point(batch, prompt_len, new_tokens, capacity, None if beside == capacity else beside)


def check_fits(model: LlamaForCausalLM, point: Point) -> None:
    """Raise ValueError for a point that its capacity or, on a CPU, the free memory cannot hold.

    A CPU's system would not refuse such an allocation, but end the process once the memory is written to.
    """
    needed = point.prompt_len + point.new_tokens
    if point.capacity is not None and point.capacity < needed:
        raise ValueError(f"{point.prompt_len} + {point.new_tokens} tokens do not fit {point.capacity} slots")
    if model.device.type == "cpu":
        bucket = 1 << (point.batch - 1).bit_length()  # rows run in powers of two
        nbytes = kv_cache_bytes(model.config, max(needed, point.capacity or 0), bucket, model.dtype.itemsize)
        if nbytes > free_memory():
            raise ValueError(f"the KV cache takes {nbytes / 1e9:.3g} GB, {free_memory() / 1e9:.3g} GB are free")


def measure_point(model: LlamaForCausalLM, point: Point, **settings: Any) -> dict[str, Any]:
    """Compare at one point, from a released engine: a cache that has grown would stay grown."""
    check_fits(model, point)
    model.release()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return compare(model, point.workload(model.config.vocab_size), beside=point.beside, **settings)
