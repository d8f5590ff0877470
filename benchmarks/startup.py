"""``bench startup``: how long a fresh process takes to its first token, with empty compile caches and with warm ones.

Every contender starts in processes of its own, with caches of its own: first on empty ones, then, interleaved with the
others, on what was left there. Libraries and weights were read once before, so they come from the page cache.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from fastllama import LlamaForCausalLM
from fastllama.loading.names import is_random, resolve, resolve_path
from fastllama.measure import BandwidthProbe

from .contenders import FASTLLAMA, LLAMA_CPP, prepare, title_of
from .contenders.llama_cpp import LlamaCpp
from .contenders.remote import Remote, worker_environment
from .environment import bandwidth
from .parity import check
from .records import weight_fields
from .rounds import Say, interleave
from .workload import Contender, Task, Workload

EMPTY, WARM = "empty", "warm"
NEW_TOKENS = 8  # of each decode
SETTLING_RUNS = 3  # after the first; CUDA graphs are recorded in the second and third
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
SLOWING = ("TORCH_COMPILE_DEBUG", "TORCH_LOGS", "TORCH_TRACE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")

Phases = dict[str, float]
Tokens = tuple[int, ...] | None


class Starter(Contender):
    """A contender that starts for each decode again, the first time only to have its files in the page cache."""

    def __init__(self, key: str, task: Task, caches: str, cold_rounds: int) -> None:
        self.name, self._task, self._caches, self._cold_rounds, self._runs = key, task, caches, cold_rounds, 0

    def run(self, workload: Workload) -> Any:
        """The phases of a process and its tokens; on caches of its own while these are to be empty."""
        self._runs += 1
        if self._runs == 1:
            self._task = replace(prepare(self.name, self._task), lent=None)
            if self.name != LLAMA_CPP:
                with closing(Remote(self.name)) as worker:
                    worker.load(self._task)
                    assert worker.info
            return None
        number = min(self._runs - 1, self._cold_rounds)
        return start(self.name, self._task, workload, Path(f"{self._caches}-{number}"))


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
        runs = []
        for _ in range(1 + SETTLING_RUNS):
            begin = time.perf_counter()
            runs.append((worker.run(workload), time.perf_counter() - begin))
    (first, whole), *_, (settled, usual) = runs
    ready = sum(phases.values())
    phases |= {
        "compile": max(whole - usual, 0.0),
        "first_token": settled.ttft,
        "to_first_token": ready + first.ttft,
        "to_last_token": ready + whole,
    }
    return phases, settled.tokens[0] if settled.tokens else None


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
    dtype = source.dtype(dtype)
    workload = Workload.random(source.config.vocab_size, 1, prompt_len, NEW_TOKENS)
    with tempfile.TemporaryDirectory(prefix="fastllama-startup-") as folder:
        say("reading the weights once")  # which brings the files into the page cache
        weights = stored_weights(name, dtype, Path(folder))
        model = LlamaForCausalLM.from_pretrained(weights, dtype=dtype, device=device, progress=False)
        slots = prompt_len + NEW_TOKENS
        task = Task(str(weights), dtype, device, 1, slots, workspace=folder, lent=model, **(places or {}))
        keys, caches = (FASTLLAMA, *peers), f"{folder}/caches"  # by number: compilers trip over spaces
        starters = [Starter(key, task, f"{caches}-{at}", cold_rounds) for at, key in enumerate(keys)]
        results = interleave(starters, workload, cold_rounds + rounds, warmups=1, say=say)
        say("checking the tokens")
        found = {key: figures(runs, cold_rounds, model, workload) for key, runs in results.runs.items()}
    ours = found.pop(FASTLLAMA)
    return weight_fields(name, model) | bandwidth(BandwidthProbe(device)) | ours | {
        "prompt_len": prompt_len, "new_tokens": NEW_TOKENS, "rounds": rounds, "cold_rounds": cold_rounds,
        "peers": {title_of(key): each | {"ratio": ratios(each, ours)} for key, each in found.items()}
        | {key: {"unavailable": why} for key, why in results.broken.items()},
    }  # fmt: skip


def figures(runs: Sequence[Any], cold_rounds: int, model: LlamaForCausalLM, workload: Workload) -> dict[str, Any]:
    """The fields of one contender: median phases, every process, and whether all tokens are right."""
    phases = [each for each, _ in runs]
    samples = {EMPTY: phases[:cold_rounds], WARM: phases[cold_rounds:]}
    medians = {caches: pd.DataFrame(found).median().to_dict() for caches, found in samples.items()}
    outputs = {tokens for _, tokens in runs if tokens is not None}
    checked = [check(model, workload.prompts, [tokens], workload.new_tokens).passed for tokens in outputs]
    parity = all(checked) if checked else None
    return {"phases": medians, "samples": samples, "parity": parity, "tokens": len(checked) and workload.new_tokens}


def ratios(other: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """Another contender's time to the first token over fastllama's, by the state of the caches."""
    first = "to_first_token"
    return {caches: other["phases"][caches][first] / ours["phases"][caches][first] for caches in (EMPTY, WARM)}


def stored_weights(name: str, dtype: str, workspace: Path) -> Path:
    """A folder that holds the checkpoint in this dtype."""
    if is_random(name) or resolve(name).dtype() != dtype or resolve_path(name).is_file():
        folder = workspace / "weights"
        LlamaForCausalLM.from_pretrained(name, dtype=dtype, progress=False).save_pretrained(folder)
    else:
        folder = resolve_path(name)
    return folder.resolve()
