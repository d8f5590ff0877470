"""Load a checkpoint's tensors into a model, with every key accounted for."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from fastllama.config import LlamaConfig
from fastllama.config.fields import CONFIG_NAME, tolerate
from fastllama.config.quantization import LEAST_GROUP, QuantizationConfig, Scheme
from fastllama.loading import adapter, formats
from fastllama.loading.coded import Coded, CodedTensor, DecodedTensor, is_quantized
from fastllama.loading.formats import ours
from fastllama.loading.mapped import MappedFiles
from fastllama.loading.match import EMBEDDING, HEAD, layers_in, listed, matched, missing_hint
from fastllama.loading.names import Source, resolve
from fastllama.loading.random import random_tensors
from fastllama.loading.stored import CheckpointError, Stored, said_once
from fastllama.model.memory import empty
from fastllama.quantization.linear import Packed, left_dense, multiplied_together, quantize_modules, together

logger = logging.getLogger(__name__)

NONE = "none"  # quantize: the weights that the codes of a file stand for
WEIGHT = ".weight"
MOST_CHANGE = 0.5  # of a step, by which rounding scales and offsets may move a weight

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
        quantize: quantize the weights as they are read: ``"int8"``, ``"int4"`` or a QuantizationConfig; ``"none"``:
            write those out that the file holds as codes; None: keep these as codes, and take activations in 8 bits.
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
    wanted = QuantizationConfig.of(None if quantize == NONE else quantize)
    if wanted is not None and source.adapter:
        raise ValueError(
            f"{source.name} is an adapter: load it, save the model, and quantize that (quantize is {quantize!r})"
        )
    stored, config = _tensors_of(source, config, model_cls, quantize is not None, strict)
    if wanted is not None and (source.config.quantization or any(map(is_quantized, stored.values()))):
        logger.warning(
            "%s: its weights are codes already, and quantizing them again rounds them twice; "
            "quantize=None loads what is stored",
            source.name,
        )
    if quantize is None and source.path is not None:
        wanted = None if source.adapter else _as_stored(stored, config)
        _say_what_is_written_out(source.name, stored, config, wanted)
    model = on_meta(model_cls, config.replace(quantization=wanted or config.quantization))
    if wanted is not None and (kept := left_dense(model, wanted)):
        why = "because of their number of rows (panels of 16), or of what they are multiplied with"
        tolerate(f"{source.name}: not quantized, {why}: {listed(kept)}", strict)
    in_place = _materialise(model, torch.device(device), stored)
    _fill(model, stored, in_place, source.path, quantize is None, progress)
    if source.adapter is not None:
        model = adapter.merged(model, source.adapter)
    model.generation_config = source.generation_config  # type: ignore[assignment]
    return model.eval()


def _tensors_of(
    source: Source, config: LlamaConfig, model_cls: type[nn.Module], writes_out: bool, strict: bool
) -> tuple[Mapping[str, Stored], LlamaConfig]:
    """The stored tensors by parameter, and the config as they make it.

    With ``writes_out``, those that fastllama has quantized are read as the weights that they stand for.
    """
    if source.path is None:
        shapes = {key: tensor.shape for key, tensor in _tensors(on_meta(model_cls, config)).items()}
        made = random_tensors(shapes, config.initializer_range)
        if config.tie_word_embeddings:  # one matrix under two names: the head's numbers, as ever
            del made[EMBEDDING]
        return made, config
    stored = _checked(source.path, source.find_tensors(), config, model_cls, strict)
    if config.quantization is not None and writes_out:
        stored, config = formats.written_out(stored, config), config.replace(quantization=None)
    if config.tie_word_embeddings and _head_differs(source.path, stored, strict):
        config = config.replace(tie_word_embeddings=False)
    return stored, config


def on_meta(model_cls: type[Model], config: LlamaConfig) -> Model:
    """A model without memory, in the config's dtype and with quantized modules where it says so."""
    try:
        with torch.device("meta"), _Uninitialised():
            model = model_cls(config).to(config.torch_dtype)
            if config.quantization is not None:
                quantize_modules(model, config, config.quantization)
    except RuntimeError as error:
        raise CheckpointError(f"the sizes in {CONFIG_NAME} make no network: {error}") from error
    return model.requires_grad_(False)


