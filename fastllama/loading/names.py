"""What a name refers to: a folder, a GGUF file, a repository on the hub, the demo, or random weights of a shape."""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fastllama import ops
from fastllama.config import GenerationConfig, LlamaConfig, RopeParameters
from fastllama.config.fields import CONFIG_NAME, GENERATION_CONFIG_NAME, tolerate
from fastllama.config.llama import AUTO, DTYPES, dtype_name
from fastllama.config.stored_quantization import declared_in
from fastllama.loading import adapter, formats, safetensors
from fastllama.loading.stored import GGUF_SHARD, CheckpointError, CheckpointNotFoundError, Stored

DEMO = "demo"
GGUF_SUFFIX = ".gguf"
RANDOM_PREFIX = "random:"

#: The files of a repository on the hub that make up a checkpoint; its folders hold other formats.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
HUB_IGNORED = ["*/*.json", "*/*.safetensors", "*/tokenizer.model", "consolidated*.safetensors"]


@dataclass(frozen=True)
class Source:
    """What a name refers to.

    Attributes:
        name: as it was given.
        path: the folder or file with the weights; None for random weights.
        config, generation_config: what is said there.
        find_tensors: the weights by their names in the file; nothing but headers is read.
        adapter: a folder with an adapter that belongs on top of them.
    """

    name: str
    path: Path | None
    config: LlamaConfig
    generation_config: GenerationConfig
    find_tensors: Callable[[], Mapping[str, Stored]]
    adapter: Path | None = None

    def dtype(self, wanted: str | torch.dtype | None = None) -> str:
        """The name of the dtype to load: what is wanted, or else the config's, or else that of the stored weights.

        Raises:
            ValueError: it is none that weights are loaded in.
        """
        name = dtype_name(self.config.dtype if wanted in (None, AUTO) else wanted)
        if name == AUTO:
            dtypes = (tensor.natural_dtype for tensor in self.find_tensors().values() if tensor.is_float)
            name = dtype_name(next(dtypes, self.config.torch_dtype))
        if name not in DTYPES:
            raise ValueError(f"dtype is {wanted!r}; expected None, {AUTO!r} or one of {', '.join(DTYPES)}")
        return name


