"""Load a checkpoint's tensors into a model, with every key accounted for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from fastllama.config.fields import CONFIG_NAME
from fastllama.config.llama import DTYPES
from fastllama.loading.names import CheckpointError, resolve
from fastllama.loading.safetensors import FLOAT_BYTES, Stored, blocks, find_tensors

HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # stored by old checkpoints, computed from the config
RANDOM_POOL = 8388593  # size of the pool that random weights are cut from; prime, so that no two rows coincide

Model = TypeVar("Model", bound=nn.Module)


def load_model(
    model_cls: type[Model],
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    progress: bool = True,
) -> Model:
    """Build a model and fill it from a checkpoint.

    Args:
        model_cls: called with the LlamaConfig; its parameters are named as in Hugging Face's checkpoints.
        name: see :func:`resolve`.
        dtype: dtype of the parameters; the config's for None and ``"auto"``.
        device: where the parameters go.
        quantize: not available yet.
        progress: show a progress bar on stderr if that is a terminal.

    Returns:
        The model in eval mode, its parameters without gradients, ``model.generation_config`` set.

    Raises:
        CheckpointNotFoundError: no checkpoint was found under the name.
        CheckpointError: files are missing or damaged; or keys are missing, unexpected, of a wrong shape or not floating
            point; or tensors hold NaN. The message lists all of them.
        ValueError, NotImplementedError: its configs ask for something that fastllama does not support.
    """
    if quantize is not None:
        raise NotImplementedError(f"int8/int4 are not available yet: quantize is {quantize!r}, expected None")
    source = resolve(name)
    target = _torch_dtype(source.config.dtype if dtype in (None, "auto") else dtype)
    stored = {} if source.folder is None else find_tensors(source.folder)
    with torch.device("meta"):
        model = model_cls(source.config.replace(dtype=dtype_name(target)))
    if source.folder is not None:
        _check_tensors(source.folder, stored, dict(model.named_parameters(remove_duplicate=False)))
    parameters = _materialise(model, target, torch.device(device))
    if source.folder is None:
        _fill_random(parameters, source.config.initializer_range)
    else:
        _fill(parameters, stored, source.folder, progress)
    tie_weights: Any = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    model.generation_config = source.generation_config  # type: ignore[assignment]
    return model.eval()


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype_name(dtype) not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected None, 'auto' or one of {', '.join(DTYPES)}")
    return getattr(torch, dtype_name(dtype))


def dtype_name(dtype: str | torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensors(folder: Path, stored: dict[str, Stored], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise one error for all tensors that are missing, unexpected or of a wrong shape or dtype.

    Harmless extra tensors are removed from ``stored``. A parameter with several names needs only one of them.
    """
    for key in [key for key in stored if key not in parameters and HARMLESS.search(key)]:
        del stored[key]
    found = {id(parameters[key]) for key in stored if key in parameters}
    problems = []
    for key, parameter in parameters.items():
        if id(parameter) not in found:
            problems.append(f"{key}: missing, expected {list(parameter.shape)}")
            found.add(id(parameter))
    for key, tensor in stored.items():
        if key not in parameters:
            problems.append(f"{key}: unexpected")
            continue
        if tensor.shape != tuple(parameters[key].shape):
            problems.append(f"{key}: shape {list(tensor.shape)}, expected {list(parameters[key].shape)}")
        if tensor.dtype not in FLOAT_BYTES:
            problems.append(f"{key}: dtype {tensor.dtype}, expected one of {', '.join(FLOAT_BYTES)}")
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its {CONFIG_NAME}:", problems)


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Give every parameter memory, uninitialised; parameters shared under several names stay shared."""
    made: dict[int, nn.Parameter] = {}
    parameters = {}
    for key, abstract in list(model.named_parameters(remove_duplicate=False)):
        if id(abstract) not in made:
            memory = torch.empty(abstract.shape, dtype=dtype, device=device)
            made[id(abstract)] = nn.Parameter(memory, requires_grad=False)
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(abstract)])
        parameters[key] = made[id(abstract)]
    assert not any(buffer.is_meta for buffer in model.buffers()), "a checkpoint does not hold buffers"
    return parameters


def _fill(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Stored], folder: Path, progress: bool) -> None:
    """Copy every stored tensor into its parameter."""
    filled: set[int] = set()
    problems = []
    total = sum(parameters[key].nbytes for key in stored)
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False, disable=disable) as bar:
        for key, tensor in stored.items():
            parameter = parameters[key]
            if id(parameter) not in filled and not _copy(key, tensor, parameter):
                problems.append(f"{key}: holds NaN")
            elif id(parameter) in filled and not _equal(key, tensor, parameter):
                problems.append(f"{key}: differs from the tensor that tie_word_embeddings ties it to")
            filled.add(id(parameter))
            bar.update(parameter.nbytes)
    if problems:
        raise CheckpointError(f"the weights in {folder} are damaged:", problems)


def _copy(key: str, tensor: Stored, parameter: nn.Parameter) -> bool:
    """Fill the parameter from the file; return whether it is free of NaN."""
    clean = True
    for rows, block in blocks(key, tensor):
        parameter.data[rows].copy_(block)
        clean = clean and not block.max().isnan()  # max propagates NaN, and takes a fraction of isnan's time
    return clean


def _equal(key: str, tensor: Stored, parameter: nn.Parameter) -> bool:
    """Whether the file holds what the parameter already does."""
    return all(torch.equal(parameter.data[rows], block.to(parameter)) for rows, block in blocks(key, tensor))


@torch.no_grad()
def _fill_random(parameters: Mapping[str, nn.Parameter], std: float) -> None:
    """Normal weights, norms of one and biases of zero; the same numbers in every run and on every device.

    Generating a number for each weight would take longer than reading weights from a disk, so weights are cut from a
    pool of normal numbers, each at another offset.
    """
    pool = torch.randn(RANDOM_POOL, generator=torch.Generator().manual_seed(0)).mul_(std)
    offset = 0
    for key, parameter in parameters.items():
        pool = pool.to(parameter)
        if parameter.dim() == 1:
            parameter.fill_(0.0 if key.endswith("bias") else 1.0)
        else:
            offset = _tile(parameter.view(-1), pool, offset)


def _tile(target: torch.Tensor, pool: torch.Tensor, offset: int) -> int:
    """Fill ``target`` with the pool's numbers, cyclically from ``offset``; return the offset after the last one."""
    start = 0
    while start < target.numel():
        piece = pool[offset : offset + target.numel() - start]
        target[start : start + piece.numel()] = piece
        start += piece.numel()
        offset = (offset + piece.numel()) % pool.numel()
    return offset
