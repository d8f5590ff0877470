"""What the configs of a checkpoint say of its quantization by another project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from fastllama.config.fields import CONFIG_NAME, bad, read_json, shortened
from fastllama.config.keys import TEXT_CONFIGS
from fastllama.config.quantization import METHOD

#: Where it is written in config.json.
KEYS = ("quantization_config", "compression_config", "quantization")
#: Files of their own, of older checkpoints.
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
#: The method of each key or file where that does not say it.
METHODS = {"quantization": "mlx", "quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS |= {"compression_config": "compressed-tensors", "hf_quant_config.json": "modelopt"}
READ_METHODS = (
    "gptq", "awq", "auto-round", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "bitsandbytes", "torchao",
    "mlx",
)  # fmt: skip
#: Lists of modules that are not quantized: those that transformers reads, and others. ``ignore`` of compressed-tensors
#: is compared with its groups (:mod:`fastllama.loading.formats.targets`).
LEFT_OUT = ("modules_to_not_convert", "llm_int8_skip_modules")
LEFT_OUT_BY_OTHERS = ("ignored_layers", "exclude_modules", "ignore")
#: By method: which of its values names a kind of codes, and what begins the kinds that are read.
READ_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "compressed-tensors": (
        "format",
        ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    ),
    "modelopt": ("quant_algo", ("FP8", "MIXED_PRECISION")),
    "auto-round": ("data_type", ("int", "fp8")),
    "mlx": ("mode", ("affine",)),
}


class Declared(NamedTuple):
    """What a checkpoint says of its quantization.

    Attributes:
        method: as transformers calls it (``quant_method``), ``"mlx"`` for MLX; None: nothing is said.
        values: everything else.
        place: the key of config.json or the file where it stands.
    """

    method: str | None
    values: Mapping[str, Any]
    place: str = KEYS[0]

    def __str__(self) -> str:
        return f"quant_method {self.method} in {self.place}" if self.method else "no quantization_config"

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these values that is there and is not null."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def override(self, module: str) -> Mapping[str, Any] | None:
        """The values for one module: GPTQModel's ``dynamic``, auto-round's ``extra_config``; None: not quantized."""
        extra = self.get("extra_config") or {}
        if values := extra.get(module) or next((v for pattern, v in extra.items() if _matches(pattern, module)), None):
            return values
        for pattern, values in (self.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
                return None if pattern.startswith("-:") else values
        return {}

    def left_out(self, module: str) -> str | None:
        """Where a config says that a module, or everything in it, is not quantized, and how; None: nowhere."""
        if self.get("include_input_output_embeddings") and module.endswith(("embed_tokens", "lm_head")):
            return None  # torchao's, which counts before the list
        for places, fits in ((LEFT_OUT, _fits), (LEFT_OUT_BY_OTHERS, _is_in)):
            for place in places if self.method != "compressed-tensors" else ():
                names = self.get(place, default=())
                for name in [names] if isinstance(names, str) else names:
                    if isinstance(name, str) and fits(module, name):
                        return f"{place} has {name!r}"
        return None


def _fits(module: str, name: str) -> bool:
    """Whether a name leaves a module out in transformers (``quantizers/quantizers_utils.py``), where it has no doubt.

    There ``model.layers.1`` leaves layer 10 out too; who wrote a folder may have thought otherwise.
    """
    try:
        return module.endswith(name) or _is_in(module, name) or re.fullmatch(name, module) is not None
    except re.error:
        return False


def _is_in(module: str, name: str) -> bool:
    """Whether a module is one of this name, which may be its end, or in one; ``*`` stands for anything."""
    if name.startswith("re:"):
        return re.match(name[len("re:") :], module) is not None
    names = module.split(".")
    ends = [".".join(names[at:]) for at in range(len(names))]
    owners = [".".join(names[: at + 1]) for at in range(len(names))]
    return any(fnmatchcase(each, name.removesuffix(".")) for each in ends + owners)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of auto-round, a regular expression, stands for a module."""
    return bool(re.search(r"[*^$\\+?|\[(]", pattern)) and bool(re.search(pattern, module))


def declared_in(folder: Path) -> Declared:
    """What the configs of a folder say."""
    config = read_json(folder / CONFIG_NAME)
    places = [(key, part.get(key)) for part in (config, *map(config.get, TEXT_CONFIGS)) if part for key in KEYS]
    places += [(name, read_json(folder / name)) for name in FILES if (folder / name).is_file()]
    found = [(place, values) for place, values in places if isinstance(values, Mapping) and values]
    if not found:
        return Declared(None, {})
    place, values = found[0]
    values = {**values, **(inner if isinstance(inner := values.get("quantization"), Mapping) else {})}
    # mlx_lm writes the same object under two keys, and no method in either.
    methods = (_method(place, values) for place, values in found)
    return Declared(next((method for method in methods if method is not None), None), values, place)


def check_method(config: Mapping[str, Any]) -> None:
    """Refuse a config.json whose weights are quantized in a way that is not read.

    Raises:
        ValueError: it names no method.
        NotImplementedError: naming the method.
    """
    for key in KEYS:
        values = config.get(key)
        if values is None or values in ({}, [], False, 0):
            continue
        if not isinstance(values, Mapping):
            raise bad(key, values, "an object")
        method = _method(key, values)
        if method is None and values == config.get("quantization"):  # mlx_lm's, under a second key
            continue
        if method is None:
            raise bad(f"{key}.quant_method", method, f"one of {', '.join(READ_METHODS)}")
        if method != METHOD:
            check_read(Declared(method, values, key))


def check_read(declared: Declared) -> None:
    """Refuse a method, or a kind of codes of it, that is not read.

    Raises:
        NotImplementedError: naming it, what is read, and what to do.
    """
    name, read = READ_KINDS.get(declared.method or "", ("", ()))
    groups = declared.get("config_groups") or {}
    parts = [declared.values, *(groups.values() if isinstance(groups, Mapping) else ())]
    kinds = [part[name] for part in parts if isinstance(part, Mapping) and part.get(name)]
    got = next((kind for kind in kinds if not str(kind).startswith(read)), None)
    if declared.method not in (None, *READ_METHODS):
        name, got, read = "quant_method", declared.method, READ_METHODS
    if got is not None:
        raise NotImplementedError(
            f"{declared.place}: {name} {shortened(repr(got))} is not read, only {', '.join(read)}; load the original, "
            "which is not quantized, with quantize='int4' or 'int8'"
        )


def _method(place: str, values: Mapping[str, Any]) -> str | None:
    method = values.get("quant_method") or values.get("method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and "quant_algo" in values:
        return "modelopt"
    return METHODS.get(place) if method is None else str(method).lower()
