"""Whether a transformers Llama is the model that its config describes: what the engine would compute of it."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Attributes that change no token; transformers 5.17 does not follow resized embeddings with vocab_size.
FREE = {"training", "gradient_checkpointing", "name_or_path", "max_seq_len_cached", "vocab_size"}
OURS = {"generate", "fastllama"}  # what accelerate() puts into a model
CAPTURES = "transformers.utils.output_capturing"  # where hooks are from that stay after a call with hidden states
LOOPS = ("_sample", "_beam_search", "_get_logits_processor", "_get_stopping_criteria", "_prepare_generation_config")


class Description(NamedTuple):
    """What one module is to be.

    Attributes:
        kind: its class.
        numbers: its plain attributes, by name.
        shapes: of its own parameters, by name.
    """

    kind: type[nn.Module]
    numbers: dict[str, Any]
    shapes: dict[str, torch.Size]


def check_as_described(model: nn.Module) -> None:
    """Raise NotImplementedError where a transformers model computes something else than its config describes.

    Compared are its modules' classes, their numbers (eps, scaling, layer_idx), rotary frequencies, and the names and
    shapes of parameters, with those of a model that transformers makes of the config. A hook, a forward() of its own
    and weights in a format of their own differ too.
    """
    config: Any = model.config
    if getattr(config, "quantization_config", None) or getattr(model, "hf_quantizer", None):
        raise NotImplementedError("the model is quantized: load its folder with fastllama's from_pretrained()")
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, *ATTENTIONS):
        raise NotImplementedError(f"the model has an attention of its own, {attention!r}")
    if replaced := _replaced_function(type(model), attention):
        raise NotImplementedError(f"{replaced}() of transformers was replaced")
    if getattr(config, "sliding_window", None):
        raise NotImplementedError("sliding_window is set, which the engine does not follow")
    if own := sorted(name for name, value in vars(model).items() if inspect.isroutine(value) and name not in OURS):
        raise NotImplementedError(f"the model has {own[0]}() of its own")
    described, frequencies = _described(_config_text(config))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [*modules, *described]:
        if name not in modules or name not in described:
            what = "is missing" if name in described else "is not part of a Llama"
        else:
            what = _difference(modules[name], described[name])
        if what:
            raise NotImplementedError(f"{name or 'the model'} {what}, unlike what the config describes")
    for name, buffer in model.named_buffers():
        if name not in frequencies or torch.equal(buffer.detach().cpu(), frequencies[name]):
            continue
        why = "" if buffer.dtype == torch.float32 else f": it was cast to {buffer.dtype}, load the model in that dtype"
        raise NotImplementedError(f"{name} holds other frequencies than the config describes{why}")


def _replaced_function(kind: type[nn.Module], attention: str | None) -> str | None:
    """A function that layers or loops of transformers call, and that is none of its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    called = {name: getattr(modeling_llama, name, None) for name in _functions_of(modeling_llama.__file__)}
    called |= {name: value for name, value in vars(modeling_llama).items() if inspect.isfunction(value)}
    called |= {name: getattr(kind, name) for name in LOOPS if hasattr(kind, name)}
    if attention in ALL_ATTENTION_FUNCTIONS:
        called[f"attention function {attention!r}"] = ALL_ATTENTION_FUNCTIONS[attention]
    return next((name for name, function in called.items() if not _is_library_code(function)), None)


@functools.cache
def _functions_of(file: str) -> list[str]:
    """The functions that a file of Python defines."""
    return [node.name for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.FunctionDef)]


def _difference(module: nn.Module, wanted: Description) -> str | None:
    """In words, how a module is not as it was described."""
    own = vars(module)
    if type(module) is not wanted.kind:
        return f"is a {type(module).__name__}"
    hooks = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    forward = getattr(own.get("forward"), "__func__", own.get("forward"))  # transformers 4 puts the class's there
    if any(getattr(hook, "__module__", None) != CAPTURES for hook in hooks):
        return "has a forward hook"
    if not _is_library_code(type(module).__call__):
        return "has a __call__() of its own"
    if forward not in (None, type(module).forward):
        return "has a forward() of its own"
    if not _is_library_code(type(module).forward):
        return "has a forward() that was put into its class"
    if changed := [key for key, value in wanted.numbers.items() if own.get(key) != value]:
        return f"has {changed[0]} = {own.get(changed[0])!r}"
    shapes = _shapes(module)
    if changed := [leaf for leaf in {**wanted.shapes, **shapes} if shapes.get(leaf) != wanted.shapes.get(leaf)]:
        return f"has {changed[0]} of shape {tuple(shapes.get(changed[0], ()))}"
    return None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {leaf: parameter.shape for leaf, parameter in module._parameters.items() if parameter is not None}


def _config_text(config: Any) -> str:
    """A config as a cache can hold it."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


@functools.lru_cache(maxsize=8)
def _described(config_text: str) -> tuple[dict[str, Description], dict[str, torch.Tensor]]:
    """A model that transformers makes of a config: each module by name, and its rotary frequencies."""
    import transformers

    config = transformers.LlamaConfig(**json.loads(config_text))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with torch.device("cpu"):
        rotary = type(model.model.rotary_emb)(config)
    # Where they depend on the length, transformers keeps the current ones under one name and these under another.
    follows_length = rotary.rope_type in ("dynamic", "longrope")
    kept = {name for name, _ in rotary.named_buffers() if name != "inv_freq" or not follows_length}
    frequencies = {f"model.rotary_emb.{name}": x.detach() for name, x in rotary.named_buffers() if name in kept}
    modules = model.named_modules(remove_duplicate=False)
    return {name: Description(type(module), _numbers(module), _shapes(module)) for name, module in modules}, frequencies


def _numbers(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes, and functions."""
    kinds = (bool, int, float, str, types.FunctionType, type(None))
    plain = {key: value for key, value in vars(module).items() if isinstance(value, kinds)}
    return {key: value for key, value in plain.items() if not key.startswith("_") and key not in FREE}


def _is_library_code(function: Any) -> bool:
    """Whether a function, and what it wraps, is defined in a file of torch or transformers."""
    code = getattr(function, "__code__", None)
    return code is not None and _all_in_libraries(function, code)


@functools.lru_cache(maxsize=1024)
def _all_in_libraries(function: Any, code: types.CodeType) -> bool:
    """The answer for a function while it has this code."""
    import transformers

    wrapped = getattr(inspect.unwrap(function), "__code__", None)
    roots = [Path(inspect.getfile(library)).parent for library in (torch, transformers)]
    files = [None if each is None else Path(each.co_filename) for each in (code, wrapped)]
    return all(file is not None and any(root in file.parents for root in roots) for file in files)
