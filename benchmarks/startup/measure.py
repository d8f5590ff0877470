"""How long a fresh process takes to its first token, with empty compile caches and with warm ones.

Every contender starts in processes of its own, with caches of its own in a temporary folder: first on empty ones, then,
by turns with the others, on what was left there. All decode the same prompt from the same files. Libraries and weights
were read once before, so they come from the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllama import LlamaForCausalLM
from fastllama.loading.names import is_random, resolve, resolve_folder

from ..harness import CUDA_CHUNK, Unavailable, Workload, reason
from ..ours import EAGER as EAGER_TITLE
from ..ours import OURS
from ..parity import Parity, check
from ..peers import EAGER, GPT_FAST, LLAMA_CPP, STATIC, TRANSFORMERS, Places
from ..peers.transformers import STATIC as STATIC_TITLE
from .starters import GptFast, LlamaBench, Phases, Script, Started, Starter

EMPTY, WARM = "empty", "warm"
NEW_TOKENS = 8  # of each decode
NEW_TOKENS_ON_CUDA = 2 * CUDA_CHUNK  # gpt-fast's worker times no fewer
READ_BYTES = 1 << 24  # at once
NOWHERE = Places()
SCRIPTS = {OURS: OURS, EAGER: EAGER_TITLE, TRANSFORMERS: TRANSFORMERS, STATIC: STATIC_TITLE}


@dataclass(frozen=True)
class Starts:
    """All processes of one contender.

    Attributes:
        name: for people.
        phases: seconds of each phase, of each process, by the state of its caches.
        parity: whether the tokens are right; None where the contender does not tell them.
    """

    name: str
    phases: dict[str, list[Phases]]
    parity: Parity | None

    def medians(self, caches: str) -> Phases:
        """Each phase's median over the processes that found their caches in this state."""
        processes = self.phases[caches]
        return {name: statistics.median(phases[name] for phases in processes) for name in processes[0]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the medians, and every process beside them."""
        return {
            "phases": {caches: self.medians(caches) for caches in self.phases},
            "samples": self.phases,
            "parity": None if self.parity is None else self.parity.passed,
            "tokens": None if self.parity is None else self.parity.tokens,
        }


@dataclass(frozen=True)
class Startup:
    """What :func:`measure` found.

    Attributes:
        model, dtype, device: what was started.
        config: the model's, as plain values.
        workload: one row.
        starts: one entry per contender, fastllama first.
        missing: contenders that could not be started or broke on the way, and why.
    """

    model: str
    dtype: str
    device: str
    config: dict[str, Any]
    workload: Workload
    starts: tuple[Starts, ...]
    missing: dict[str, str]

    def ratio(self, other: Starts, caches: str) -> float:
        """Another contender's time from process start to first token over fastllama's."""
        theirs, ours = other.medians(caches), self.starts[0].medians(caches)
        return theirs["to_first_token"] / ours["to_first_token"]

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record, fastllama's at the top and the others' under ``peers``."""
        ours, *others = self.starts
        peers: dict[str, Any] = {
            other.name: other.to_dict() | {"ratio": {c: self.ratio(other, c) for c in (EMPTY, WARM)}}
            for other in others
        }
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "config": self.config,
            "prompt_len": self.workload.prompt_len,
            "new_tokens": self.workload.new_tokens,
            "rounds": len(ours.phases[WARM]),
            "cold_rounds": len(ours.phases[EMPTY]),
            **ours.to_dict(),
            "peers": peers | {name: {"unavailable": why} for name, why in self.missing.items()},
        }


def measure(
    name: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    prompt_len: int = 32,
    rounds: int = 3,
    cold_rounds: int = 1,
    peers: Sequence[str] = (),
    places: Places = NOWHERE,
    say: Callable[[str], None] = lambda message: None,
) -> Startup:
    """Start fastllama and its peers by turns.

    Args:
        name: of the model, as ``from_pretrained`` takes it. Random weights are written to files first.
        dtype: of weights and cache; None: the checkpoint's own. Where it is another, a copy in that dtype is started.
        device: as torch names it.
        prompt_len: tokens of the prompt, which is random.
        rounds: processes of each contender on warm caches.
        cold_rounds: processes of each on empty caches, before those.
        peers: names of :data:`fastllama_benchmarks.peers.NAMES`.
        places: of the peers that are no Python packages.
        say: told what is about to run.
    """
    config = resolve(name).config
    dtype = dtype or config.dtype
    new_tokens = NEW_TOKENS_ON_CUDA if device.startswith("cuda") else NEW_TOKENS
    workload = Workload.random(config.vocab_size, 1, prompt_len, new_tokens)
    with tempfile.TemporaryDirectory(prefix="fastllama-startup-") as folder:
        workspace = Path(folder)
        say("reading the weights once")
        weights = stored_weights(name, dtype, workspace)
        starters, missing = open_starters(peers, places, weights, dtype, device, workload, workspace)
        for starter in starters:
            if isinstance(starter, Script):
                say(f"reading the libraries once: {starter.name}")
                _try(starter.import_once, workspace / "rehearsal", starter, missing)
        runs = _start_by_turns(starters, missing, workspace, rounds, cold_rounds, say)
        say("checking the tokens")
        model = LlamaForCausalLM.from_pretrained(weights, dtype=dtype, device=device, progress=False)
        starts = tuple(
            Starts(starter.name, runs[starter.name].phases, _parity(model, workload, runs[starter.name].tokens))
            for starter in starters
            if starter.name not in missing
        )
    return Startup(name, dtype, device, model.config.to_dict(), workload, starts, missing)


