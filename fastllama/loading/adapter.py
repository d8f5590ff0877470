"""A LoRA adapter, merged into its base model by peft."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import nn

from fastllama.config.fields import read_json
from fastllama.loading.stored import CheckpointError

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

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
    if not isinstance(base, str) or not base or Path(base).expanduser().absolute() == folder.absolute():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG_NAME}: base_model_name_or_path is {base!r}; expected the name or folder of the "
            "model that the adapter belongs to"
        )
    return folder / base if (folder / base).is_dir() and not Path(base).is_dir() else base


def merged(model: Model, folder: Path) -> Model:
    """The base model with the adapter merged into its weights, in its own dtype.

    Raises:
        CheckpointError: the adapter's weights are missing or do not fit, or it is of a kind that cannot be merged.
        NotImplementedError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise NotImplementedError(
            f"{folder} holds a LoRA adapter, which peft merges into its base model: pip install peft, or merge it "
            "elsewhere and save the model"
        ) from error
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{folder} has an {ADAPTER_CONFIG_NAME} and no {ADAPTER_WEIGHTS_NAME}; fetch it again")
    config: Any = model.config
    model.config = SimpleNamespace(**config.to_dict(), to_dict=config.to_dict)  # type: ignore[assignment] (peft sets fields)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        result = adapted.merge_and_unload().requires_grad_(False)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"the adapter in {folder} cannot be merged into its base model: {error}") from error
    result.config = config
    for module in result.modules():
        module._forward_hooks.clear()  # peft leaves one, for gradients of the embedding
    return result
