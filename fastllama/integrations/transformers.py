"""``accelerate``: a transformers Llama whose ``generate()`` decodes through fastllama's engine, on the same weights."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from fastllama.config import GenerationConfig, LlamaConfig
from fastllama.model import LlamaForCausalLM

logger = logging.getLogger(__name__)

# Arguments of transformers' generate() that change nothing in what the engine does.
INERT = frozenset({"use_cache", "return_dict_in_generate", "synced_gpus", "cache_implementation", "disable_compile"})


def accelerate(model: Any) -> Any:
    """Make ``model.generate`` decode through the engine; everything else about the model stays as it is.

    A call that asks for what the engine does not do (beams, penalties, own logits processors, …) runs transformers'
    own ``generate``; the reason is logged.

    Args:
        model: a ``transformers.LlamaForCausalLM``. Its q/k/v and gate/up parameters become views of fused matrices
            when it first decodes, so no weight is held twice.

    Returns:
        The same model, also with ``model.fastllama``, the LlamaForCausalLM whose ``warmup`` and ``release`` it shares.

    Raises:
        ValueError: the model is not a Llama that fastllama runs.
    """
    twin = twin_of(model)
    theirs = model.generate

    @functools.wraps(theirs)
    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            arguments = engine_arguments(model, *args, **kwargs)
        except (TypeError, NotImplementedError) as error:
            logger.warning("decoding with transformers' own generate: %s", error)
            return theirs(*args, **kwargs)
        return twin.generate(**arguments)

    model.generate = generate
    model.fastllama = _Unregistered(twin)
    return model


class _Unregistered:
    """Holds the twin without making it a submodule, which would show in the model's parameters and state dict."""

    def __init__(self, twin: LlamaForCausalLM) -> None:
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin, name)


def twin_of(model: Any) -> LlamaForCausalLM:
    """fastllama's model of the same config over the very same Parameter objects."""
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig.from_hf(model.config))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, parameter)
    twin.tie_weights()
    if missing := [name for name, parameter in twin.named_parameters() if parameter.is_meta]:
        raise ValueError(f"the transformers model lacks {', '.join(missing)}; expected a LlamaForCausalLM")
    return twin.eval()


def engine_arguments(
    model: Any, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of our ``generate`` for a call of transformers'.

    Raises:
        TypeError, NotImplementedError: naming what the engine does not do.
    """
    settings = {name: value for name, value in kwargs.items() if value is not None and name not in INERT}
    if kwargs.get("return_dict_in_generate"):
        raise NotImplementedError("return_dict_in_generate is not available")
    input_ids = settings.pop("input_ids", inputs)
    if input_ids is None:
        raise NotImplementedError("decoding without input_ids is not available")
    passed = {name: settings.pop(name) for name in ("attention_mask", "streamer") if name in settings}
    config = GenerationConfig.from_hf(generation_config or model.generation_config)
    if unknown := sorted(set(settings) - set(GenerationConfig.__dataclass_fields__)):
        raise TypeError(f"{', '.join(unknown)} is not available in the engine")
    return {"input_ids": input_ids, "generation_config": config, **passed, **settings}
