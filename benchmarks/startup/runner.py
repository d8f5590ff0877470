"""One fresh process, from Python's start to its first token, phase by phase.

    python runner.py TASK.json

It is started by path and imports nothing of this package, so it takes as long as a user's own script. The task is an
object of ``contender`` (a key of ``OPENERS``), ``folder`` (a checkpoint's; null: only import), ``dtype``, ``device``,
``prompt`` (token ids), ``new_tokens`` and ``spawned`` (``time.time()`` before this process was started). The last line
on stdout is an object of ``phases`` (seconds, see ``phases_of``) and ``tokens``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SETTLING_CALLS = 3  # after the first; CUDA graphs are recorded in the second and third call


@dataclass(frozen=True)
class Call:
    """One decode: its tokens, and ``time.time()`` when it began and at each token."""

    tokens: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to its first token."""
        return self.times[1] - self.times[0]

    @property
    def whole(self) -> float:
        """Seconds to its last token."""
        return self.times[-1] - self.times[0]


class Clock:
    """Notes the time of each token that is put."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times = [time.time()]

    def note(self, token: int) -> None:
        """A token is there, on the host."""
        self.tokens.append(token)
        self.times.append(time.time())

    def call(self) -> Call:
        """What was noted."""
        return Call(tuple(self.tokens), tuple(self.times))


def main() -> None:
    """Be the process that is measured."""
    started = time.time()
    del sys.path[0]  # this file's folder: what lies beside it are no top-level modules
    with open(sys.argv[1]) as file:
        task = json.load(file)
    marks = [task["spawned"], started]
    opening = OPENERS[task["contender"]](task)
    next(opening)  # imports
    marks.append(time.time())
    if task["folder"] is None:
        return
    decode = next(opening)  # loads
    assert decode is not None
    marks.append(time.time())
    calls = [decode() for _ in range(1 + SETTLING_CALLS)]
    print(json.dumps({"phases": phases_of(marks, calls), "tokens": calls[-1].tokens}))


def phases_of(marks: list[float], calls: list[Call]) -> dict[str, float]:
    """Seconds of each phase.

    ``interpreter``: until this file ran. ``import``, ``load``: of the library, of the weights onto the device.
    ``compile``: what the first call took longer than a settled one. ``first_token``: of a settled call.
    ``to_first_token``, ``to_last_token``: from the start of the process, of the first call.
    """
    spawned, started, imported, loaded = marks
    first, settled = calls[0], calls[-1]
    return {
        "interpreter": started - spawned,
        "import": imported - started,
        "load": loaded - imported,
        "compile": max(first.whole - settled.whole, 0.0),
        "first_token": settled.first,
        "to_first_token": first.times[1] - spawned,
        "to_last_token": first.times[-1] - spawned,
    }


Opening = Iterator[Callable[[], Call] | None]


def open_fastllama(task: dict[str, Any]) -> Opening:
    """The engine, through ``stream()``."""
    import torch

    from fastllama import LlamaForCausalLM

    yield None
    model = LlamaForCausalLM.from_pretrained(task["folder"], task["dtype"], task["device"], progress=False)
    _synchronize(task["device"])
    ids = torch.tensor([task["prompt"]])

    def decode() -> Call:
        clock = Clock()
        settings = {"max_new_tokens": task["new_tokens"], "do_sample": False, "eos_token_id": ()}
        for token_b in model.stream(ids, torch.ones_like(ids), **settings):
            clock.note(int(token_b))
        return clock.call()

    yield decode


def open_eager(task: dict[str, Any]) -> Opening:
    """The public forward, uncompiled."""
    import torch

    from fastllama import LlamaForCausalLM

    yield None
    model = LlamaForCausalLM.from_pretrained(task["folder"], task["dtype"], task["device"], progress=False)
    _synchronize(task["device"])

    @torch.inference_mode()
    def decode() -> Call:
        clock, cache = Clock(), None
        ids = torch.tensor([task["prompt"]], device=task["device"])
        for _ in range(task["new_tokens"]):
            output = model(ids, past_key_values=cache, use_cache=True, return_dict=True, num_logits_to_keep=1)
            ids, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
            clock.note(int(ids))
        return clock.call()

    yield decode


def open_transformers(task: dict[str, Any], is_static: bool = False) -> Opening:
    """transformers' ``generate()``, with its defaults or with a static cache and a compiled forward."""
    import torch
    import transformers

    network = transformers.LlamaForCausalLM  # imported when it is looked up
    yield None
    model: Any = network.from_pretrained(task["folder"], dtype=getattr(torch, task["dtype"])).to(task["device"])
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # none that ends at an EOS token
    _synchronize(task["device"])
    ids = torch.tensor([task["prompt"]], device=task["device"])
    settings = {"max_new_tokens": task["new_tokens"], "do_sample": False}
    if is_static:
        slots = ids.shape[1] + task["new_tokens"]
        settings["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=slots)
        compile_config: Any = transformers.CompileConfig(mode="reduce-overhead", fullgraph=True)
        compile_config._compile_all_devices = True  # transformers compiles for CUDA alone unless told
        settings["compile_config"] = compile_config

    def decode() -> Call:
        if is_static:
            settings["past_key_values"].reset()
        streamer = _Streamer()
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
        return streamer.call()

    yield decode


class _Streamer(Clock):
    """What ``generate(streamer=...)`` of transformers takes: the prompt comes first."""

    def __init__(self) -> None:
        super().__init__()
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.note(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _open_static(task: dict[str, Any]) -> Opening:
    return open_transformers(task, is_static=True)


OPENERS: dict[str, Callable[[dict[str, Any]], Opening]] = {
    "fastllama": open_fastllama,
    "eager": open_eager,
    "transformers": open_transformers,
    "static": _open_static,
}

if __name__ == "__main__":
    main()