def _llama3(shape: ops.Shape, factor: float, is_tied: bool = False) -> LlamaConfig:
    rope = RopeParameters(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return LlamaConfig(
        **asdict(shape),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=is_tied,
        dtype="bfloat16",
        rope=rope,
    )


def _llama2(shape: ops.Shape) -> LlamaConfig:
    return LlamaConfig(**asdict(shape), max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="float16")


#: The configs of published models, by the name that follows ``random:``.
RANDOM_SHAPES: dict[str, LlamaConfig] = {
    "llama-2-7b": _llama2(ops.SHAPES["llama-2-7b"]),
    "llama-3.2-1b": _llama3(ops.SHAPES["llama-3.2-1b"], factor=32.0, is_tied=True),
    "llama-3.2-3b": _llama3(ops.SHAPES["llama-3.2-3b"], factor=32.0, is_tied=True),
    "llama-3.1-8b": _llama3(ops.SHAPES["llama-3.1-8b"], factor=8.0),
    "llama-3.1-70b": _llama3(ops.SHAPES["llama-3.1-70b"], factor=8.0),
}


def resolve(name: str | os.PathLike[str], strict: bool = False) -> Source:
    """Find a checkpoint, downloading it from the hub if necessary; return its configs and where its weights are.

    Args:
        name: a folder, a ``.gguf`` file, the id of a repository on the Hugging Face hub, ``"demo"`` for the checkpoint
            shipped with the package (``"./demo"`` for a folder of that name), or ``"random:SHAPE"`` with a shape of
            ``RANDOM_SHAPES``.
        strict: refuse what is otherwise left out with a warning.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or it could not be downloaded.
        ValueError, NotImplementedError: its configs ask for something that fastllama does not support.
    """
    if is_random(name):
        config = random_config(str(name))
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        return Source(str(name), None, config, GenerationConfig.from_dict(ids), dict)
    path = resolve_path(name)
    if path.is_file():
        return _gguf_source(str(name), path, strict)
    is_whole = (path / CONFIG_NAME).is_file()
    if adapter.is_adapter(path) and not (is_whole and adapter.names_itself(path)):
        return _adapted(str(name), path, strict)
    if not is_whole:
        raise CheckpointNotFoundError(f"{path} is not a checkpoint: it has no {CONFIG_NAME}")
    config, generation = LlamaConfig.from_pretrained(path, strict), GenerationConfig.from_pretrained(path, strict)
    return Source(str(name), path, config, generation, functools.cache(lambda: _tensors_of(path, config)))


def _tensors_of(folder: Path, config: LlamaConfig) -> Mapping[str, Stored]:
    stored = safetensors.find_tensors(folder)
    return stored if config.quantization else formats.decoded(stored, declared_in(folder), config)


def _adapted(name: str, folder: Path, strict: bool) -> Source:
    """The base model of an adapter, and the adapter."""
    name_of_base = adapter.base_of(folder)
    if not is_random(name_of_base) and adapter.is_adapter(path := resolve_path(name_of_base)):
        raise CheckpointError(
            f"the adapter in {folder} belongs to {path}, which holds an adapter too; merge that one into its base with "
            "peft's merge_and_unload(), save the model, and name that in base_model_name_or_path"
        )
    base = resolve(name_of_base, strict)
    tolerate(f"{folder} is an adapter, which is merged into {base.name}", strict=False)
    generation = base.generation_config
    if (folder / GENERATION_CONFIG_NAME).is_file():
        generation = GenerationConfig.from_pretrained(folder, strict)
    return replace(base, name=name, generation_config=generation, adapter=folder)


def _gguf_source(name: str, path: Path, strict: bool) -> Source:
    from fastllama.loading import gguf, gguf_model  # not at import: the gguf package takes its time

    file = gguf.read_gguf(path)
    config, generation = gguf_model.config_of(file, strict), gguf_model.generation_config_of(file)
    return Source(name, path, config, generation, lambda: gguf_model.tensors_of(file, config))


def is_random(name: str | os.PathLike[str]) -> bool:
    """Whether the name asks for random weights of a published shape."""
    return isinstance(name, str) and name.startswith(RANDOM_PREFIX)


def random_config(name: str) -> LlamaConfig:
    """Return the config of a ``random:SHAPE`` name.

    Raises:
        CheckpointNotFoundError: there is no such shape; the message lists them.
    """
    shape = name.removeprefix(RANDOM_PREFIX)
    if shape not in RANDOM_SHAPES:
        expected = ", ".join(RANDOM_PREFIX + known for known in RANDOM_SHAPES)
        raise CheckpointNotFoundError(f"no shape {shape!r}; expected one of {expected}")
    return RANDOM_SHAPES[shape]


def resolve_path(name: str | os.PathLike[str]) -> Path:
    """Return where a checkpoint lies: a folder, or a ``.gguf`` file (see :func:`resolve`).

    A folder without a config.json that holds one GGUF file means that file.

    Raises:
        CheckpointNotFoundError: there is no such folder or file, and the hub has none either.
    """
    if is_random(name):
        raise CheckpointNotFoundError(f"{name} has random weights and no folder")
    if name == DEMO:
        return Path(str(importlib.resources.files("fastllama") / "data" / DEMO))
    path = Path(name).expanduser()
    if path.is_dir():
        return _only_gguf(path) or path
    if path.is_file():
        if path.suffix.lower() == GGUF_SUFFIX:
            return path
        raise CheckpointNotFoundError(f"{path} is a file; expected the folder of a checkpoint, or a {GGUF_SUFFIX} file")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) and path.suffix != GGUF_SUFFIX:
        return _fetch(name)
    expected = f"a folder, a {GGUF_SUFFIX} file, a Hugging Face id, {DEMO!r} or '{RANDOM_PREFIX}SHAPE'"
    raise CheckpointNotFoundError(f"there is no folder {path}; expected {expected}")


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds nothing else to load; of a split one, the first.

    Raises:
        CheckpointNotFoundError: there are several models.
    """
    if (folder / CONFIG_NAME).is_file():
        return None
    shards = {file: GGUF_SHARD.fullmatch(file.name) for file in sorted(folder.glob(f"*{GGUF_SUFFIX}"))}
    files = [file for file, shard in shards.items() if shard is None or shard[2] == "00001"]
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise CheckpointNotFoundError(f"{folder} holds several GGUF files: {listed}; name one of them")
    return files[0] if files else None


def _fetch(repo_id: str) -> Path:
    """Download a repository into the hub's cache, or find it there; return the cache's folder."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        folder = huggingface_hub.snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except Exception as error:  # the client's HTTP library, its cache and its checks each raise their own
        reason = " ".join(str(error).split("\n\n")[0].split())
        if constants.HF_HUB_OFFLINE:
            reason = "the cache does not have all of it, and HF_HUB_OFFLINE is set"
        raise CheckpointNotFoundError(
            f"there is no folder {repo_id!r}, and it could not be downloaded from the Hugging Face hub: {reason}"
        ) from error
    return Path(folder)
