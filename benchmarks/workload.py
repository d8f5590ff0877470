"""What a contender loads and decodes, what a decode comes to, and the two clocks that time one; times are seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # a worker imports its own contender's library and no other
    from fastllama import LlamaForCausalLM

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """What a contender loads."""

    model: str  # as ``from_pretrained`` takes it; for other programs the file or folder that their ``prepare`` wrote
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


@dataclass(frozen=True)
class Workload:
    """What every contender decodes: greedily, past any EOS token."""

    prompts: Rows  # all of one length
    new_tokens: int
    capacity: int | None = None  # slots of the KV cache; None: what is needed, or the contender's own choice

    @classmethod
    def random(
        cls, vocab_size: int, batch: int, prompt_len: int, new_tokens: int, capacity: int | None = None
    ) -> Workload:
        """Random prompts, the same ones for the same arguments."""
        generator = torch.Generator().manual_seed(0)
        ids_bt = torch.randint(vocab_size, (batch, prompt_len), generator=generator)
        return cls(tuple(map(tuple, ids_bt.tolist())), new_tokens, capacity)

    @property
    def batch(self) -> int:
        """Rows decoded together."""
        return len(self.prompts)

    @property
    def prompt_len(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])

    @property
    def live_tokens(self) -> int:
        """Tokens in a row's cache half way through the decode."""
        return self.prompt_len + self.new_tokens // 2

    def input_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The prompts, int64 ``[b, t]``."""
        return torch.tensor(self.prompts, device=device)


@dataclass(frozen=True)
class Decode:
    """One timed decode of a workload."""

    tokens: Rows | None  # None where the contender does not report them
    ttft: float  # seconds to the first token
    tpot: tuple[float, ...]  # seconds per decode step after it: one value a step, or one for all of them

    @classmethod
    def from_marks(cls, tokens_bn: torch.Tensor, marks: Sequence[float]) -> Decode:
        """The decode of these tokens, ``marks`` being when it began and when each step was through."""
        gaps = tuple(after - before for before, after in pairwise(marks))
        return cls(rows_of(tokens_bn), gaps[0], gaps[1:])


class Contender:
    """Something that decodes workloads: the engine, the eager forward, a peer, another revision in a process."""

    name: str
    info: Mapping[str, Any] = {}  # what it says of itself, such as its revision; complete once it has run

    def load(self, task: Task) -> None:
        """Load weights and get ready."""

    def run(self, workload: Workload) -> Decode:
        """Decode the workload once and time it."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back memory and processes; nothing for those that hold none."""


class Unavailable(RuntimeError):
    """A contender cannot run here; the message is one line that says why."""


def reason(error: BaseException) -> str:
    """One line on what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Unavailable) else f"{type(error).__name__}: {lines[0]}"


def timed(tokens: Iterable[torch.Tensor], slowdown: float = 0.0) -> Decode:
    """Time an iterator over tokens ``[b]`` with the host's clock, each as it comes."""
    marks, steps = [time.perf_counter()], []
    for token_b in tokens:
        _wait(slowdown, marks[-1])
        marks.append(time.perf_counter())
        steps.append(token_b)
    return Decode.from_marks(torch.stack(steps, dim=1), marks)


def timed_by_difference(call: Callable[[int], torch.Tensor], new_tokens: int, slowdown: float = 0.0) -> Decode:
    """Time two whole calls on CUDA, of one new token and of all: a step is their difference; nothing waits in it."""
    seconds, tokens_bn = {}, torch.empty(0)
    for count in sorted({1, new_tokens}):
        torch.cuda.synchronize()
        start = time.perf_counter()
        tokens_bn = call(count)
        torch.cuda.synchronize()
        _wait(slowdown, start)
        seconds[count] = time.perf_counter() - start
    steps = new_tokens - 1
    return Decode(rows_of(tokens_bn), seconds[1], ((seconds[new_tokens] - seconds[1]) / steps,) if steps else ())


def rows_of(tokens_bn: torch.Tensor) -> Rows:
    """Token ids as plain values."""
    return tuple(map(tuple, tokens_bn.tolist()))


def _wait(slowdown: float, since: float) -> None:
    now = time.perf_counter()
    until = now + slowdown * (now - since)
    while time.perf_counter() < until:
        pass
