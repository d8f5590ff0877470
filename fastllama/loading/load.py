"""Load a checkpoint's tensors into a model, with every key accounted for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from fastllama.config import LlamaConfig
from fastllama.config.fields import CONFIG_NAME, tolerate
from fastllama.config.quantization import QuantizationConfig
from fastllama.loading import adapter
from fastllama.loading.match import EMBEDDING, HEAD, layers_in, listed, matched, missing_hint
from fastllama.loading.names import resolve
from fastllama.loading.random import random_tensors
from fastllama.loading.stored import CheckpointError, Stored
from fastllama.quantization.linear import Packed, left_dense, quantize_modules, together

Model = TypeVar("Model", bound=nn.Module)


def load_model(
    model_cls: type[Model],
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | QuantizationConfig | None = None,
    progress: bool = True,
    strict: bool = False,
) -> Model:
    """Build a model and fill it from a checkpoint.

    Args:
        model_cls: called with the LlamaConfig; its parameters are named as in Hugging Face's checkpoints.
        name: see :func:`resolve`.
        dtype: dtype of the parameters; for None and ``"auto"`` the config's, or else that of the stored weights.
        device: where the parameters go.
        quantize: quantize the weights as they are read: ``"int8"``, ``"int4"`` or a QuantizationConfig.
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
    source = resolve(name, strict)
    config = source.config.replace(dtype=source.dtype(dtype))
    wanted = QuantizationConfig.of(quantize)
    if wanted is not None and (config.quantization or source.adapter):
        what = "quantized already" if config.quantization else "an adapter: load it, save the model, and quantize that"
        raise ValueError(f"{source.name} is {what} (quantize is {quantize!r})")
    if source.path is None:
        shapes = {key: tensor.shape for key, tensor in _tensors(on_meta(model_cls, config)).items()}
        stored: Mapping[str, Stored] = random_tensors(shapes, config.initializer_range)
    else:
        stored = _checked(source.path, source.find_tensors(), config, model_cls, strict)
        if config.tie_word_embeddings and _head_differs(source.path, stored, strict):
            config = config.replace(tie_word_embeddings=False)
    model = on_meta(model_cls, config.replace(quantization=wanted or config.quantization))
    if wanted is not None and (kept := left_dense(model, wanted)):
        why = "because of their number of rows (panels of 16), or of what they are multiplied with"
        tolerate(f"{source.name}: not quantized, {why}: {listed(kept)}", strict)
    _materialise(model, torch.device(device))
    _fill(model, stored, source.path, progress)
    if source.adapter is not None:
        model = adapter.merged(model, source.adapter)
    model.generation_config = source.generation_config  # type: ignore[assignment]
    return model.eval()


def on_meta(model_cls: type[Model], config: LlamaConfig) -> Model:
    """A model without memory, in the config's dtype and with quantized modules where it says so."""
    try:
        with torch.device("meta"):
            model = model_cls(config).to(config.torch_dtype)
            if config.quantization is not None:
                quantize_modules(model, config, config.quantization)
    except RuntimeError as error:
        raise CheckpointError(f"the sizes in {CONFIG_NAME} make no network: {error}") from error
    return model.requires_grad_(False)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of a model, by name: parameters, codes and scales; tied ones twice."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def _checked(
    where: Path, stored: Mapping[str, Stored], config: LlamaConfig, model_cls: type[nn.Module], strict: bool
) -> dict[str, Stored]:
    """The stored tensors by parameter; one error for all that are missing, unexpected or of a wrong shape or dtype.

    A parameter with several names needs only one of them.
    """
    message, layers = f"the weights in {where} do not fit its {CONFIG_NAME}:", layers_in(stored)
    if layers < config.num_hidden_layers:  # before a network of as many layers is made
        raise CheckpointError(message, [f"num_hidden_layers is {config.num_hidden_layers}, the weights have {layers}"])
    wanted = _tensors(on_meta(model_cls, config))
    found, problems = matched(stored, wanted, config.num_hidden_layers, str(where), strict)
    present = {id(wanted[key]) for key in found}
    for key, tensor in wanted.items():
        if id(tensor) not in present:
            problems.append(f"{key}: missing, expected {list(tensor.shape)}{missing_hint(key)}")
            present.add(id(tensor))
    for key, tensor in found.items():
        if tensor.shape != tuple(wanted[key].shape):
            problems.append(f"{key}: shape {list(tensor.shape)}, expected {list(wanted[key].shape)}")
        if key.endswith((".codes", ".scales", ".offsets")):
            if tensor.natural_dtype != wanted[key].dtype:
                problems.append(f"{key}: stored as {tensor.dtype}, expected {wanted[key].dtype}")
        elif not tensor.is_float:
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


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer memory, uninitialised; those shared under several names stay shared.

    Those that are multiplied together lie one behind the other.
    """
    made: dict[int, torch.Tensor] = {}
    for joined in together(model):
        sizes = [len(tensor) for tensor in joined]
        memory = torch.empty((sum(sizes), *joined[0].shape[1:]), dtype=joined[0].dtype, device=device)
        made.update(zip(map(id, joined), memory.split(sizes), strict=True))
    for key, abstract in _tensors(model).items():
        if id(abstract) not in made or not isinstance(made[id(abstract)], type(abstract)):
            memory = made.get(id(abstract))
            memory = torch.empty_like(abstract, device=device) if memory is None else memory
            is_parameter = isinstance(abstract, nn.Parameter)
            made[id(abstract)] = nn.Parameter(memory, requires_grad=False) if is_parameter else memory
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(abstract)])


def _fill(model: nn.Module, stored: Mapping[str, Stored], where: Path | None, progress: bool) -> None:
    """Copy every stored tensor into its place; quantize it where its module is quantized and it is not."""
    tensors, filled, problems = _tensors(model), set[int](), []
    total = sum(math.prod(tensor.shape) for tensor in stored.values())
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="weights", unit_scale=True, desc="loading", leave=False, disable=disable) as bar:
        for key, tensor in stored.items():
            packed = None if key in tensors else cast(Packed, model.get_submodule(key.rpartition(".")[0]))
            target = tensors[key] if packed is None else packed.codes
            if id(target) not in filled:
                clean = _copy(tensor, target) if packed is None else packed.fill(block for _, block in tensor.blocks())
                problems += [] if clean else [f"{key}: holds NaN{'' if packed is None else ' or infinity'}"]
            filled.add(id(target))
            bar.update(math.prod(tensor.shape))
    if problems:
        raise CheckpointError(f"the weights in {where} are damaged:", problems)


def _copy(tensor: Stored, target: torch.Tensor) -> bool:
    """Fill the parameter or buffer from the file; return whether it is free of NaN."""
    clean = True
    for rows, block in tensor.blocks():
        target.data[rows].copy_(block)
        clean = clean and not (block.is_floating_point() and block.max().isnan())  # max propagates NaN, and is faster
    return clean
