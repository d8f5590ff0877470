"""``bench startup``: how long a fresh process takes to its first token, with empty compile caches and with warm ones.

Every contender starts in processes of its own, with caches of its own: first on empty ones, then, interleaved with the
others, on what was left there. Libraries and weights were read once before, so they come from the page cache.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastllama import LlamaForCausalLM
from fastllama.loading.names import is_random, resolve, resolve_path
from fastllama.measure import BandwidthProbe

from .contenders import FASTLLAMA, LLAMA_CPP, Task, prepare, title_of
from .contenders.llama_cpp import LlamaCpp
from .contenders.remote import Remote, worker_environment
from .parity import check
from .rounds import Say
from .workload import Decode, Workload, reason

EMPTY, WARM = "empty", "warm"
NEW_TOKENS = 8  # of each decode
SETTLING_RUNS = 3  # after the first; CUDA graphs are recorded in the second and third
READ_BYTES = 1 << 24  # at once
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
SLOWING = ("TORCH_COMPILE_DEBUG", "TORCH_LOGS", "TORCH_TRACE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")

Phases = dict[str, float]


Tokens = tuple[int, ...] | None
Starts = dict[str, list[tuple[Phases, Tokens]]]  # all processes of one contender by the state of its caches


def figures(starts: Starts, model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """The fields of one contender: median phases, every process, and whether all tokens are right."""
    samples = {caches: [phases for phases, _ in processes] for caches, processes in starts.items()}
    medians = {
        caches: {name: statistics.median(phases[name] for phases in found) for name in found[0]}
        for caches, found in samples.items()
    }
    outputs = {tokens for processes in starts.values() for _, tokens in processes if tokens is not None}
    checked = [check(model, workload.prompts, [tokens], workload.new_tokens).passed for tokens in outputs]
    parity = all(checked) if checked else None
    return {"phases": medians, "samples": samples, "parity": parity, "tokens": len(checked) and workload.new_tokens}


def start(key: str, task: Task, workload: Workload, caches: Path) -> tuple[Phases, Tokens]:
    """Decode in a new process whose compile caches lie in this folder; its phases in seconds, and its tokens.

    ``interpreter``: until its first line runs. ``import``, ``load``: of the library, of the weights onto the device.
    ``compile``: what the first call takes longer than a settled one. ``first_token``: of a settled call.
    ``to_first_token``, ``to_last_token``: from the start of the process, of the first call. llama-bench is timed as a
    whole, and reports no tokens.
    """
    if key == LLAMA_CPP:
        program = LlamaCpp()
        program.load(task)
        return {"to_first_token": program.start(workload, environment(caches))}, None
    with closing(Remote(key, env=environment(caches))) as worker:
        worker.load(task)
        phases: Phases = dict(worker.info["phases"])
        (first, whole), *_, (settled, usual) = [_run(worker, workload) for _ in range(1 + SETTLING_RUNS)]
    ready = sum(phases.values())
    phases |= {
        "compile": max(whole - usual, 0.0),
        "first_token": settled.ttft,
        "to_first_token": ready + first.ttft,
        "to_last_token": ready + whole,
    }
    return phases, settled.tokens[0] if settled.tokens else None


def _run(worker: Remote, workload: Workload) -> tuple[Decode, float]:
    begin = time.perf_counter()
    return worker.run(workload), time.perf_counter() - begin


def rehearse(key: str, task: Task) -> None:
    """Import and load once, so that the libraries' files are in the page cache from then on."""
    if key != LLAMA_CPP:
        with closing(Remote(key)) as worker:
            worker.load(task)
            assert worker.info


def environment(caches: Path) -> dict[str, str]:
    """A worker's environment with compile caches in a folder, offline, and without what makes compiling slow."""
    env = {name: value for name, value in worker_environment().items() if name not in SLOWING}
    return env | {name: str(caches / name.lower()) for name in CACHES} | {"HF_HUB_OFFLINE": "1"}


def measure(
    name: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    prompt_len: int = 32,
    rounds: int = 3,
    cold_rounds: int = 1,
    peers: Sequence[str] = (),
    places: Mapping[str, Any] | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Start fastllama and its peers, interleaved; the fields of a record."""
    source = resolve(name)
    config, dtype = source.config, source.dtype(dtype)
    workload = Workload.random(config.vocab_size, 1, prompt_len, NEW_TOKENS)
    with tempfile.TemporaryDirectory(prefix="fastllama-startup-") as folder:
        say("reading the weights once")
        weights = stored_weights(name, dtype, Path(folder))
        model = LlamaForCausalLM.from_pretrained(weights, dtype=dtype, device=device, progress=False)
        slots = prompt_len + NEW_TOKENS
        task = Task(str(weights), dtype, device, 1, slots, workspace=folder, lent=model, **(places or {}))
        starts, missing = start_interleaved((FASTLLAMA, *peers), task, workload, (cold_rounds, rounds), say)
        say("checking the tokens")
        found = {key: figures(each, model, workload) for key, each in starts.items() if key not in missing}
        probe = BandwidthProbe(device)
    ours = found.pop(FASTLLAMA)
    return {
        "model": name, "dtype": dtype, "device": device, "config": model.config.to_dict(),
        "prompt_len": prompt_len, "new_tokens": NEW_TOKENS, "rounds": rounds, "cold_rounds": cold_rounds,
        "memory_bandwidth_gb_s": probe.best.bytes_per_second / 1e9,
        "memory_bandwidth_method": probe.best.method,
        **ours,
        "peers": {title_of(key): each | {"ratio": ratios(each, ours)} for key, each in found.items()}
        | {key: {"unavailable": why} for key, why in missing.items()},
    }  # fmt: skip


def ratios(other: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """Another contender's time to the first token over fastllama's, by the state of the caches."""
    first = "to_first_token"
    return {caches: other["phases"][caches][first] / ours["phases"][caches][first] for caches in (EMPTY, WARM)}


def stored_weights(name: str, dtype: str, workspace: Path) -> Path:
    """A folder that holds the checkpoint in this dtype, its files in the page cache."""
    if is_random(name) or resolve(name).dtype() != dtype or resolve_path(name).is_file():
        folder = workspace / "weights"
        LlamaForCausalLM.from_pretrained(name, dtype=dtype, progress=False).save_pretrained(folder)
    else:
        folder = resolve_path(name)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            while file.read(READ_BYTES):
                pass
    return folder.resolve()


def start_interleaved(
    keys: Sequence[str], task: Task, workload: Workload, rounds: tuple[int, int], say: Say
) -> tuple[dict[str, Starts], dict[str, str]]:
    """Start every contender once a round, in the order A B B A …, first on empty caches; and say why some did not."""
    starts: dict[str, Starts] = {key: {EMPTY: [], WARM: []} for key in keys}
    missing, tasks = {}, {}
    for number in range(-1, sum(rounds)):
        state = EMPTY if number < rounds[0] else WARM
        for at, key in list(enumerate(keys))[:: 1 if number % 2 == 0 else -1]:
            if key in missing:
                continue
            say(f"process {number + 1} of {sum(rounds)}, {state} caches: {key}")
            caches = Path(task.workspace) / f"caches-{at}-{min(number, rounds[0] - 1)}"  # compilers trip over spaces
            try:
                if number < 0:
                    tasks[key] = replace(prepare(key, task), lent=None)
                    rehearse(key, tasks[key])
                else:
                    starts[key][state].append(start(key, tasks[key], workload, caches))
            except Exception as error:
                if key == FASTLLAMA:
                    raise
                missing[key] = reason(error)
    return starts, missing