class _Uninitialised(TorchFunctionMode):
    """While it is on, modules leave their parameters as they are; on the meta device torch imports Dynamo for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


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
    model = on_meta(model_cls, config)
    if config.quantization and (wrong := ours.contradictions(stored, model, config.quantization)):
        raise CheckpointError(message, said_once(wrong))
    wanted = _tensors(model)
    found, problems = matched(stored, wanted, config.num_hidden_layers, str(where), strict)
    present = {id(wanted[key]) for key in found}
    for key, tensor in wanted.items():
        if id(tensor) not in present:
            problems.append(f"{key}: missing, expected {list(tensor.shape)}{missing_hint(key)}")
            present.add(id(tensor))
    for key, tensor in found.items():
        if tensor.shape != tuple(wanted[key].shape):
            how = f"; read as {tensor.dtype}: are the config's bits right?" if isinstance(tensor, CodedTensor) else ""
            problems.append(f"{key}: shape {list(tensor.shape)}, expected {list(wanted[key].shape)}{how}")
        if key.endswith((".codes", ".scales", ".offsets")):
            if tensor.natural_dtype != wanted[key].dtype:
                problems.append(f"{key}: stored as {tensor.dtype}, expected {wanted[key].dtype}")
        elif not tensor.is_float:
            problems.append(f"{key}: stored as {tensor.dtype}, which is not read")
    if problems:
        raise CheckpointError(message, said_once(problems, by_layer=True))
    return found


def _as_stored(stored: Mapping[str, Stored], config: LlamaConfig) -> QuantizationConfig | None:
    """The config that keeps matrices as the codes that are stored; None: there are none, or none that we can hold."""
    columns = {key.removesuffix(WEIGHT): tensor.shape[1] for key, tensor in stored.items() if len(tensor.shape) == 2}
    schemes = {name: tensor.scheme for name in columns if isinstance(tensor := stored[name + WEIGHT], Coded)}
    if config.tie_word_embeddings:
        for name, other in itertools.permutations((EMBEDDING.removesuffix(WEIGHT), HEAD.removesuffix(WEIGHT))):
            if name not in columns and other in schemes:
                schemes[name], columns[name] = schemes[other], columns[other]
    held = {name: scheme for name, scheme in schemes.items() if scheme is not None and scheme.group % LEAST_GROUP == 0}
    for names in multiplied_together(columns):
        found = [held[name] for name in names if name in held]
        if len(found) == len(names) and len({scheme.group for scheme in found}) == 1:
            bits, has_offsets = max(scheme.bits for scheme in found), any(scheme.has_offsets for scheme in found)
            held |= dict.fromkeys(names, Scheme(bits, found[0].group, has_offsets))
        else:  # one product has one scheme
            held = {name: scheme for name, scheme in held.items() if name not in names}
    return QuantizationConfig.holding(held, columns) if held else None


def _say_what_is_written_out(
    name: str, stored: Mapping[str, Stored], config: LlamaConfig, kept: QuantizationConfig | None
) -> None:
    """Warn about quantized matrices that take more memory than in their file, and may lose bits in the dtype."""
    names = [key.removesuffix(WEIGHT) for key, tensor in stored.items() if is_quantized(tensor)]
    out = [each for each in names if kept is None or kept.scheme_of(each, stored[each + WEIGHT].shape[1]) is None]
    if out:
        logger.warning("%s: written out in %s, as their codes cannot be kept: %s", name, config.dtype, listed(out))


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


def _materialise(model: nn.Module, device: torch.device, stored: Mapping[str, Stored]) -> set[int]:
    """Give every parameter and buffer memory; those shared under several names stay shared.

    On a CPU it is that of the file where the file holds the same, else it is new and uninitialised. Those that are
    multiplied together lie one behind the other.

    Returns:
        The ids of those that lie in a file.
    """
    tensors, made, in_place = _tensors(model), dict[int, torch.Tensor](), set[int]()
    by_id = {id(tensors[key]): tensor for key, tensor in stored.items() if key in tensors}
    files = MappedFiles()
    for parts in [*together(model), *([tensor] for tensor in tensors.values())]:
        if id(parts[0]) in made:
            continue
        first, sizes = parts[0], [len(tensor) for tensor in parts]
        mapped = files.rows([by_id.get(id(part)) for part in parts], first.dtype) if device.type == "cpu" else None
        shape = (sum(sizes), *first.shape[1:])
        memory = empty(shape, first.dtype, device) if mapped is None else mapped
        for part, rows in zip(parts, memory.split(sizes), strict=True):
            is_parameter = isinstance(part, nn.Parameter)
            made[id(part)] = nn.Parameter(rows, requires_grad=False) if is_parameter else rows
            in_place |= set() if mapped is None else {id(made[id(part)])}
    for key, tensor in tensors.items():
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(tensor)])
    return in_place


def _fill(
    model: nn.Module,
    stored: Mapping[str, Stored],
    in_place: set[int],
    where: Path | None,
    keeps_codes: bool,
    progress: bool,
) -> None:
    """Copy every stored tensor that is not ``in_place`` into its place; quantize it if only its module is quantized.

    With ``keeps_codes``, matrices that are stored as codes stay the codes that they are.
    """
    tensors, filled, problems, worst = _tensors(model), set[int](), list[str](), (0.0, "")
    unread: list[str] = []
    total = sum(math.prod(tensor.shape) for tensor in stored.values())
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=total, unit="weights", unit_scale=True, desc="loading", leave=False, disable=disable) as bar:
        for key, tensor in stored.items():
            packed = None if key in tensors else cast(Packed, model.get_submodule(key.removesuffix(WEIGHT)))
            target = tensors[key] if packed is None else packed.codes
            if id(target) not in filled:
                try:
                    is_there = id(target) in in_place
                    clean, change = _put(None if is_there else tensor, target, packed, keeps_codes)
                except ValueError as error:  # what reading the tensor finds wrong with it
                    clean, change = True, 0.0
                    unread += getattr(error, "problems", ()) or [f"{key}: {error}"]
                worst = max(worst, (change, key))
                where_else = "" if packed is None and target.dim() < 3 else " or infinity"
                problems += [] if clean else [f"{key}: holds NaN{where_else}"]
            filled.add(id(target))
            bar.update(math.prod(tensor.shape))
    if problems or unread:
        raise CheckpointError(f"the weights in {where} are damaged:", [*said_once(unread), *problems])
    if worst[0]:
        logger.warning(
            "%s: scales and offsets of codes are kept in float16, which moves a weight by up to %.2g of a step (%s)",
            where, *worst,
        )  # fmt: skip


def _put(tensor: Stored | None, target: torch.Tensor, packed: Packed | None, keeps_codes: bool) -> tuple[bool, float]:
    """Put a tensor into its place; return whether it holds numbers, and by how many steps rounding moves a weight.

    None is there already.

    Raises:
        ValueError: the codes' scales do not fit float16.
    """
    if tensor is None:
        return _is_clean(target), 0.0
    if packed is None:
        return _copy(tensor, target), 0.0
    if not (keeps_codes and isinstance(tensor, Coded) and tensor.scheme):
        return packed.fill(block for _, block in tensor.blocks()), 0.0
    codes = tensor.read()
    change = codes.change_in_float16(packed.offsets is not None)
    if change > MOST_CHANGE and bool(codes.scale_ng.isfinite().all()):
        raise ValueError('its scales do not fit float16; load with quantize="none"')
    return packed.take(codes.code_nk, codes.scale_ng, codes.offset_ng, tensor.scheme.bits), change


def _copy(tensor: Stored, target: torch.Tensor) -> bool:
    """Fill the parameter or buffer from the file; return whether it is free of NaN."""
    clean = True
    for rows, block in tensor.blocks():
        target.data[rows].copy_(block)
        if isinstance(tensor, (CodedTensor, DecodedTensor)):
            clean = clean and bool(block.isfinite().all())  # a scale may be infinite
        clean = clean and _is_clean(block)
    return clean


def _is_clean(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN; and of infinity, where it holds scales of codes, one a panel and row."""
    if not tensor.is_floating_point():
        return True
    return not bool(tensor.max().isnan()) if tensor.dim() < 3 else bool(tensor.isfinite().all())  # max propagates NaN
