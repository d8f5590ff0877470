"""llama.cpp on the same weights, timed by its own ``llama-bench``."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..workload import Contender, Decode, Task, Unavailable, Workload
from . import LLAMA_CPP
from .remote import last_words

PROGRAM = "llama-bench"
ALL_LAYERS = 99
REPORTED = ("build_commit", "build_number", "backends", "n_threads", "n_gpu_layers", "type_k", "type_v", "flash_attn")


def prepare(task: Task) -> Task:
    """Write the weights as GGUF; the task that is returned names the file and the program."""
    from fastllama.loading.gguf_writer import write_gguf

    if task.batch > 1:
        raise Unavailable(f"{PROGRAM} decodes one sequence at a time, not {task.batch}")
    program = find_llama_bench(task.llama_bench)
    file = Path(task.workspace).resolve() / "model.gguf"
    try:
        write_gguf(task.weights(), file)
    except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
        raise Unavailable(str(error)) from error
    return replace(task, model=str(file), llama_bench=program, lent=None)


def find_llama_bench(program: str | None = None) -> str:
    """The path of ``llama-bench``."""
    if found := shutil.which(program or PROGRAM):
        return os.path.abspath(found)
    if program is None:
        raise Unavailable(f"{PROGRAM} not found on PATH; give it with --{PROGRAM} PATH")
    raise Unavailable(f"--{PROGRAM} {program}: there is no program that can be run")


class LlamaCpp(Contender):
    """Runs ``llama-bench`` on a GGUF file, in new processes for each run.

    It measures a little less than what others do: it feeds random tokens, never picks one, and reports none. Its first
    token's time is that of the prompt, ``-p``; its steps start after it, ``-d``. Its KV cache is float16.
    """

    name = LLAMA_CPP

    def load(self, task: Task) -> None:
        """Build the command: the CPU with as many threads as torch uses, or one CUDA device."""
        device, threads = torch.device(task.device), task.threads or torch.get_num_threads()
        assert task.llama_bench is not None
        self._is_cuda, self._program = device.type == "cuda", task.llama_bench
        self._command = [self._program, "-m", task.model, "-o", "json", "-r", "1", "-t", str(threads)]
        self._hidden = {} if self._is_cuda else {"CUDA_VISIBLE_DEVICES": ""}  # or it would use a GPU for prompts
        self._command += ["-ngl", str(ALL_LAYERS) if self._is_cuda else "0"]
        if self._is_cuda:
            index = device.index if device.index is not None else torch.cuda.current_device()
            self._command += ["-sm", "none", "-mg", str(index)]

    def run(self, workload: Workload) -> Decode:
        """Time the prompt, then the decode steps after it."""
        ttft = self._seconds("-p", str(workload.prompt_len), "-n", "0")
        if not (steps := workload.new_tokens - 1):
            return Decode(None, ttft, ())
        seconds = self._seconds("-p", "0", "-n", str(steps), "-d", str(workload.prompt_len))
        return Decode(None, ttft, (seconds / steps,))

    def start(self, workload: Workload, env: Mapping[str, str]) -> float:
        """Seconds of a whole new process that computes the prompt once."""
        shown = subprocess.run([self._program, "--help"], capture_output=True, text=True)
        if "--no-warmup" not in shown.stdout + shown.stderr:
            raise Unavailable(f"this {PROGRAM} has no --no-warmup: it would run the prompt twice")
        start = time.perf_counter()
        self._output(["-p", str(workload.prompt_len), "-n", "0", "--no-warmup"], env)
        return time.perf_counter() - start

    def _seconds(self, *test: str) -> float:
        printed = self._output(test, os.environ)
        try:
            (result,) = json.loads(printed)
            seconds = result["avg_ns"] / 1e9
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable(f"{PROGRAM} printed no result as JSON but {printed[:60]!r}") from error
        self.info = {key: result[key] for key in REPORTED if key in result}
        if self._is_cuda and result.get("backends") == "CPU":
            raise Unavailable(f"this {PROGRAM} is built for the CPU alone; the model is on CUDA")
        return seconds

    def _output(self, test: Sequence[str], env: Mapping[str, str]) -> str:
        done = subprocess.run([*self._command, *test], env={**env, **self._hidden}, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{PROGRAM} ended with code {done.returncode}: {last_words(done.stderr)}")
        return done.stdout
