"""What a name refers to: a folder, a repository on the hub, the demo checkpoint, or random weights of a shape."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastllama import ops
from fastllama.config import GenerationConfig, LlamaConfig, RopeParameters
from fastllama.config.fields import CONFIG_NAME

DEMO = "demo"
RANDOM_PREFIX = "random:"

#: The files of a repository on the hub that make up a checkpoint; its folders hold other formats.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
HUB_IGNORED = ["*/*", "consolidated*.safetensors"]


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; ``problems`` lists everything that is wrong with it."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([message, *self.problems]))


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint was found under a name."""


@dataclass(frozen=True)
class Source:
    """What a name refers to: the configs, and the folder with the weights (None for random weights)."""

    name: str
    folder: Path | None
    config: LlamaConfig
    generation_config: GenerationConfig


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


def resolve(name: str | os.PathLike[str]) -> Source:
    """Find a checkpoint, downloading it from the hub if necessary; return its configs and the folder of its weights.

    Args:
        name: a folder, the id of a repository on the Hugging Face hub, ``"demo"`` for the checkpoint shipped
            with the package (``"./demo"`` for a folder of that name), or ``"random:SHAPE"`` with a shape of
            ``RANDOM_SHAPES``.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or it could not be downloaded.
        ValueError, NotImplementedError: its configs ask for something that fastllama does not support.
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
    """Return the config of a ``random:SHAPE`` name.

    Raises:
        CheckpointNotFoundError: there is no such shape; the message lists them.
    """
    shape = name.removeprefix(RANDOM_PREFIX)
    if shape not in RANDOM_SHAPES:
        expected = ", ".join(RANDOM_PREFIX + known for known in RANDOM_SHAPES)
        raise CheckpointNotFoundError(f"no shape {shape!r}; expected one of {expected}")
    return RANDOM_SHAPES[shape]


def resolve_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint that has one: a folder, a hub id or ``"demo"`` (see :func:`resolve`).

    Raises:
        CheckpointNotFoundError: there is no such folder, and the hub has none either.
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
