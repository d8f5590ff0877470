"""Ways to decode the same weights by name, behind one interface: ``load(task)``, ``run(workload)``, ``close()``."""

from __future__ import annotations

import importlib
from typing import Any

from ..workload import Contender, Task, Unavailable

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


def _module(key: str) -> Any:
    name = CLASSES[key].partition(".")[0]
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported ({error}); install fastllama[bench]") from error
