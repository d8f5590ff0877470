"""Ways to decode the same weights by name, behind one interface: ``load(task)``, ``run(workload)``, ``close()``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..workload import Contender, Unavailable, reason

if TYPE_CHECKING:  # a worker imports its own contender's library and no other
    from fastllama import LlamaForCausalLM

FASTLLAMA, EAGER, TRANSFORMERS, STATIC = "fastllama", "eager", "transformers", "static"
GPT_FAST, LLAMA_CPP = "gpt-fast", "llama.cpp"
CLASSES = {
    FASTLLAMA: "fastllama.Engine",
    EAGER: "fastllama.Eager",
    TRANSFORMERS: "transformers.Transformers",
    STATIC: "transformers.StaticTransformers",
    GPT_FAST: "gpt_fast.GptFast",
    LLAMA_CPP: "llama_cpp.LlamaCpp",
}
NAMES = tuple(CLASSES)[1:]  # the peers
IN_A_PROCESS = {GPT_FAST}  # it configures torch, and its modules are called model and generate


@dataclass(frozen=True)
class Task:
    """What a contender loads."""

    model: str  # as ``from_pretrained`` takes it; for other programs the file or folder that :func:`prepare` wrote
    dtype: str
    device: str = "cpu"
    batch: int = 1  # largest batch, and its slots of the KV cache, for contenders that allocate once
    slots: int = 0
    threads: int | None = None
    gpt_fast: str | None = None  # a checkout
    llama_bench: str | None = None  # the program; None: the one on PATH
    workspace: str = "."  # folder for the weights that other programs read
    slowdown: float = 0.0  # fraction by which every step is made longer, to prove that a slowdown is seen
    lent: LlamaForCausalLM | None = field(default=None, repr=False)  # shares its weights in place of loading them

    def weights(self) -> LlamaForCausalLM:
        """The model that is lent, else loaded."""
        if self.lent is not None:
            return self.lent
        from fastllama import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(self.model, dtype=self.dtype, device=self.device)

    def plain(self) -> dict[str, Any]:
        """The task for another process."""
        return {name: value for name, value in vars(self).items() if name != "lent"}


def parse(text: str) -> tuple[str, ...]:
    """The peers of ``all``, ``none`` or a list like ``eager,transformers``; ValueError for an unknown name."""
    if text in ("all", "none"):
        return NAMES if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; there are {', '.join(NAMES)}, and all and none")
    return names


def make(key: str) -> Contender:
    """The contender of this name, to be loaded in this process."""
    return getattr(_module(key), CLASSES[key].partition(".")[2])()


def title_of(key: str) -> str:
    """The contender's name in tables and records."""
    return {EAGER: "eager forward", STATIC: "transformers static+compile"}.get(key, key)


def prepare(key: str, task: Task) -> Task:
    """The task as the contender's own process takes it, weights written in the format that it reads."""
    return getattr(_module(key), "prepare", lambda plain: plain)(task)


def open_peers(keys: Sequence[str], task: Task) -> tuple[list[Contender], dict[str, str]]:
    """Load peers, and say of those that cannot be why."""
    from .remote import Remote

    opened: list[Contender] = []
    missing: dict[str, str] = {}
    for key in keys:
        contender: Contender | None = None
        try:
            contender = Remote(key) if key in IN_A_PROCESS else make(key)
            contender.load(prepare(key, task))
            opened.append(contender)
        except Exception as error:  # a peer that breaks is a line in the report and does not end the run
            missing[key] = reason(error)
            if contender is not None:
                contender.close()
    return opened, missing


def _module(key: str) -> Any:
    name = CLASSES[key].partition(".")[0]
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported ({error}); install fastllama[bench]") from error
