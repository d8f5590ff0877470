"""Checkpoints: a name to a folder, safetensors files to a module with every key accounted for, and back.

Files are memory-mapped and copied block by block, so a model takes the memory of its weights and a few
megabytes. Only safetensors is read: unpickling a ``.bin`` file can run any code.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from fastllama.config import (
    CONFIG_NAME,
    DTYPES,
    GenerationConfig,
    LlamaConfig,
    RopeParameters,
    read_json,
    write_json,
)

DEMO = "demo"
RANDOM_PREFIX = "random:"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

#: What of a repository on the hub makes up a checkpoint; its folders hold other formats.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
HUB_IGNORED = ["*/*", "consolidated*.safetensors"]

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that are read, in safetensors' names
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # stored by old checkpoints, computed from the config
BLOCK_BYTES = 16 * 2**20  # mapped at once while loading
RANDOM_POOL = 8388593  # normal numbers that random weights are cut from; prime, so that no two rows coincide
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; ``problems`` lists everything found wrong with it."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([message, *self.problems]))


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A name that stands for no checkpoint within reach."""


@dataclass(frozen=True)
class Source:
    """What a name stands for: the configs, and the folder with the weights (None: random weights)."""

    name: str
    folder: Path | None
    config: LlamaConfig
    generation_config: GenerationConfig


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


# ---- names -------------------------------------------------------------------------------------------


