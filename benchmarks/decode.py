"""``bench decode``: fastllama, its peers and the bound interleaved in one run, outputs checked, over a grid."""

import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

from fastllama import LlamaForCausalLM
from fastllama.measure import BandwidthProbe, kv_cache_bytes, last_level_cache, quantiles, weight_bytes_per_step
from fastllama.model.cache import free_memory

from .contenders import GPT_FAST, make, prepare
from .contenders.fastllama import Engine
from .contenders.remote import Remote
from .environment import bandwidth
from .parity import Parity, check_all
from .rounds import Results, Say, interleave
from .workload import Contender, Decode, Task, Workload, reason

IN_A_PROCESS = {GPT_FAST}  # it configures torch, and its modules are called model and generate


class CountedEngine(Engine):
    """The engine, and how many functions and CUDA graphs each of its runs has compiled and recorded."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def run(self, workload: Workload) -> Decode:
        """Decode once."""
        genuine, before, recorded = CUDAGraphTreeManager.record_function, counters["stats"]["unique_graphs"], []

        def record_function(*arguments: Any, **settings: Any) -> Any:
            recorded.append(1)
            return genuine(*arguments, **settings)

        with patch.object(CUDAGraphTreeManager, "record_function", record_function):
            done = super().run(workload)
        self.counts.append((counters["stats"]["unique_graphs"] - before, len(recorded)))
        return done


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: of the device's memory on CUDA, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(
    model: LlamaForCausalLM,
    workload: Workload,
    *,
    rounds: int,
    peers: Sequence[str] = (),
    places: Mapping[str, Any] | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Decode the same workload with the engine and its peers, interleaved; the fields of a record."""
    slots, dtype = workload.capacity or workload.prompt_len + workload.new_tokens, str(model.dtype)[len("torch.") :]
    task = Task("", dtype, str(model.device), workload.batch, slots, lent=model, **(places or {}))
    engine, probe = CountedEngine(), BandwidthProbe(model.device)
    engine.load(task)
    say("first run: fastllama")
    start = time.perf_counter()
    engine.run(workload)
    first_run_s, peak = time.perf_counter() - start, peak_memory(model.device)
    with tempfile.TemporaryDirectory(prefix="fastllama-peers-") as workspace, ExitStack() as stack:
        opened, missing = open_peers(peers, replace(task, workspace=workspace), stack)
        results = interleave([engine, *opened], workload, rounds, say=say, between=probe.sample)
        info = {peer.name: peer.info or None for peer in opened if peer.name in results.runs}
    results.first_seconds[engine.name] = first_run_s
    say("checking the tokens")
    sizes = ("batch", "prompt_len", "new_tokens", "capacity", "live_tokens")
    found = {name: getattr(workload, name) for name in sizes} | bound_of(model, workload, probe)
    compiles, recordings = map(sum, zip(*engine.counts[-rounds:], strict=True))
    found |= {"compiles_after_warmup": compiles, "recordings_after_warmup": recordings}
    found |= {"rounds": rounds, "peak_memory_bytes": peak}
    parities = check_all(model, workload, {name: runs[0].tokens for name, runs in results.runs.items()})
    found |= entries(workload, results, found, parities, info, missing | results.broken)
    return found | {"disturbed": disturbances(found, found["bytes_per_step"] <= last_level_cache(model.device))}


def open_peers(keys: Sequence[str], task: Task, stack: ExitStack) -> tuple[list[Contender], dict[str, str]]:
    """Load peers, which the stack closes, and say of those that cannot be why."""
    opened, missing = [], {}
    for key in keys:
        try:
            contender = Remote(key) if key in IN_A_PROCESS else make(key)
            stack.callback(contender.close)
            contender.load(prepare(key, task))
            opened.append(contender)
        except Exception as error:  # a peer that breaks is a line in the report and does not end the run
            missing[key] = reason(error)
    return opened, missing


def bound_of(model: LlamaForCausalLM, workload: Workload, probe: BandwidthProbe) -> dict[str, Any]:
    """What bounds the decode: the bytes that a step reads, half way through it, and how fast the memory was."""
    kv_bytes = (model.kv_cache_dtype or model.dtype).itemsize
    nbytes = weight_bytes_per_step(model, workload.batch)
    nbytes += kv_cache_bytes(model.config, workload.live_tokens, workload.batch, kv_bytes)
    floor_ms = 1e3 * nbytes / probe.best.bytes_per_second
    return {"bytes_per_step": nbytes, "floor_ms": floor_ms, **bandwidth(probe)}


