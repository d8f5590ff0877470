"""Other ways to decode the same weights, opened by name; one that cannot run here says why in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastllama import LlamaForCausalLM

from ..harness import Contender, Unavailable, Workload, reason
from ..ours import Eager

EAGER, TRANSFORMERS, STATIC, GPT_FAST, LLAMA_CPP = "eager", "transformers", "static", "gpt-fast", "llama.cpp"
NAMES = (EAGER, TRANSFORMERS, STATIC, GPT_FAST, LLAMA_CPP)


@dataclass(frozen=True)
class Places:
    """Where the peers are that are no Python packages.

    Attributes:
        gpt_fast: a checkout of gpt-fast.
        llama_bench: the program; None looks on PATH.
    """

    gpt_fast: Path | None = None
    llama_bench: Path | None = None


def parse(text: str) -> tuple[str, ...]:
    """The names of ``all``, ``none`` or a list like ``eager,transformers``.

    Raises:
        ValueError: an unknown name.
    """
    if text in ("all", "none"):
        return NAMES if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; there are {', '.join(NAMES)}, and all and none")
    return names


def open_peers(
    names: Sequence[str], model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path
) -> tuple[list[Contender], dict[str, str]]:
    """Open peers.

    Args:
        names: of NAMES.
        model: whose weights they decode.
        workload: what they will be given.
        places: where they are.
        workspace: folder for the weights that other programs read; the caller removes it.

    Returns:
        The contenders that opened, and for each other name why it did not.
    """
    opened: list[Contender] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            opened.append(_OPENERS[name](model, workload, places, workspace))
        except Exception as error:  # whatever breaks a peer is told and does not end the run
            missing[name] = reason(error)
    return opened, missing


def _eager(model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path) -> Contender:
    return Eager(model)


def _transformers(model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path) -> Contender:
    from .transformers import Transformers

    return Transformers(model, is_static=False)


def _static(model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path) -> Contender:
    from .transformers import Transformers

    return Transformers(model, is_static=True)


def _gpt_fast(model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path) -> Contender:
    from .gpt_fast import open_gpt_fast

    if places.gpt_fast is None:
        raise Unavailable("give a checkout of gpt-fast with --gpt-fast DIR")
    return open_gpt_fast(model, places.gpt_fast, workload, workspace)


def _llama_cpp(model: LlamaForCausalLM, workload: Workload, places: Places, workspace: Path) -> Contender:
    from .llama_cpp import open_llama_bench

    return open_llama_bench(model, places.llama_bench, workspace)


_OPENERS: dict[str, Callable[[LlamaForCausalLM, Workload, Places, Path], Contender]] = {
    EAGER: _eager,
    TRANSFORMERS: _transformers,
    STATIC: _static,
    GPT_FAST: _gpt_fast,
    LLAMA_CPP: _llama_cpp,
}