def _llama3(factor: float, **shape: Any) -> LlamaConfig:
    rope = RopeParameters(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return LlamaConfig(
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        dtype="bfloat16",
        rope=rope,
        **shape,
    )


#: The configs of published models, by the name that follows ``random:``.
RANDOM_SHAPES: dict[str, LlamaConfig] = {
    "llama-2-7b": LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="float16"),
    "llama-3.2-1b": _llama3(
        32.0, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama3(
        32.0,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama3(8.0, hidden_size=4096, intermediate_size=14336),
    "llama-3.1-70b": _llama3(
        8.0, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}


def resolve(name: str | os.PathLike[str]) -> Source:
    """The configs of a checkpoint and where its weights are, fetched from the hub if need be.

    Args:
        name: a folder, the id of a repository on the Hugging Face hub, ``"demo"`` for the checkpoint shipped
            with the package (``"./demo"`` for a folder of that name), or ``"random:SHAPE"`` with a shape of
            ``RANDOM_SHAPES``.

    Raises:
        CheckpointNotFoundError: if there is no such checkpoint, or the hub cannot be reached.
        ValueError, NotImplementedError: if its configs ask for what fastllama does not do.
    """
    if is_random(name):
        config = random_config(str(name))
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        return Source(str(name), None, config, GenerationConfig.from_dict(ids))
    folder = resolve_folder(name)
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointNotFoundError(f"{folder} is not a checkpoint: it has no {CONFIG_NAME}")
    config, generation = LlamaConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    return Source(str(name), folder, config, generation)


def is_random(name: str | os.PathLike[str]) -> bool:
    """Whether the name asks for random weights of a published shape."""
    return isinstance(name, str) and name.startswith(RANDOM_PREFIX)


def random_config(name: str) -> LlamaConfig:
    """The config of a ``random:SHAPE`` name; a CheckpointNotFoundError lists them if there is no such one."""
    shape = name.removeprefix(RANDOM_PREFIX)
    if shape not in RANDOM_SHAPES:
        expected = ", ".join(RANDOM_PREFIX + known for known in RANDOM_SHAPES)
        raise CheckpointNotFoundError(f"no shape {shape!r}; expected one of {expected}")
    return RANDOM_SHAPES[shape]


def resolve_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that has one: a folder, a hub id or ``"demo"`` (see :func:`resolve`).

    Raises:
        CheckpointNotFoundError: if there is no such folder and the hub does not give one.
    """
    if is_random(name):
        raise CheckpointNotFoundError(f"{name} has random weights and no folder")
    if name == DEMO:
        return Path(str(importlib.resources.files("fastllama") / "data" / DEMO))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointNotFoundError(f"{folder} is a file; expected the folder of a checkpoint")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        return _fetch(name)
    expected = f"a folder, a Hugging Face id, {DEMO!r} or '{RANDOM_PREFIX}SHAPE'"
    raise CheckpointNotFoundError(f"there is no folder {folder}; expected {expected}")


def _fetch(repo_id: str) -> Path:
    """Download a repository into the hub's cache, or find it there; the cache's folder."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        folder = huggingface_hub.snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except Exception as error:  # the client's HTTP library, its cache and its checks each raise their own
        reason = " ".join(str(error).split("\n\n")[0].split())
        if constants.HF_HUB_OFFLINE:
            reason = "it is not complete in the cache, and HF_HUB_OFFLINE forbids to download it"
        raise CheckpointNotFoundError(
            f"there is no folder {repo_id!r}, and as a Hugging Face id it cannot be had: {reason}"
        ) from error
    return Path(folder)


# ---- loading -----------------------------------------------------------------------------------------


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
        dtype: of the parameters; None and ``"auto"`` take the config's.
        device: of the parameters.
        quantize: not available yet.
        progress: show a progress bar on stderr if that is a terminal.

    Returns:
        The model in eval mode, its parameters without gradients, ``model.generation_config`` set.

    Raises:
        CheckpointNotFoundError: if the name stands for no checkpoint.
        CheckpointError: listing every missing or damaged file; or every missing or unexpected key, wrong
            shape and dtype that is not floating point; or every tensor that holds NaN.
        ValueError, NotImplementedError: if its configs ask for what fastllama does not do.
    """
    if quantize is not None:
        raise NotImplementedError(f"int8/int4 are not available yet: quantize is {quantize!r}, expected None")
    source = resolve(name)
    target = _torch_dtype(source.config.dtype if dtype in (None, "auto") else dtype)
    stored = {} if source.folder is None else _find_tensors(source.folder)
    with torch.device("meta"):
        model = model_cls(source.config.replace(dtype=_dtype_name(target)))
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
    if _dtype_name(dtype) not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected None, 'auto' or one of {', '.join(DTYPES)}")
    return getattr(torch, _dtype_name(dtype))


def _dtype_name(dtype: str | torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _find_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint in ``folder``; reads the headers of its files only."""
    stored: dict[str, _Stored] = {}
    problems = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a dict
                    if key in stored:
                        problems.append(f"{key}: in {stored[key].file.name} and again in {file.name}")
                    view = tensors.get_slice(key)
                    stored[key] = _Stored(file, tuple(view.get_shape()), view.get_dtype())
        except FileNotFoundError:
            problems.append(f"{file.name}: missing, though {INDEX_NAME} names it")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: truncated or not a safetensors file ({error})")
    if problems:
        raise CheckpointError(f"the weights in {folder} are incomplete; fetch them again:", problems)
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in ``folder``."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickle files only ({', '.join(pickles)}), which are refused because reading one "
            "can run any code; convert them where you trust them, with transformers' save_pretrained"
        )
    raise CheckpointNotFoundError(f"{folder} holds no weights; expected {WEIGHTS_NAME} or {INDEX_NAME}")


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from keys to files")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if refused := [repr(shard) for shard in shards if not _is_shard_inside(shard)]:
        raise CheckpointError(f"{index} names what is not a safetensors file inside its folder:", refused)
    return [folder / shard for shard in shards]


def _is_shard_inside(shard: str) -> bool:
    """Whether the name is that of a safetensors file below the folder it is looked up in, on any system."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    inside = not (posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts)
    return inside and posix.suffix == ".safetensors"


def _check_tensors(folder: Path, stored: dict[str, _Stored], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise one error for all tensors that are missing, too many or not what the model expects.

    Harmless extra tensors are taken out of ``stored``. Of a parameter with several names one is enough.
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


def _fill(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, _Stored], folder: Path, progress: bool) -> None:
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


def _copy(key: str, tensor: _Stored, parameter: nn.Parameter) -> bool:
    """Fill the parameter from the file; whether it is free of NaN."""
    clean = True
    for rows, block in _blocks(key, tensor):
        parameter.data[rows].copy_(block)
        clean = clean and not block.max().isnan()  # max propagates NaN, and takes a fraction of isnan's time
    return clean


def _equal(key: str, tensor: _Stored, parameter: nn.Parameter) -> bool:
    """Whether the file holds what the parameter already does."""
    return all(torch.equal(parameter.data[rows], block.to(parameter)) for rows, block in _blocks(key, tensor))


def _blocks(key: str, tensor: _Stored) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows and what the file holds there, as views of the mapped file of about BLOCK_BYTES.

    The file is mapped anew for each: pages that were read count as this process's memory until they are
    unmapped.
    """
    step = max(1, BLOCK_BYTES // (math.prod(tensor.shape[1:]) * FLOAT_BYTES[tensor.dtype]))
    for start in range(0, tensor.shape[0], step):
        with safe_open(tensor.file, framework="pt") as tensors:
            yield slice(start, start + step), tensors.get_tensor(key)[start : start + step]


@torch.no_grad()
def _fill_random(parameters: Mapping[str, nn.Parameter], std: float) -> None:
    """Normal weights, norms of one and biases of zero; the same numbers in every run and on every device.

    Drawing a number for each weight would take longer than reading them from a disk, so weights are cut from
    a pool of normal numbers, each at another offset.
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
    """Fill ``target`` with the pool's numbers, cyclically from ``offset``; the offset after the last one."""
    start = 0
    while start < target.numel():
        piece = pool[offset : offset + target.numel() - start]
        target[start : start + piece.numel()] = piece
        start += piece.numel()
        offset = (offset + piece.numel()) % pool.numel()
    return offset


# ---- saving ------------------------------------------------------------------------------------------


def save_model(model: nn.Module, folder: str | os.PathLike[str], max_shard_size: str | int = "5GB") -> None:
    """Write config.json, generation_config.json and safetensors weights that transformers loads.

    Every file is written under a temporary name and renamed when all are complete; weight files of an earlier
    checkpoint in the folder are removed. A tied weight is written once.

    Args:
        model: its parameters may be on any device, and views of larger tensors.
        folder: created if needed.
        max_shard_size: most bytes of tensors in one file, as an int or a text such as ``"500MB"`` or
            ``"2GiB"``; a larger model is cut in several files, with an index.

    Raises:
        ValueError: for a ``max_shard_size`` that is neither.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    generation_config: Any = getattr(model, "generation_config", None)
    tensors = dict(model.named_parameters(remove_duplicate=config.tie_word_embeddings))
    shards = _shards(tensors, _size(max_shard_size))
    _write_shards(folder, shards)
    _write_index(folder, shards)
    for file in folder.iterdir():
        if SHARD_NAME.fullmatch(file.name) and file.name not in shards:
            file.unlink()
    dtype = _dtype_name(next(iter(tensors.values())).dtype)
    config.replace(dtype=dtype).save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> dict[str, dict[str, torch.Tensor]]:
    """File names and the tensors each holds: in order, as many as fit, at least one."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return dict(zip(names, groups, strict=True))


def _write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    temporary = {shard: folder / f".{shard}.{os.getpid()}.tmp" for shard in shards}
    try:
        for shard, tensors in shards.items():
            temporary[shard].touch()
            mode = temporary[shard].stat().st_mode
            save_file(_own_memory(tensors), temporary[shard], metadata={"format": "pt"})
            temporary[shard].chmod(mode)  # safetensors leaves the file to its owner alone
        for shard, file in temporary.items():
            file.replace(folder / shard)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """The index of several files; a single file has none."""
    if len(shards) == 1:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        return
    weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _own_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, each memory under one name, as safetensors wants them."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        own[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return own


def _size(size: str | int) -> int:
    """Bytes in "5GB" (powers of 1000), "5GiB" (powers of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).upper())
    if match is None or match[2] not in SIZE_UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; expected bytes, such as 500000000, '500MB' or '2GiB'")
    return int(float(match[1]) * SIZE_UNITS[match[2]])
