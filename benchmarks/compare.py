"""fastllama, its peers and the floor in one run on one machine, outputs checked."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllama import LlamaForCausalLM
from fastllama.measure import Bandwidth, BandwidthProbe, kv_cache_bytes, weight_bytes_per_step

from .costs import Compilations, peak_memory
from .figures import Figures, figures
from .harness import WARMUP_RUNS, Contender, Results, Workload, interleave
from .ours import Engine
from .parity import Parity, check
from .peers import Places, open_peers


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured.

    Attributes:
        workload: what everyone decoded.
        rounds: timed runs of each.
        figures: one entry per contender, fastllama first.
        missing: contenders that did not run or broke on the way, and why.
        info: what contenders say of themselves, such as their revision.
        bandwidth: memory bandwidth, measured between the rounds.
        bytes_per_step: weights and live KV cache that one step reads, half way through the decode.
        peak_memory_bytes: at most in use until fastllama had decoded once, before any peer was opened.
        after_warmup: what fastllama's timed runs compiled and recorded.
    """

    workload: Workload
    rounds: int
    figures: tuple[Figures, ...]
    bandwidth: Bandwidth
    bytes_per_step: int
    peak_memory_bytes: int | None
    after_warmup: Compilations
    missing: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def floor_ms(self) -> float:
        """Milliseconds per step if only reading its bytes took time."""
        return 1e3 * self.bytes_per_step / self.bandwidth.bytes_per_second

    @property
    def parity(self) -> Parity:
        """The gate that fastllama's outputs must pass for the figures to count."""
        parity = self.figures[0].parity
        assert parity is not None
        return parity

    def ratio(self, other: Figures) -> float | None:
        """Tokens per second of fastllama over those of another contender."""
        theirs = other.tokens_per_second
        return self.figures[0].tokens_per_second / theirs if theirs else None

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record, fastllama's at the top and the others' under ``peers``."""
        ours, *others = self.figures
        peers: dict[str, Any] = {
            other.name: other.to_dict() | {"ratio": self.ratio(other), "info": self.info.get(other.name)}
            for other in others
        }
        peers |= {name: {"unavailable": why} for name, why in self.missing.items()}
        return ours.to_dict() | {
            "batch": self.workload.batch,
            "prompt_len": self.workload.prompt_len,
            "new_tokens": self.workload.new_tokens,
            "capacity": self.workload.capacity,
            "rounds": self.rounds,
            "bytes_per_step": self.bytes_per_step,
            "memory_bandwidth_gb_s": self.bandwidth.bytes_per_second / 1e9,
            "memory_bandwidth_method": self.bandwidth.method,
            "floor_ms": self.floor_ms,
            "peak_memory_bytes": self.peak_memory_bytes,
            "compiles_after_warmup": self.after_warmup.graphs,
            "recordings_after_warmup": self.after_warmup.recordings,
            "peers": peers,
        }


def compare(
    model: LlamaForCausalLM,
    workload: Workload,
    *,
    rounds: int,
    warmups: int = WARMUP_RUNS,
    peers: Sequence[str] = (),
    places: Places | None = None,
    others: Sequence[Contender] = (),
    say: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Decode the same workload with the engine and its peers by turns.

    Args:
        model: the model; its engine compiles now if it has not yet.
        workload: what to decode.
        rounds: timed runs of each.
        warmups: unmeasured runs of each before them, of fastllama one more.
        peers: names of :data:`fastllama_benchmarks.peers.NAMES`.
        places: of the peers that are no Python packages.
        others: further contenders, which the caller opens and closes.
        say: told what is about to run.
    """
    engine = Engine(model)
    say("first run: fastllama")
    start = time.perf_counter()
    engine.run(workload)
    first_run_s, peak = time.perf_counter() - start, peak_memory(model.device)
    probe = BandwidthProbe(model.device)
    with tempfile.TemporaryDirectory(prefix="fastllama-peers-") as workspace:
        opened, missing = open_peers(peers, model, workload, places or Places(), Path(workspace))
        try:
            contenders = [engine, *others, *opened]
            results = interleave(contenders, workload, rounds, warmups=warmups, say=say, between=probe.sample)
            info = {peer.name: getattr(peer, "info", None) for peer in opened if peer.name in results.runs}
        finally:
            for peer in opened:
                peer.close()
    results.first_seconds[engine.name] = first_run_s
    say("checking the tokens")
    bytes_per_step = step_bytes(model, workload)
    return Comparison(
        workload,
        rounds,
        _figures(model, workload, results, bytes_per_step, probe.best),
        probe.best,
        bytes_per_step,
        peak,
        _total(engine.costs[-rounds:]),
        missing | results.broken,
        info,
    )


def step_bytes(model: LlamaForCausalLM, workload: Workload) -> int:
    """Bytes of weights and live KV cache that a decode step reads, half way through the workload."""
    batch, itemsize = workload.batch, model.dtype.itemsize
    return weight_bytes_per_step(model, batch) + kv_cache_bytes(model.config, workload.live_tokens, batch, itemsize)


def _figures(
    model: LlamaForCausalLM, workload: Workload, results: Results, bytes_per_step: int, bandwidth: Bandwidth
) -> tuple[Figures, ...]:
    reference = next(iter(results.runs.values()))[0].tokens
    assert reference is not None
    parities = check_all(model, workload, {name: runs[0].tokens for name, runs in results.runs.items()})
    return tuple(
        figures(
            name,
            runs,
            results.first_seconds[name],
            batch=workload.batch,
            bytes_per_step=bytes_per_step,
            bytes_per_second=bandwidth.bytes_per_second,
            parity=parities[name],
            reference=reference[0],
        )
        for name, runs in results.runs.items()
    )


def check_all(
    model: LlamaForCausalLM, workload: Workload, tokens: dict[str, tuple[tuple[int, ...], ...] | None]
) -> dict[str, Parity | None]:
    """The parity of each contender's tokens; None for those that tell none. Equal tokens are checked once."""
    checked = {
        rows: check(model, workload.prompts, rows, workload.new_tokens)
        for rows in set(tokens.values())
        if rows is not None
    }
    return {name: None if rows is None else checked[rows] for name, rows in tokens.items()}


def _total(costs: Sequence[Compilations]) -> Compilations:
    return Compilations(sum(cost.graphs for cost in costs), sum(cost.recordings for cost in costs))
