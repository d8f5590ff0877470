"""``fastllama quantize``: write a checkpoint with its weights in 8 or 4 bits."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stdout

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: What a tokenizer is made of, copied next to the weights.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip


#: Of a calibration text, as many windows are read, of as many tokens each; they lie in its first characters.
WINDOWS, WINDOW, CHARACTERS = 32, 512, 1 << 20


def quantize(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file, Hugging Face id, demo, or random:SHAPE.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write, which does not exist yet or is empty.")],
    scheme: Annotated[str, typer.Option(help="int8 or int4.")] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(min=0, help="Columns that share a scale; 0: all.", show_default="the scheme's"),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="4 bits without offsets: smaller, less exact.")
    ] = False,
    head_bits: Annotated[int, typer.Option(help="Bits of the head and the embedding; 0 leaves them.")] = 8,
    exclude: Annotated[str, typer.Option(help="Modules to leave as they are, with commas.", show_default="none")] = "",
    calibrate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text like the model's use, UTF-8, to choose 4-bit codes by."),
    ] = None,
    dtype: options.Dtype = None,
    strict: options.Strict = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a checkpoint with its weights in 8 or 4 bits, which loads directly."""
    with errors_in_one_line(debug):
        import dataclasses

        from fastllama import LlamaForCausalLM
        from fastllama.config.quantization import QuantizationConfig
        from fastllama.loading.names import is_random, resolve_path

        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; name a new folder")
        config = QuantizationConfig.of(scheme)
        assert config is not None
        changes = {
            "head_bits": head_bits or None,
            "symmetric": symmetric,
            "exclude": tuple(name for name in exclude.split(",") if name),
        }
        changes |= {} if group_size is None else {"group_size": group_size or None}
        config = dataclasses.replace(config, **changes)
        if calibrate and config.bits != 4:
            raise ValueError(f"--calibrate chooses codes of 4 bits, and --scheme is {scheme}; leave out one of them")
        texts = _windows_of(calibrate, model) if calibrate else []
        loaded = LlamaForCausalLM.from_pretrained(model, dtype, quantize=config, progress=not quiet, strict=strict)
        if texts:
            from fastllama.quantization.calibration import calibrate as choose_codes

            source = LlamaForCausalLM.from_pretrained(model, loaded.dtype, quantize="none", progress=False)
            choose_codes(loaded, source, texts, progress=not quiet)
            del source
        with progress(quiet) as say:
            say("writing")
            loaded.save_pretrained(folder)
            copied = [] if is_random(model) else _copy_tokenizer(resolve_path(model), folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if not copied:
            logger.warning("%s has no tokenizer: %s has none in files of its own, load it from there", folder, model)
        if not quiet:
            stdout().print(f"{folder}: {size / 1e9:.3g} GB of weights", markup=False, highlight=False)


def _windows_of(file: Path, model: str) -> list[torch.Tensor]:
    """The ids of the beginning of a text: at most WINDOWS windows of it."""
    from fastllama import load_tokenizer
    from fastllama.quantization.quality import windows

    tokenizer = load_tokenizer(model)
    try:
        with file.open(encoding="utf-8") as opened:
            ids = tokenizer.encode(opened.read(CHARACTERS), add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error
    if not ids:
        raise ValueError(f"{file} is empty: there is no text to calibrate with")
    return list(islice(windows(ids, WINDOW, tokenizer.bos_token_id), WINDOWS))


def _copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """The tokenizer's files in a folder, copied to another; their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).exists()]
    for name in found:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, folder / name)
    return found