def entries(
    workload: Workload,
    results: Results,
    bound: Mapping[str, Any],
    parities: Mapping[str, Parity | None],
    info: Mapping[str, Any],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """fastllama's figures, and under ``peers`` those of the others, or why there are none."""
    reference = next(iter(results.runs.values()))[0].tokens
    assert reference is not None
    ours, *others = (
        {"name": name, "first_run_s": results.first_seconds[name], **figures(runs, workload, bound)}
        | agreement(runs[0], parities[name], reference[0])
        for name, runs in results.runs.items()
    )
    for each in others:
        speed = each["tokens_per_second"]
        each |= {"ratio": ours["tokens_per_second"] / speed if speed else None, "info": info[each["name"]]}
    peers = {each["name"]: each for each in others}
    return ours | {"peers": peers | {name: {"unavailable": why} for name, why in missing.items()}}


def figures(runs: Sequence[Decode], workload: Workload, bound: Mapping[str, Any]) -> dict[str, Any]:
    """What the timed runs of one contender come to; docs/measuring.md explains the fields."""
    steps = [seconds for run in runs for seconds in run.tpot]
    ttft_ms = quantiles([1e3 * run.ttft for run in runs])
    tpot_ms = quantiles([1e3 * seconds for seconds in steps]) if steps else None
    achieved = bound["bytes_per_step"] / (tpot_ms.p50 / 1e3) / 1e9 if tpot_ms else 0.0
    return {
        "ttft_ms": ttft_ms.p50,
        "ttft_ms_quantiles": asdict(ttft_ms),
        "prompt_tokens_per_second": 1e3 * workload.batch * workload.prompt_len / ttft_ms.p50,
        "tpot_ms": asdict(tpot_ms) if tpot_ms else None,
        "tokens_per_second": workload.batch * len(steps) / sum(steps) if steps else 0.0,
        "bandwidth_gb_s": achieved,
        "mbu": achieved / bound["memory_bandwidth_gb_s"],
    }


def agreement(run: Decode, parity: Parity | None, reference: Sequence[int]) -> dict[str, Any]:
    """Whether the tokens are right, and how many of the first row equal fastllama's before one differs."""
    if parity is None or run.tokens is None:
        return {"parity": None, "parity_detail": None, "same_tokens": None}
    pairs = zip(run.tokens[0], reference, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {"parity": parity.passed, "parity_detail": asdict(parity), "same_tokens": same}


def disturbances(found: Mapping[str, Any], in_cache: bool) -> list[str]:
    """Why the figures of a run may not hold, one line each."""
    lines = list(found["disturbed"])
    for each in (found, *found["peers"].values()):
        if each.get("mbu", 0) > 1:
            cause = "a step's bytes fit the processor's cache" if in_cache else "something slowed the readings"
            lines.append(f"{each['name']} reached {100 * each['mbu']:.0f} % of the memory bandwidth: {cause}")
    return lines


def workload_of(
    model: LlamaForCausalLM, batch: int, prompt_len: int, new_tokens: int, capacity: int | None
) -> Workload:
    """Random prompts; ValueError where the slots or, on a CPU, the free memory cannot hold the tokens.

    A CPU's system would not refuse such an allocation, but end the process once the memory is written to.
    """
    needed = prompt_len + new_tokens
    if capacity is not None and capacity < needed:
        raise ValueError(f"{prompt_len} + {new_tokens} tokens do not fit {capacity} slots")
    bucket = 1 << (batch - 1).bit_length()  # rows run in powers of two
    nbytes = kv_cache_bytes(model.config, capacity or needed, bucket, (model.kv_cache_dtype or model.dtype).itemsize)
    if model.device.type == "cpu" and nbytes > free_memory():
        raise ValueError(f"the KV cache takes {nbytes / 1e9:.3g} GB, {free_memory() / 1e9:.3g} GB are free")
    return Workload.random(model.config.vocab_size, batch, prompt_len, new_tokens, capacity)
