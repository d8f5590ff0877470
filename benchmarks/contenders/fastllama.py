"""fastllama's two ways to decode, the compiled engine and the eager forward.

The regression gate times other revisions with this file, so what it asks for takes the public interface alone; only a
capacity, which it never gives, is reserved in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastllama import LlamaForCausalLM  # noqa: F401  (so that importing this is importing it)

from ..workload import Contender, Decode, Task, Workload, timed, timed_by_difference
from . import EAGER, FASTLLAMA, title_of


class Engine(Contender):
    """The compiled engine: ``stream()`` on a CPU, ``generate()`` on CUDA."""

    name = FASTLLAMA

    def load(self, task: Task) -> None:
        """Load the weights; the first run compiles."""
        self._device, self._slowdown = task.device, task.slowdown
        self.model = task.weights()
        self.model.prefix_caching = False  # each run computes its whole prompt
        self.info = {"vocab_size": self.model.config.vocab_size}

    def run(self, workload: Workload) -> Decode:
        """Decode once; the mask says that a random prompt's pad ids are tokens like any other."""
        if workload.capacity:
            from fastllama.causal_lm import engine_of

            runner = engine_of(self.model)
            with runner.session():
                runner.reserve(workload.batch, workload.capacity)
        ids_bt = workload.input_ids(self._device)
        arguments = (ids_bt, torch.ones_like(ids_bt))
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": ()}
        if not self._device.startswith("cuda"):
            steps = self.model.stream(*arguments, max_new_tokens=workload.new_tokens, **settings)
            return timed(steps, self._slowdown)

        def call(new_tokens: int) -> torch.Tensor:
            return self.model.generate(*arguments, max_new_tokens=new_tokens, **settings)[:, workload.prompt_len :]

        return timed_by_difference(call, workload.new_tokens, self._slowdown)

    def close(self) -> None:
        """Give back the engine's memory; a model that was lent stays."""
        self.model.release()


class Eager(Contender):
    """The public forward, uncompiled, with a cache that grows."""

    name = title_of(EAGER)

    def load(self, task: Task) -> None:
        """Load the weights."""
        self._model, self._device = task.weights(), task.device

    def run(self, workload: Workload) -> Decode:
        ids_bt = workload.input_ids(self._device)
        if not self._device.startswith("cuda"):
            return timed(self.steps(ids_bt, workload.new_tokens))
        return timed_by_difference(lambda n: torch.stack(list(self.steps(ids_bt, n)), dim=1), workload.new_tokens)

    @torch.inference_mode()
    def steps(self, ids_bt: torch.Tensor, new_tokens: int) -> Iterator[torch.Tensor]:
        """Greedy tokens ``[b]``, one step after the other."""
        cache = None
        for _ in range(new_tokens):
            output = self._model(ids_bt, past_key_values=cache, use_cache=True, return_dict=True, num_logits_to_keep=1)
            cache = output.past_key_values
            ids_bt = output.logits[:, -1:].argmax(dim=-1)
            yield ids_bt[:, 0]
