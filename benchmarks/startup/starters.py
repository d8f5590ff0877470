"""Contenders that are started, not run: each in a new process, timed from outside or phase by phase from within."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..harness import Run, Unavailable, Workload
from ..peers import gpt_fast, llama_cpp
from ..peers.gpt_fast_worker import Task
from ..remote import Remote, worker_environment

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
SLOWING = ("TORCH_COMPILE_DEBUG", "TORCH_LOGS", "TORCH_TRACE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")
RUNNER = Path(__file__).with_name("runner.py")
ROOT = Path(__file__).resolve().parents[2]
SETTLING_RUNS = 3  # after the first, as in the runner
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")

Phases = dict[str, float]


@dataclass(frozen=True)
class Started:
    """What one process came to.

    Attributes:
        phases: seconds, by the names that :func:`runner.phases_of` explains; at least ``to_first_token``.
        tokens: new token ids of the row; None where the contender does not tell them.
    """

    phases: Phases
    tokens: tuple[int, ...] | None


class Starter(Protocol):
    """A contender that can be started again and again."""

    name: str

    def start(self, caches: Path) -> Started:
        """Decode in a new process whose compile caches lie in this folder.

        Raises:
            Unavailable: the process failed; the message is one line.
        """
        ...


class Script:
    """A contender of ``runner.py``.

    Args:
        name: for people.
        contender: a key of the runner's ``OPENERS``.
        folder: of the checkpoint.
        dtype: of weights and cache.
        device: as torch names it.
        workload: one row.
        workspace: folder for the task's file.
    """

    def __init__(
        self, name: str, contender: str, folder: Path, dtype: str, device: str, workload: Workload, workspace: Path
    ) -> None:
        self.name = name
        self._file = workspace / f"{contender}.json"
        self._task = {
            "contender": contender,
            "folder": str(folder),
            "dtype": dtype,
            "device": device,
            "prompt": workload.prompts[0],
            "new_tokens": workload.new_tokens,
        }

    def import_once(self, caches: Path) -> None:
        """Only import, so that the libraries' files are in the page cache from then on."""
        self._run(self._task | {"folder": None}, caches)

    def start(self, caches: Path) -> Started:
        """Decode in a new process."""
        outcome = json.loads(self._run(self._task, caches).splitlines()[-1])
        return Started(outcome["phases"], tuple(outcome["tokens"]))

    def _run(self, task: Mapping[str, object], caches: Path) -> str:
        self._file.write_text(json.dumps(dict(task) | {"spawned": time.time()}))
        return _output([sys.executable, str(RUNNER), str(self._file)], environment(caches))


class GptFast:
    """The worker that decodes with gpt-fast. Its start, imports and loading are not told apart: ``load`` is them all.

    Args:
        folder: the checkout of gpt-fast.
        weights: folder of the checkpoint.
        device: as torch names it.
        workload: one row.
        workspace: an empty folder to start in.
    """

    name = gpt_fast.NAME

    def __init__(self, folder: Path, weights: Path, device: str, workload: Workload, workspace: Path) -> None:
        slots = workload.prompt_len + workload.new_tokens
        task = Task(str(folder.resolve()), str(weights), device, torch.get_num_threads(), 1, slots)
        self._command = [sys.executable, "-m", f"{gpt_fast.__package__}.gpt_fast_worker", json.dumps(asdict(task))]
        self._workload, self._workspace = workload, workspace

    def start(self, caches: Path) -> Started:
        """Decode in a new process."""
        spawned = time.perf_counter()
        worker = Remote(self.name, self._command, env=environment(caches), cwd=self._workspace)
        try:
            assert worker.info is not None
            ready = time.perf_counter()
            first, first_seconds = self._timed(worker)
            for _ in range(SETTLING_RUNS):
                settled, settled_seconds = self._timed(worker)
        finally:
            worker.close()
        phases = {
            "load": ready - spawned,
            "compile": max(first_seconds - settled_seconds, 0.0),
            "first_token": settled.ttft,
            "to_first_token": ready - spawned + first.ttft,
            "to_last_token": ready - spawned + first_seconds,
        }
        return Started(phases, settled.tokens[0] if settled.tokens else None)

    def _timed(self, worker: Remote) -> tuple[Run, float]:
        start = time.perf_counter()
        run = worker.run(self._workload)
        return run, time.perf_counter() - start


class LlamaBench:
    """``llama-bench`` on a prompt, as a whole: start, load and prompt are not told apart, and it tells no tokens.

    Args:
        program: path of ``llama-bench``.
        file: the weights as GGUF.
        device: ``cpu``, or CUDA's.
        workload: one row.
    """

    name = llama_cpp.NAME

    def __init__(self, program: str, file: Path, device: str, workload: Workload) -> None:
        layers = "0" if device == "cpu" else str(llama_cpp.ALL_LAYERS)
        self._command = [program, "-m", str(file), "-r", "1", "-t", str(torch.get_num_threads()), "-ngl", layers]
        self._command += ["-p", str(workload.prompt_len), "-n", "0"]
        told = subprocess.run([program, "--help"], capture_output=True, text=True)
        if "--no-warmup" not in told.stdout + told.stderr:
            raise Unavailable(f"this {llama_cpp.PROGRAM} has no --no-warmup: it would run the prompt twice")
        self._command.append("--no-warmup")
        self._hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}

    def start(self, caches: Path) -> Started:
        """Run the prompt in a new process."""
        start = time.perf_counter()
        _output(self._command, environment(caches) | self._hidden)
        return Started({"to_first_token": time.perf_counter() - start}, None)


def environment(caches: Path) -> dict[str, str]:
    """This process's environment with compile caches in a folder, offline, and without what makes compiling slow."""
    env = {name: value for name, value in worker_environment(ROOT, ROOT / "kernels").items() if name not in SLOWING}
    return env | {name: str(caches / name.lower()) for name in CACHES} | {"HF_HUB_OFFLINE": "1"}


def _output(command: list[str], env: Mapping[str, str]) -> str:
    program = os.path.basename(command[1] if command[0] == sys.executable else command[0])
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{program} ended with code {done.returncode}: {last_words(done.stderr)}")
    return done.stdout


def last_words(stderr: str) -> str:
    """The line that says why a process ended: the last that names an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it wrote nothing"]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1])