def stored_weights(name: str, dtype: str, workspace: Path) -> Path:
    """A folder that holds the checkpoint in this dtype, its files in the page cache."""
    if is_random(name) or resolve(name).config.dtype != dtype:
        folder = workspace / "weights"
        LlamaForCausalLM.from_pretrained(name, dtype=dtype, progress=False).save_pretrained(folder)
    else:
        folder = resolve_folder(name)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            while file.read(READ_BYTES):
                pass
    return folder.resolve()


def open_starters(
    peers: Sequence[str],
    places: Places,
    weights: Path,
    dtype: str,
    device: str,
    workload: Workload,
    workspace: Path,
) -> tuple[list[Starter], dict[str, str]]:
    """fastllama and the peers that can be started, and for each other why it cannot."""

    def open_one(name: str) -> Starter:
        if name in SCRIPTS:
            return Script(SCRIPTS[name], name, weights, dtype, device, workload, workspace)
        model = LlamaForCausalLM.from_pretrained(weights, dtype=dtype, progress=False)
        if name == GPT_FAST:
            return _gpt_fast(model, places.gpt_fast, weights, device, workload, workspace)
        return _llama_bench(model, places.llama_bench, device, workload, workspace)

    starters: list[Starter] = [open_one(OURS)]
    missing: dict[str, str] = {}
    for name in peers:
        try:
            starters.append(open_one(name))
        except Exception as error:  # whatever breaks a peer is told and does not end the run
            missing[name] = reason(error)
    return starters, missing


def _gpt_fast(
    model: LlamaForCausalLM, folder: Path | None, weights: Path, device: str, workload: Workload, workspace: Path
) -> Starter:
    from ..peers.gpt_fast import FILES, check_expressible

    if folder is None:
        raise Unavailable("give a checkout of gpt-fast with --gpt-fast DIR")
    if absent := [file for file in FILES if not (folder / file).is_file()]:
        raise Unavailable(f"{folder} is no checkout of gpt-fast: it has no {' and no '.join(absent)}")
    check_expressible(model.config, model.dtype)
    empty = workspace / GPT_FAST
    empty.mkdir()
    return GptFast(folder, weights, device, workload, empty)


def _llama_bench(
    model: LlamaForCausalLM, program: Path | None, device: str, workload: Workload, workspace: Path
) -> Starter:
    from fastllama.loading.gguf import write_gguf

    from ..peers.llama_cpp import find_llama_bench

    found = find_llama_bench(program)
    file = workspace / f"{LLAMA_CPP}.gguf"
    write_gguf(model, file)
    return LlamaBench(found, file, device, workload)


@dataclass
class _Runs:
    phases: dict[str, list[Phases]] = field(default_factory=lambda: {EMPTY: [], WARM: []})
    tokens: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, caches: str, started: Started) -> None:
        self.phases[caches].append(started.phases)
        if started.tokens is not None:
            self.tokens.add(started.tokens)


def _start_by_turns(
    starters: Sequence[Starter],
    missing: dict[str, str],
    workspace: Path,
    rounds: int,
    cold_rounds: int,
    say: Callable[[str], None],
) -> dict[str, _Runs]:
    """Start every contender once a round, in the order A B B A …; those that fail move to ``missing``."""
    runs = {starter.name: _Runs() for starter in starters}
    folders = {starter.name: str(at) for at, starter in enumerate(starters)}  # not names: compilers trip over spaces
    for number in range(cold_rounds + rounds):
        state = EMPTY if number < cold_rounds else WARM
        for starter in starters if number % 2 == 0 else starters[::-1]:
            if starter.name in missing:
                continue
            say(f"process {number + 1} of {cold_rounds + rounds}, {state} caches: {starter.name}")
            caches = workspace / f"caches-{folders[starter.name]}-{min(number, cold_rounds - 1)}"
            started = _try(starter.start, caches, starter, missing)
            if started is not None:
                runs[starter.name].add(state, started)
    return runs


def _try(start: Callable[[Path], Any], caches: Path, starter: Starter, missing: dict[str, str]) -> Any:
    try:
        return start(caches)
    except Exception as error:  # whatever breaks a peer is told and does not end the run
        if starter.name == OURS:
            raise
        missing[starter.name] = reason(error)
        return None


def _parity(model: LlamaForCausalLM, workload: Workload, outputs: Iterable[tuple[int, ...]]) -> Parity | None:
    """Of all the outputs of one contender the worst."""
    found = [check(model, workload.prompts, [tokens], workload.new_tokens) for tokens in outputs]
    return min(found, key=lambda parity: parity.passed, default=None)
