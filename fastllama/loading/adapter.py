"""A LoRA adapter, merged into its base model by peft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastllama.config.fields import read_json
from fastllama.loading.stored import CheckpointError

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
WHOLE = re.compile(r"(embed_tokens|lm_head)\.(base_layer\.)?weight$")

Model = TypeVar("Model", bound=nn.Module)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def base_of(folder: Path) -> str | Path:
    """What names the model that an adapter was trained on; a folder may be named as seen from the adapter's.

    Raises:
        CheckpointError: its config does not say, or names the adapter itself.
    """
    base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or names_itself(folder):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG_NAME}: base_model_name_or_path is {base!r}; expected the name or folder of the "
            "model that the adapter belongs to"
        )
    return folder / base if (folder / base).is_dir() and not Path(base).is_dir() else base


def names_itself(folder: Path) -> bool:
    """Whether an adapter names its own folder as its base: one that is left over in a whole checkpoint may."""
    base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    places = [Path(base).expanduser(), folder / base] if isinstance(base, str) and base else []
    return any(place.resolve() == folder.resolve() for place in places)


def merged(model: Model, folder: Path) -> Model:
    """The base model with the adapter merged into its weights, in its own dtype.

    Raises:
        CheckpointError: the adapter's weights are missing or do not fit, or it is of a kind that cannot be merged.
        NotImplementedError: peft is not installed.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise NotImplementedError(
            f"{folder} holds a LoRA adapter, which peft merges into its base model: pip install peft, or merge it "
            "elsewhere and save the model"
        ) from error
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{folder} has an {ADAPTER_CONFIG_NAME} and no {ADAPTER_WEIGHTS_NAME}; fetch it again. (A pickled adapter "
            "is refused, because reading one can run any code.)"
        )
    _check_kind(folder)
    config: Any = model.config
    model.config = SimpleNamespace(**config.to_dict(), to_dict=config.to_dict)  # type: ignore[assignment] (peft sets fields)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
        _check_vocabulary(folder, tensors, config.vocab_size)
        adapted: Any = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        _check_tensors(folder, tensors, get_peft_model_state_dict(adapted, save_embedding_layers=False))
        config = _untied(adapted.get_base_model(), config)
        result = adapted.merge_and_unload().requires_grad_(False)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"the adapter in {folder} cannot be merged into its base model: {error}") from error
    result.config = config
    for module in result.modules():
        module._forward_hooks.clear()  # peft leaves one, for gradients of the embedding
    return result


def _check_kind(folder: Path) -> None:
    """Refuse adapters that are more than changes of weights."""
    settings = read_json(folder / ADAPTER_CONFIG_NAME)
    kind = settings.get("peft_type")
    reason = None
    if not isinstance(kind, str):
        reason = f"its peft_type is {kind!r}, expected one such as 'LORA'"
    elif "PROMPT" in kind.upper() or kind.upper() in ("P_TUNING", "PREFIX_TUNING", "CPT"):
        reason = f"{kind} puts tokens before a text, which cannot be merged into weights"
    elif settings.get("layer_replication"):
        reason = "layer_replication adds layers; merge it with peft's merge_and_unload() and save the model"
    elif settings.get("ensure_weight_tying"):
        reason = "ensure_weight_tying changes two weights as one; merge it with peft's merge_and_unload() and save that"
    if reason is not None:
        raise CheckpointError(f"the adapter in {folder} cannot be merged into its base model: {reason}")


def _check_vocabulary(folder: Path, stored: Mapping[str, torch.Tensor], size: int) -> None:
    """Refuse an adapter that was trained with more or fewer tokens than its base has."""
    for key, tensor in stored.items():
        if WHOLE.search(key) and tensor.shape[0] != size:
            raise CheckpointError(
                f"the adapter in {folder} was trained with a vocabulary of {tensor.shape[0]} tokens, its base has "
                f"{size}: resize the base with transformers' resize_token_embeddings({tensor.shape[0]}), merge the "
                "adapter with peft's merge_and_unload(), and save the model"
            )


def _untied(base: Any, config: Any) -> Any:
    """The config, and the head on its own, where an adapter changes it or the embedding, to which it was tied."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, table = (cast(Any, module) for module in (base.lm_head, base.model.embed_tokens))
    if not config.tie_word_embeddings or not any(isinstance(module, BaseTunerLayer) for module in (head, table)):
        return config
    layer: Any = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return config.replace(tie_word_embeddings=False)


def _check_tensors(folder: Path, stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError for tensors that are missing, left over or damaged: peft warns, and merges the others."""
    problems = [f"{key}: missing" for key in wanted.keys() - stored.keys()]
    # A whole embedding or head next to the adapter is that of its base, unless it was trained, when it is wanted.
    left_over = [key for key in stored.keys() - wanted.keys() if not WHOLE.search(key)]
    problems += [f"{key}: unexpected" for key in left_over]
    problems += [f"{key}: holds NaN" for key, tensor in stored.items() if tensor.isnan().any()]
    if problems:
        raise CheckpointError(f"the adapter in {folder} does not fit its base model:", sorted(problems))
