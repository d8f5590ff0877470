"""``accelerate``: a transformers Llama whose ``generate()`` decodes through fastllama's engine, on the same weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from fastllama.causal_lm import LlamaForCausalLM
from fastllama.config import GenerationConfig, LlamaConfig
from fastllama.generation.request import merge_settings

logger = logging.getLogger(__name__)

# Arguments of transformers' generate() that have no effect on the engine.
INERT = frozenset({"use_cache", "synced_gpus", "cache_implementation", "disable_compile"})


def accelerate(model: Any) -> Any:
    """Make ``model.generate`` decode through the engine; everything else about the model stays as it is.

    Calls with options that the engine does not support (beams, penalties, logits processors, …), and calls on a model
    that was changed so that fastllama cannot run it, fall back to transformers' own ``generate``; the reason is logged.

    Args:
        model: a ``transformers.LlamaForCausalLM``. Its q/k/v and gate/up parameters become views of fused matrices
            when it first decodes, so no weight is held twice.

    Returns:
        The same model. ``model.fastllama`` is its LlamaForCausalLM, for ``warmup`` and ``release``.

    Raises:
        ValueError: the model is not a Llama that fastllama can run.
    """
    # Not by setattr: as a submodule the twin would show in the model's parameters and state dict.
    model.__dict__["fastllama"] = twin_of(model)
    model.generate = functools.partial(_generate, model, model.generate)  # a copy of the model binds the copy
    return model


def _generate(model: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        _check_hooks(model)
        arguments = engine_arguments(model, *args, **kwargs)
        if not _shares_parameters(model.fastllama, model):
            model.__dict__["fastllama"] = twin_of(model)
    except (TypeError, ValueError, NotImplementedError) as error:
        logger.warning("decoding with transformers' own generate: %s", error)
        return theirs(*args, **kwargs)
    return model.fastllama.generate(**arguments)


def twin_of(model: Any) -> LlamaForCausalLM:
    """Build fastllama's model of the same config over the very same Parameter objects.

    Raises:
        ValueError: the model's config or its modules are not those of a Llama that fastllama can run.
    """
    if getattr(model.config, "quantization_config", None):
        raise ValueError("the transformers model is quantized; load its folder with fastllama's from_pretrained()")
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig.from_hf(model.config))
    known = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in known or known[name].shape != parameter.shape:
            raise ValueError(
                f"the transformers model has a parameter {name} of shape {tuple(parameter.shape)}, unlike Llama"
            )
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, parameter)
    twin.tie_weights()
    if missing := [name for name, parameter in twin.named_parameters() if parameter.is_meta]:
        raise ValueError(f"the transformers model lacks {', '.join(missing)}; expected a LlamaForCausalLM")
    return twin.eval()


def _shares_parameters(twin: LlamaForCausalLM, model: Any) -> bool:
    """Whether the twin still has the model's parameters, under the same names."""
    ours, theirs = (
        {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
        for module in (twin, model)
    )
    return ours == theirs


def _check_hooks(model: Any) -> None:
    """Raise NotImplementedError where a forward hook or another forward() would not run."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise NotImplementedError(f"{name or 'the model'} has a forward hook, which the engine does not run")


def engine_arguments(
    model: Any, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Translate a call of transformers' ``generate`` into arguments of ours.

    As there, fields that a given generation config leaves unset come from the model's own.

    Raises:
        TypeError, ValueError, NotImplementedError: an option that the engine does not support, by name.
    """
    settings = {name: value for name, value in kwargs.items() if name not in INERT}
    input_ids = settings.pop("input_ids", inputs)
    if input_ids is None:
        raise NotImplementedError("decoding without input_ids is not available")
    passed = {name: settings.pop(name) for name in ("attention_mask", "streamer") if name in settings}
    chosen = {} if generation_config is None else generation_config.to_diff_dict()
    config = GenerationConfig.from_dict(model.generation_config.to_dict() | chosen)
    settings = {name: chosen[name] for name in ("max_length",) if name in chosen} | settings
    merge_settings(config, settings)  # checks them
    return {"input_ids": input_ids, "generation_config": config, **passed, **settings}
