"""fastllama's two ways to decode, as contenders: the compiled engine and the eager forward."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

import torch

from fastllama import GenerationConfig, LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.generation.loop import decode
from fastllama.generation.request import requests_of

from .costs import Compilations, counting
from .harness import CUDA_CHUNK, Marks, Run, Workload

OURS = "fastllama"
EAGER = "eager forward"


class Engine:
    """The compiled engine, as ``generate()`` and ``stream()`` use it.

    Attributes:
        costs: what each run so far has compiled and recorded.
    """

    name = OURS

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self.costs: list[Compilations] = []

    def run(self, workload: Workload) -> Run:
        """Decode once; on CUDA the time to the first token comes from a run of its own."""
        if workload.capacity:
            runner = engine_of(self._model)
            with runner.session():
                runner.reserve(workload.batch, workload.capacity)
        with counting() as cost:
            if self._model.device.type == "cuda":
                run = self._timed_by_events(workload)
            else:
                run = timed(_tokens(self._model, workload.input_ids(), workload.new_tokens))
        self.costs.append(cost)
        return run

    def close(self) -> None:
        """Give back the engine's memory."""
        self._model.release()

    def _timed_by_events(self, workload: Workload) -> Run:
        """Events around groups of steps, which nothing waits for until the decode is over.

        A group's tokens are handed out once the next group is launched. So an event that is recorded then marks the
        end of that next group, and the time from one to the next is that of ``CUDA_CHUNK`` steps; the last one, for
        which nothing new was launched, is left out.
        """
        ids_bt = workload.input_ids(self._model.device)
        ttft = _seconds_to_first_token(self._model, ids_bt)
        if workload.new_tokens == 1:
            return Run(_rows([next(_tokens(self._model, ids_bt, 1))]), ttft, ())
        config = GenerationConfig(max_new_tokens=workload.new_tokens, eos_token_id=())
        requests = requests_of(ids_bt, torch.ones_like(ids_bt), config, self._model.config.vocab_size)
        marks, groups = Marks(ids_bt.device), []
        with closing(decode(engine_of(self._model), requests, poll_every=CUDA_CHUNK)) as decoding:
            for tokens_bn in decoding:
                marks.mark()
                groups.append(tokens_bn)
        sizes = [tokens_bn.shape[1] for tokens_bn in groups]
        gaps = zip(marks.gaps()[:-1], sizes[2:], strict=True)
        steps = tuple(gap / size for gap, size in gaps if size == CUDA_CHUNK)
        if not steps:
            raise ValueError(f"on CUDA at least {4 * CUDA_CHUNK} new tokens are needed, got {workload.new_tokens}")
        return Run(_rows(torch.cat(groups, dim=1).unbind(1)), ttft, steps)


class Eager:
    """The public forward, uncompiled, with a cache that grows."""

    name = EAGER

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model

    def run(self, workload: Workload) -> Run:
        """Decode once."""
        return timed(self._steps(workload.input_ids(self._model.device), workload.new_tokens))

    def close(self) -> None:
        """Nothing is held."""

    @torch.inference_mode()
    def _steps(self, ids_bt: torch.Tensor, new_tokens: int) -> Iterable[torch.Tensor]:
        cache = None
        for _ in range(new_tokens):
            output = self._model(ids_bt, past_key_values=cache, use_cache=True, return_dict=True, num_logits_to_keep=1)
            cache = output.past_key_values
            ids_bt = output.logits[:, -1:].argmax(dim=-1)
            yield ids_bt[:, 0].cpu()


def timed(tokens: Iterable[torch.Tensor]) -> Run:
    """Time an iterator over tokens ``[b]`` on the host, each as it comes."""
    marks, steps = Marks(torch.device("cpu")), []
    marks.mark()
    for token_b in tokens:
        marks.mark()
        steps.append(token_b)
    gaps = marks.gaps()
    return Run(_rows(steps), gaps[0], tuple(gaps[1:]))


def _rows(steps: Iterable[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, torch.stack(list(steps), dim=1).tolist()))


def _tokens(model: LlamaForCausalLM, ids_bt: torch.Tensor, new_tokens: int) -> Generator[torch.Tensor, None, None]:
    """Greedy new tokens. The mask says that a random prompt's pad ids are tokens like any other."""
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": ()}
    return model.stream(ids_bt, torch.ones_like(ids_bt), **settings)


def _seconds_to_first_token(model: LlamaForCausalLM, ids_bt: torch.Tensor) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    with closing(_tokens(model, ids_bt, 1)) as tokens:
        next(tokens)
    return time.perf_counter() - start
