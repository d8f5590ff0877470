"""A folder with a LoRA adapter alone: its base model, with the adapter merged into it by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastllama.config.fields import read_json
from fastllama.loading.stored import CheckpointError, Held

ADAPTER_CONFIG_NAME = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was trained on.

    Raises:
        CheckpointError: its config does not say.
    """
    base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG_NAME} names no base_model_name_or_path; expected the name or folder of the "
            "model that the adapter belongs to"
        )
    return base


def merged_tensors(folder: Path, base: Path | None) -> dict[str, Held]:
    """The base model's tensors, with the adapter merged into them.

    Args:
        folder: of the adapter.
        base: the folder of its base model.

    Raises:
        CheckpointError: the base has no folder, or peft cannot put the two together.
        NotImplementedError: peft or transformers is not installed.
    """
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise NotImplementedError(
            f"{folder} holds a LoRA adapter alone, which is merged into its base model with peft and transformers: "
            "pip install peft transformers, or merge it elsewhere and save the model"
        ) from error
    if base is None or not base.is_dir():
        raise CheckpointError(f"{folder} is an adapter of {base}; expected a base model with a folder of its own")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    try:
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"the adapter in {folder} does not fit the model in {base}: {error}") from error
    return {key: Held(tensor.detach()) for key, tensor in merged.named_parameters()}
