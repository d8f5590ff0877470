"""Load a checkpoint's tensors into a model, with every key accounted for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from fastllama.config import LlamaConfig
from fastllama.config.fields import CONFIG_NAME, tolerate
from fastllama.loading import adapter
from fastllama.loading.match import EMBEDDING, HEAD, layers_in, matched, missing_hint
from fastllama.loading.names import resolve
from fastllama.loading.stored import CheckpointError, Stored

RANDOM_POOL = 8388593  # size of the pool that random weights are cut from; prime, so that no two rows coincide

Model = TypeVar("Model", bound=nn.Module)


def load_model(
    model_cls: type[Model],
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    progress: bool = True,
    strict: bool = False,
) -> Model:
    """Build a model and fill it from a checkpoint.

    Args:
        model_cls: called with the LlamaConfig; its parameters are named as in Hugging Face's checkpoints.
        name: see :func:`resolve`.
        dtype: dtype of the parameters; for None and ``"auto"`` the config's, or else that of the stored weights.
        device: where the parameters go.
        quantize: not available yet.
        progress: show a progress bar on stderr if that is a terminal.
        strict: refuse what is otherwise named in a warning and left out: unknown keys, tensors that no Llama uses.

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
    source = resolve(name, strict)
    config = source.config.replace(dtype=source.dtype(dtype))
    stored: Mapping[str, Stored] = {}
    if source.path is not None:
        stored = _checked(source.path, source.find_tensors(), config, model_cls, strict)
        if config.tie_word_embeddings and _head_differs(source.path, stored, strict):
            config = config.replace(tie_word_embeddings=False)
    model = _on_meta(model_cls, config)
    parameters = _materialise(model, config.torch_dtype, torch.device(device))
    if source.path is None:
        _fill_random(parameters, config.initializer_range)
    else:
        _fill(parameters, stored, source.path, progress)
    tie_weights: Any = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    if source.adapter is not None:
        model = adapter.merged(model, source.adapter)
    model.generation_config = source.generation_config  # type: ignore[assignment]
    return model.eval()


def _on_meta(model_cls: type[Model], config: LlamaConfig) -> Model:
    """A model without memory."""
    try:
        with torch.device("meta"):
            return model_cls(config)
    except RuntimeError as error:
        raise CheckpointError(f"the sizes in {CONFIG_NAME} make no network: {error}") from error


def _checked(
    where: Path, stored: Mapping[str, Stored], config: LlamaConfig, model_cls: type[nn.Module], strict: bool
) -> dict[str, Stored]:
    """The stored tensors by parameter; one error for all that are missing, unexpected or of a wrong shape or dtype.

    A parameter with several names needs only one of them.
    """
    message, layers = f"the weights in {where} do not fit its {CONFIG_NAME}:", layers_in(stored)
    if layers < config.num_hidden_layers:  # before a network of as many layers is made
        raise CheckpointError(message, [f"num_hidden_layers is {config.num_hidden_layers}, the weights have {layers}"])
    parameters = dict(_on_meta(model_cls, config).named_parameters(remove_duplicate=False))
    found, problems = matched(stored, parameters, config.num_hidden_layers, str(where), strict)
    present = {id(parameters[key]) for key in found}
    for key, parameter in parameters.items():
        if id(parameter) not in present:
            problems.append(f"{key}: missing, expected {list(parameter.shape)}{missing_hint(key)}")
            present.add(id(parameter))
    for key, tensor in found.items():
        if tensor.shape != tuple(parameters[key].shape):
            problems.append(f"{key}: shape {list(tensor.shape)}, expected {list(parameters[key].shape)}")
        if not tensor.is_float:
            problems.append(f"{key}: stored as {tensor.dtype}, which is not read")
    if problems:
        raise CheckpointError(message, problems)
    return found


def _head_differs(where: Path, stored: Mapping[str, Stored], strict: bool) -> bool:
    """Whether a head that the config ties to the embedding is stored next to it and is another one.

    Then it is not tied, as in transformers.
    """
    if HEAD not in stored or EMBEDDING not in stored:
        return False
    if stored[HEAD].dtype == stored[EMBEDDING].dtype:
        pairs = zip(stored[HEAD].blocks(), stored[EMBEDDING].blocks(), strict=True)
        is_equal = all(torch.equal(head, embedding) for (_, head), (_, embedding) in pairs)
    else:  # blocks of other sizes
        head, embedding = (torch.cat([block for _, block in stored[key].blocks()]) for key in (HEAD, EMBEDDING))
        is_equal = torch.equal(head.to(embedding.dtype), embedding)
    if is_equal:
        return False
    tolerate(f"{where}: {HEAD} and {EMBEDDING} differ, though tie_word_embeddings is true: they are not tied", strict)
    return True


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


def _fill(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Stored], where: Path, progress: bool) -> None:
    """Copy every stored tensor into its parameter."""
    filled: set[int] = set()
    problems = []
    total = sum(parameters[key].nbytes for key in stored)
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False, disable=disable) as bar:
        for key, tensor in stored.items():
            parameter = parameters[key]
            if id(parameter) not in filled and not _copy(tensor, parameter):
                problems.append(f"{key}: holds NaN")
            filled.add(id(parameter))
            bar.update(parameter.nbytes)
    if problems:
        raise CheckpointError(f"the weights in {where} are damaged:", problems)


def _copy(tensor: Stored, parameter: nn.Parameter) -> bool:
    """Fill the parameter from the file; return whether it is free of NaN."""
    clean = True
    for rows, block in tensor.blocks():
        parameter.data[rows].copy_(block)
        clean = clean and not block.max().isnan()  # max propagates NaN, and takes a fraction of isnan's time
    return clean


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
