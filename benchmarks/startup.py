"""How long from starting Python to the first token, with empty compile caches and with warm ones?

    python benchmarks/startup.py --model random:llama-3.2-1b

Runs a fresh process twice on compile caches of its own: first empty, then as the first process left them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


def main(
    model: Annotated[str, typer.Option(help="As for fastllama bench.")] = "random:llama-3.2-1b",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    prompt_len: Annotated[int, typer.Option(min=1)] = 32,
    child: Annotated[bool, typer.Option(hidden=True, help="Measure this process.")] = False,
) -> None:
    """Seconds of each phase, with empty and with warm caches."""
    if child:
        typer.echo(json.dumps(phases(model, dtype, prompt_len)))
        return
    command = [sys.executable, __file__, "--child", "--model", model, "--dtype", dtype, "--prompt-len", str(prompt_len)]
    record = {"model": model, "dtype": dtype, "prompt_len": prompt_len}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {name: str(Path(folder) / name) for name in CACHES}
        for caches in ("empty", "warm"):
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            record[caches] = json.loads(done.stdout.splitlines()[-1])
            seconds = ", ".join(f"{name} {value:.2f} s" for name, value in record[caches].items())
            typer.echo(f"{caches} caches: {seconds}")
    typer.echo(json.dumps(record))


def phases(model: str, dtype: str, prompt_len: int) -> dict[str, float]:
    """Seconds to import, load, decode the first token (compiling) and the second, of this process."""
    times = [time.perf_counter()]
    import torch

    from fastllama import LlamaForCausalLM

    times.append(time.perf_counter())
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=dtype)
    times.append(time.perf_counter())
    prompt = torch.randint(loaded.config.vocab_size, (1, prompt_len), generator=torch.Generator().manual_seed(0))
    for _ in loaded.stream(prompt, max_new_tokens=2, eos_token_id=()):
        times.append(time.perf_counter())
    names = ("import", "load", "first_token", "second_token")
    return {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}


if __name__ == "__main__":
    typer.run(main)
