"""llama.cpp on the same weights, timed by its own ``llama-bench``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama import LlamaForCausalLM
from fastllama.loading.gguf import check_expressible, import_gguf, write_gguf

from ..harness import Run, Unavailable, Workload

NAME = "llama.cpp"
PROGRAM = "llama-bench"
ALL_LAYERS = 99
TOLD = ("build_commit", "build_number", "backends", "n_threads", "n_gpu_layers", "type_k", "type_v", "flash_attn")


def open_llama_bench(model: LlamaForCausalLM, program: str | os.PathLike[str] | None, workspace: Path) -> LlamaBench:
    """Get ready to run ``llama-bench`` on the model's weights, which the first run writes as GGUF.

    Args:
        model: lends weights, dtype and device.
        program: path of ``llama-bench``; None: the one on PATH.
        workspace: folder for the GGUF file, about as large as the weights; ``close`` removes it.

    Raises:
        Unavailable: a program or package is missing, or llama.cpp cannot compute this network.
    """
    found = find_llama_bench(program)
    try:
        check_expressible(model.config, model.dtype)
        import_gguf()
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error
    return LlamaBench(found, workspace / "model.gguf", model.device, partial(write_gguf, model))


def find_llama_bench(program: str | os.PathLike[str] | None = None) -> str:
    """The path of ``llama-bench``.

    Raises:
        Unavailable: there is none.
    """
    found = shutil.which(PROGRAM if program is None else program)
    if found is None and program is None:
        raise Unavailable(f"{PROGRAM} not found on PATH; give it with --{PROGRAM} PATH")
    if found is None:
        raise Unavailable(f"--{PROGRAM} {program}: there is no program that can be run")
    return os.path.abspath(found)


class LlamaBench:
    """A contender that runs ``llama-bench`` on a GGUF file, in new processes for each run.

    Weights have the model's dtype; the KV cache is float16 in any case, llama-bench's default, for it has no float32.
    What it measures is a little less than what others do: it feeds random tokens in place of the prompt's and of those
    it decodes, never picks one, and tells none. Its first token's time is that of the prompt, ``-p``; its steps start
    after the prompt, ``-d``, and are as many as others take after their first token. It sizes its cache itself,
    whatever the workload's capacity.

    Args:
        program: path of ``llama-bench``.
        file: the GGUF file, which the first run writes and ``close`` removes.
        device: where to run: the CPU, with as many threads as torch uses, or one CUDA device.
        write: writes the weights into a file.

    Attributes:
        info: after the first run, build and settings as ``llama-bench`` tells them.
    """

    name = NAME

    def __init__(self, program: str, file: Path, device: torch.device, write: Callable[[Path], None]) -> None:
        self.info: dict[str, Any] = {}
        self._file, self._write, self._is_written = file, write, False
        self._device = device
        self._command = [program, "-m", str(file), "-o", "json", "-r", "1", "-t", str(torch.get_num_threads())]
        self._env = dict(os.environ)
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            self._command += ["-ngl", str(ALL_LAYERS), "-sm", "none", "-mg", str(index)]
        else:
            self._command += ["-ngl", "0"]
            self._env["CUDA_VISIBLE_DEVICES"] = ""  # or it would compute prompts on a GPU all the same

    def run(self, workload: Workload) -> Run:
        """Time the prompt, then the decode steps after it."""
        if workload.batch > 1:
            raise Unavailable(f"{PROGRAM} decodes one sequence at a time, not {workload.batch}")
        if not self._is_written:
            self._write(self._file)
            self._is_written = True
        ttft = self._seconds("-p", str(workload.prompt_len), "-n", "0")
        steps = workload.new_tokens - 1
        if not steps:
            return Run(None, ttft, ())
        seconds = self._seconds("-p", "0", "-n", str(steps), "-d", str(workload.prompt_len))
        return Run(None, ttft, (seconds / steps,))

    def close(self) -> None:
        """Remove the GGUF file."""
        self._file.unlink(missing_ok=True)

    def _seconds(self, *test: str) -> float:
        """What one test took."""
        done = subprocess.run([*self._command, *test], env=self._env, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
            raise Unavailable(f"{PROGRAM} ended with code {done.returncode}: {lines[-1]}")
        try:
            (result,) = json.loads(done.stdout)
            seconds = result["avg_ns"] / 1e9
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable(f"{PROGRAM} printed no result as JSON but {done.stdout[:60]!r}") from error
        self.info = {key: result[key] for key in TOLD if key in result}
        if self._device.type == "cuda" and result.get("backends") == "CPU":
            raise Unavailable(f"this {PROGRAM} is built for the CPU alone; the model is on {self._device}")
        return seconds
