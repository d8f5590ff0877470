"""transformers: its ``generate()`` as it comes, and with a static cache and a compiled forward."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from ..workload import Contender, Decode, Task, Unavailable, Workload, timed_by_difference
from . import STATIC, TRANSFORMERS, title_of

if TYPE_CHECKING:
    import fastllama


def twin_of(model: fastllama.LlamaForCausalLM) -> Any:
    """transformers' model of the same config on the same weights, which are shared and not copied."""
    if model.config.quantization is not None:
        raise Unavailable("it has no matrices of fastllama's codes")
    config = LlamaConfig(**model.config.to_dict())
    with torch.device("meta"):
        twin: Any = LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config).to(model.device)
    return twin.eval()


class Transformers(Contender):
    """Greedy ``generate()`` with its defaults."""

    name = title_of(TRANSFORMERS)

    def load(self, task: Task) -> None:
        """Share the lent weights, or load the folder."""
        if task.lent is not None:
            self._model: Any = twin_of(task.lent)
        else:
            loaded: Any = LlamaForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype))
            self._model = loaded.to(task.device)
        self._model.generation_config = GenerationConfig(pad_token_id=0)  # none that ends at an EOS token

    def run(self, workload: Workload) -> Decode:
        """Decode once; on CUDA by the difference of two calls, for to see each token is to wait for it."""
        ids_bt = workload.input_ids(self._model.device)
        if ids_bt.is_cuda:
            return timed_by_difference(lambda n: self._generate(ids_bt, n, workload), workload.new_tokens)
        marks = [time.perf_counter()]

        def mark(ids_bt: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops and notes when each step's tokens came."""
            marks.append(time.perf_counter())
            return torch.zeros(len(ids_bt), dtype=torch.bool)

        tokens_bn = self._generate(ids_bt, workload.new_tokens, workload, stopping_criteria=[mark])
        return Decode.from_marks(tokens_bn, marks)

    def settings(self, workload: Workload) -> dict[str, Any]:
        """What ``generate()`` is called with besides the prompt."""
        return {}

    def _generate(self, ids_bt: torch.Tensor, new_tokens: int, workload: Workload, **hook: Any) -> torch.Tensor:
        settings = {"max_new_tokens": new_tokens, "do_sample": False, **self.settings(workload), **hook}
        output_bt = self._model.generate(ids_bt, attention_mask=torch.ones_like(ids_bt), **settings)
        return output_bt[:, ids_bt.shape[1] :]


class StaticTransformers(Transformers):
    """A static cache, made once and reset, and the forward compiled: the fastest way that transformers documents."""

    name = title_of(STATIC)

    _cache: Any = None
    _shape: tuple[int, int] | None = None

    def settings(self, workload: Workload) -> dict[str, Any]:
        """The cache, empty, and the compiler's mode."""
        slots = workload.capacity or workload.prompt_len + workload.new_tokens
        if self._shape != (workload.batch, slots):
            self._cache = StaticCache(config=self._model.config, max_cache_len=slots)
            self._shape = (workload.batch, slots)
        self._cache.reset()
        compile_config: Any = CompileConfig(mode="reduce-overhead", fullgraph=True)
        compile_config._compile_all_devices = True  # by default it compiles for CUDA alone
        return {"past_key_values": self._cache, "compile_config": compile_config}
