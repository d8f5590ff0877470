"""The worker of one arm: decodes with the fastllama of one revision, and times that.

Both revisions are measured by this file, the gate's own (see :mod:`.start`). Of fastllama it uses only what its users
do: ``LlamaForCausalLM.from_pretrained``, ``model.stream`` and ``model.generate``. It talks as :mod:`..remote` says.

Every run starts with a short decode that is not timed: it brings the weights back into the caches that another arm has
just used, and outlasts the spinning of that arm's idle threads.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..harness import Run, Workload
from ..remote import serve

LEAD_IN = (16, 8)  # tokens of the prompts and new ones, before each timed run

Info = dict[str, Any]
Decode = Callable[[Workload], Run]


def main() -> None:
    """Serve runs on stdin and stdout until stdin closes."""
    options = _options()
    serve(lambda: _open(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="the worktree whose fastllama decodes")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", help="cpu or cuda; else cuda where there is one")
    parser.add_argument("--prompt-len", type=int, required=True, help="tokens of each prompt of the warm-up")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True, help="batch sizes to warm up")
    return parser.parse_args()


def _open(options: argparse.Namespace) -> tuple[Info, Decode]:
    """Load the model and compile what is asked for, the largest batch first: it sizes the cache.

    On a CPU little is decoded here: other workers start at the same time, and threads of several processes on the same
    cores mostly wait for each other. The turns that are not timed come later, one worker after the other.
    """
    model_class = model_class_of(options.tree)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model_class.from_pretrained(options.model, dtype=options.dtype, device=device)
    except (ValueError, NotImplementedError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    decode = _timed_on_cuda if device.startswith("cuda") else _timed_on_cpu

    def run(workload: Workload) -> Run:
        decode(model, lead_in(workload))
        return decode(model, workload)

    for batch in sorted(options.batches, reverse=True):
        workload = Workload.random(model.config.vocab_size, batch, options.prompt_len, options.new_tokens)
        run(workload if device.startswith("cuda") else lead_in(workload))
    gc.collect()
    gc.freeze()  # so that a collection while a decode is timed has little to look at
    info = {
        "vocab_size": model.config.vocab_size,
        "device": _device_name(device),
        "device_type": torch.device(device).type,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    return info, run


def lead_in(workload: Workload) -> Workload:
    """The beginning of a workload."""
    prompt_len, new_tokens = LEAD_IN
    prompts = tuple(prompt[:prompt_len] for prompt in workload.prompts)
    return Workload(prompts, min(new_tokens, workload.new_tokens))


def model_class_of(tree: Path) -> Any:
    """``LlamaForCausalLM`` of this worktree and of no other place.

    Exits with one line where the revision has none, or one that cannot do what is measured.
    """
    try:
        import fastllama
    except ModuleNotFoundError as error:
        if error.name == "fastllama":
            sys.exit("it has no package fastllama")
        sys.exit(f"its fastllama cannot be imported: {error}; its dependencies must be installed")
    origin = Path(fastllama.__file__ or "nowhere").resolve()
    if not origin.is_relative_to(tree.resolve()):
        sys.exit(f"it has no package fastllama (the environment's own is {origin.parent})")
    model_class = getattr(fastllama, "LlamaForCausalLM", None)
    lacking = [name for name in ("from_pretrained", "stream", "generate") if not hasattr(model_class, name)]
    if lacking:
        sys.exit(f"its fastllama predates what is measured: LlamaForCausalLM has no {', '.join(lacking)}")
    return model_class


def _timed_on_cpu(model: Any, workload: Workload) -> Run:
    """Decode through ``stream``; every token is looked at as it comes."""
    ids_bt = workload.input_ids()
    steps = model.stream(ids_bt, torch.ones_like(ids_bt), max_new_tokens=workload.new_tokens, eos_token_id=())
    marks, tokens = [time.perf_counter()], []
    for token_b in steps:
        marks.append(time.perf_counter())
        tokens.append(token_b)
    gaps = tuple(after - before for before, after in pairwise(marks))
    return Run(_rows(torch.stack(tokens, dim=1)), gaps[0], gaps[1:])


def _timed_on_cuda(model: Any, workload: Workload) -> Run:
    """Time two whole calls, of one token and of all: their difference is the decode, without a wait in it."""
    ids_bt = workload.input_ids(model.device)

    def call(new_tokens: int) -> tuple[float, torch.Tensor]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out_bt = model.generate(ids_bt, torch.ones_like(ids_bt), max_new_tokens=new_tokens, eos_token_id=())
        torch.cuda.synchronize()
        return time.perf_counter() - start, out_bt

    first, _ = call(1)
    whole, out_bt = call(workload.new_tokens)
    steps = workload.new_tokens - 1
    tpot = ((whole - first) / steps,) if steps else ()
    return Run(_rows(out_bt[:, workload.prompt_len :]), first, tpot)


def _rows(tokens_bn: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, tokens_bn.tolist()))


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return "cpu"
