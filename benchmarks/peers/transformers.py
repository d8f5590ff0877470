"""transformers on the same weights: its eager ``generate()``, and its static cache with a compiled forward."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from fastllama import LlamaForCausalLM

from ..harness import Run, Unavailable, Workload

EAGER = "transformers"
STATIC = "transformers static+compile"


def transformers_twin(model: LlamaForCausalLM) -> Any:
    """transformers' model of the same config on the same weights, which are shared and not copied.

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        from transformers import GenerationConfig, LlamaConfig
        from transformers import LlamaForCausalLM as Twin
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error}); install fastllama[bench]") from error
    config = LlamaConfig(**model.config.to_dict())
    with torch.device("meta"):
        twin = Twin(config)
    twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config).to(model.device)
    twin.generation_config = GenerationConfig(pad_token_id=0)
    return twin.eval()


class Transformers:
    """transformers' greedy ``generate()``.

    Args:
        model: lends its weights.
        is_static: with a static cache, made once and reset before each call, and the forward compiled in
            ``reduce-overhead`` mode, which is the fastest way that transformers documents. Else its defaults.
    """

    def __init__(self, model: LlamaForCausalLM, is_static: bool) -> None:
        self.name = STATIC if is_static else EAGER
        self._twin = transformers_twin(model)
        self._is_static = is_static
        self._cache: Any = None
        self._shape: tuple[int, int] | None = None

    def run(self, workload: Workload) -> Run:
        """Decode once. On CUDA the time per token is the difference between two calls, for a streamer would make the
        host wait for each token."""
        ids_bt = workload.input_ids(self._twin.device)
        settings = self._settings(workload)
        if ids_bt.is_cuda:
            return self._timed_by_difference(ids_bt, workload.new_tokens, settings)
        clock = _StreamerClock()
        # A streamer sees one row; all rows advance in the same step.
        hook = {"streamer": clock} if workload.batch == 1 else {"stopping_criteria": [clock.criterion]}
        output = self._generate(ids_bt, workload.new_tokens, settings | hook)
        times = clock.times[: workload.new_tokens + 1]
        gaps = [after - before for before, after in pairwise(times)]
        return Run(_new_tokens(output, workload), gaps[0], tuple(gaps[1:]))

    def close(self) -> None:
        """Drop the cache; the weights are the model's."""
        self._cache = None

    def _settings(self, workload: Workload) -> dict[str, Any]:
        if not self._is_static:
            return {}
        from transformers import CompileConfig, StaticCache

        slots = workload.capacity or workload.prompt_len + workload.new_tokens
        if self._shape != (workload.batch, slots):
            self._cache = StaticCache(config=self._twin.config, max_cache_len=slots)
            self._shape = (workload.batch, slots)
        self._cache.reset()
        compile_config = CompileConfig(mode="reduce-overhead", fullgraph=True)
        compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue] (else CUDA alone)
        return {"past_key_values": self._cache, "compile_config": compile_config}

    def _generate(self, ids_bt: torch.Tensor, new_tokens: int, settings: dict[str, Any]) -> torch.Tensor:
        mask_bt = torch.ones_like(ids_bt)
        return self._twin.generate(
            ids_bt, attention_mask=mask_bt, max_new_tokens=new_tokens, do_sample=False, **settings
        )

    def _timed_by_difference(self, ids_bt: torch.Tensor, new_tokens: int, settings: dict[str, Any]) -> Run:
        seconds, output = {}, ids_bt
        for count in sorted({1, new_tokens}):
            if self._is_static:
                self._cache.reset()
            torch.cuda.synchronize()
            start = time.perf_counter()
            output = self._generate(ids_bt, count, settings)
            torch.cuda.synchronize()
            seconds[count] = time.perf_counter() - start
        steps = new_tokens - 1
        tpot = ((seconds[new_tokens] - seconds[1]) / steps,) * (steps > 0)
        rows = output[:, ids_bt.shape[1] :].tolist()
        return Run(tuple(map(tuple, rows)), seconds[1], tpot)


class _StreamerClock:
    """Notes when it was made and when each step's token came: as a streamer, or as a stopping criterion."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass

    def criterion(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _new_tokens(output: torch.Tensor, workload: Workload) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, output[:, workload.prompt_len :].tolist()))
