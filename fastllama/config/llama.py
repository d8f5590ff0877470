"""LlamaConfig: a frozen dataclass read from ``config.json``.

Both spellings are read: transformers v4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and v5
(``rope_parameters``, ``dtype``). Every key of a file is accounted for: it is a field here, or it is known to change
nothing, or it is known to change the result and an error, or it is named in a warning.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastllama import ops
from fastllama.config.fields import (
    CONFIG_NAME,
    INDEX_LIMIT,
    bad,
    check_bool,
    check_int,
    check_number,
    plain_eos,
    plain_id,
    read_json,
    tolerate,
    write_json,
)
from fastllama.config.generation import GenerationConfig
from fastllama.config.keys import INERT_KEYS, change_of, check_changing, check_own_code, text_part
from fastllama.config.quantization import METHOD, QuantizationConfig
from fastllama.config.rope import ROPE_KEYS, RopeParameters
from fastllama.config.settings import KNOWN as KNOWN_OF_GENERATION
from fastllama.config.stored_quantization import KEYS as QUANTIZATION_KEYS
from fastllama.config.stored_quantization import check_method

AUTO = "auto"  # the dtype of the stored weights
DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPE_ALIASES = {
    "float": "float32", "fp32": "float32", "f32": "float32", "half": "float16", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16", "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama network; fields are named as in a v4 ``config.json``.

    ``num_key_value_heads`` and ``head_dim`` may be given as None. They become ``num_attention_heads``
    (multi-head attention) and ``hidden_size // num_attention_heads``, so readers always find integers. ``dtype`` may
    be ``"auto"``, the dtype of the stored weights, which is what a file without a dtype says.

    Raises:
        ValueError: from every constructor; the message has the field, the value and what was expected.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # an int after __post_init__
    head_dim: int = None  # type: ignore[assignment]  # an int after __post_init__
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope: RopeParameters = dataclasses.field(default_factory=RopeParameters)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    dtype: str = "float32"
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        check_int("num_attention_heads", self.num_attention_heads, at_least=1, at_most=INDEX_LIMIT)
        check_int("hidden_size", self.hidden_size, at_least=1, at_most=INDEX_LIMIT)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                expected = f"a multiple of num_attention_heads={self.num_attention_heads}, or head_dim given"
                raise bad("hidden_size", self.hidden_size, expected)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "eos_token_id", plain_eos(self.eos_token_id))
        for name in ("bos_token_id", "pad_token_id"):
            object.__setattr__(self, name, plain_id(getattr(self, name)))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.pretraining_tp in (None, 0):
            object.__setattr__(self, "pretraining_tp", 1)
        self._check_shape()
        self._check_constants()
        self._complete_rope()

    def _check_shape(self) -> None:
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
            check_int(name, getattr(self, name), at_least=1, at_most=INDEX_LIMIT)
        for name in ("head_dim", "max_position_embeddings", "pretraining_tp"):
            check_int(name, getattr(self, name), at_least=1, at_most=INDEX_LIMIT)
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads={self.num_attention_heads}"
            raise bad("num_key_value_heads", self.num_key_value_heads, expected)
        if self.head_dim % 2:
            raise bad("head_dim", self.head_dim, "an even number: rotary embedding turns pairs")

    def _check_constants(self) -> None:
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ops.ACTIVATIONS:
            raise bad("hidden_act", self.hidden_act, f"one of {', '.join(ops.ACTIVATIONS)}")
        if self.dtype not in (*DTYPES, AUTO):
            raise bad("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        check_number("rms_norm_eps", self.rms_norm_eps, at_least=0)
        check_number("initializer_range", self.initializer_range, at_least=0)
        check_number("attention_dropout", self.attention_dropout, at_least=0, at_most=1)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_bool(field.name, getattr(self, field.name))
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), at_least=0, at_most=INDEX_LIMIT)

    def _complete_rope(self) -> None:
        rope = self.rope
        if not isinstance(rope, RopeParameters):
            raise bad("rope", rope, "RopeParameters; LlamaConfig.from_dict reads the JSON spellings")
        reads_original = "original_max_position_embeddings" in ROPE_KEYS[rope.rope_type]
        if reads_original and rope.original_max_position_embeddings is None:
            rope = dataclasses.replace(rope, original_max_position_embeddings=self.max_position_embeddings)
            object.__setattr__(self, "rope", rope)
        if rope.rope_type == "dynamic" and self.head_dim < 4:
            raise bad("head_dim", self.head_dim, "at least 4 for rope_type 'dynamic'")
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise bad(f"length of {name}", len(factors), f"head_dim / 2 = {self.head_dim // 2}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it; torch's default where it is ``"auto"``."""
        return torch.get_default_dtype() if self.dtype == AUTO else getattr(torch, self.dtype)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], strict: bool = False) -> LlamaConfig:
        """Read the object of a ``config.json``, in the spelling of transformers v4, v5, or both at once.

        null means the default of a field, except for token ids, where it means that there is none. Where one thing is
        spelled twice with two values, transformers' precedence holds. Of a multimodal model's config its text config
        is read, if that is a Llama's.

        Args:
            config: the object.
            strict: refuse unknown keys, differing spellings and code of its own, instead of warning about them.

        Raises:
            ValueError: it is not a Llama, or sets something that fastllama does not compute.
            NotImplementedError: its weights are quantized in a way that is not read.
        """
        values = _text_part(config, strict)
        model_type = values.pop("model_type", None)
        if model_type not in (None, "llama"):
            raise bad("model_type", model_type, "'llama': fastllama runs Llama checkpoints only")
        known = {field.name for field in dataclasses.fields(cls)} - {"quantization"}
        inert = INERT_KEYS | KNOWN_OF_GENERATION | {"auto_map"}
        inert |= {field.name for field in dataclasses.fields(GenerationConfig)}
        other = {key: value for key, value in values.items() if key not in known | inert}
        check_changing({key: value for key, value in other.items() if key not in QUANTIZATION_KEYS})
        check_method(other)
        check_own_code(values, strict)
        quantization = values.pop("quantization_config", None)
        rope = _take_rope(values, strict)
        dtype = _take_dtype(values, strict)
        values = {key: value for key, value in values.items() if value is not None or key in _TOKEN_IDS}
        if unknown := sorted(key for key in set(values) - known - inert - {"layer_types"} if change_of(key) is None):
            tolerate(f"unknown config keys {', '.join(unknown)}: left out", strict)
        fields: dict[str, Any] = {key: value for key, value in values.items() if key in known}
        fields |= {"rope": rope, "dtype": dtype}
        if _is_ours(quantization):
            fields["quantization"] = QuantizationConfig.from_dict(quantization)
        return cls(**fields)

    @classmethod
    def from_hf(cls, config: Any) -> LlamaConfig:
        """Read a transformers config object, through its ``to_dict()``."""
        return cls.from_dict(config.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], strict: bool = False) -> LlamaConfig:
        """Read a ``config.json``, given the file or its folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError, NotImplementedError: as :meth:`from_dict`, with the file's name before the message.
        """
        file = Path(path)
        file = file / CONFIG_NAME if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no {file}; expected a folder with a {CONFIG_NAME}, or the file itself")
        content = read_json(file)
        try:
            return cls.from_dict(content, strict)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the object of a ``config.json`` in both spellings, which transformers v4 and v5 both read."""
        config = dataclasses.asdict(self)
        del config["rope"], config["quantization"]
        if self.quantization is not None:
            config["quantization_config"] = self.quantization.to_dict()
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        rope = self.rope.to_dict()
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if self.rope.rope_type == "longrope":  # v4 looks for it there alone
            config["original_max_position_embeddings"] = self.rope.original_max_position_embeddings
        return config | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "dtype": None if self.dtype == AUTO else self.dtype,
            "torch_dtype": None if self.dtype == AUTO else self.dtype,
            "rope_parameters": rope,
            "rope_theta": self.rope.rope_theta,
            "rope_scaling": None if self.rope.rope_type == "default" else scaling,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into ``folder``, which is created if needed."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())

    def replace(self, **changes: Any) -> LlamaConfig:
        """Return a copy with some fields changed.

        ``head_dim`` and ``num_key_value_heads`` follow the fields they are derived from, if they equal the derived
        value and are not given.
        """
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            changes.setdefault("head_dim", None)
        if self.num_key_value_heads == self.num_attention_heads:
            changes.setdefault("num_key_value_heads", None)
        return dataclasses.replace(self, **changes)


_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype as :class:`LlamaConfig` has it, given a torch.dtype or one of its names in use."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    return DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


def _is_ours(value: Any) -> bool:
    """Whether a config's value says how fastllama has quantized the weights."""
    return isinstance(value, Mapping) and value.get("quant_method") == METHOD


def _text_part(config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """The config, or its text part where it is that of a multimodal model."""
    text = text_part(config)
    if text is None:
        return dict(config)
    tolerate(f"of the {config['model_type']} model only its text part is read", strict)
    return text


def _take_dtype(values: dict[str, Any], strict: bool) -> Any:
    """Take ``dtype`` (v5) and ``torch_dtype`` (v4), a torch.dtype or its name, out of ``values``."""
    new, old = (dtype_name(values.pop(key, None)) for key in ("dtype", "torch_dtype"))
    if None not in (new, old) and new != old:
        tolerate(f"dtype is {new!r} and torch_dtype is {old!r}: dtype is taken", strict)
    name = old if new is None else new
    # A dtype that weights are stored in and not computed in, or none: what each tensor is cast to is up to the loader.
    return AUTO if name is None or str(name).startswith(("float8", "int", "uint")) else name


def _take_rope(values: dict[str, Any], strict: bool) -> RopeParameters:
    """Take the rope parameters of both spellings out of ``values``; where they differ, ``rope_scaling`` counts."""
    theta = values.pop("rope_theta", None)
    original = values.pop("original_max_position_embeddings", None)
    shared = {} if theta is None else {"rope_theta": theta}
    found: list[RopeParameters] = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.pop(key, None) or {}
        if not isinstance(rope, Mapping):
            raise bad(key, rope, "an object with a rope_type")
        if not rope:
            continue
        rope = shared | {name: value for name, value in rope.items() if value is not None}
        rope_type = str(rope.get("rope_type", rope.get("type")))
        if original is not None and "original_max_position_embeddings" in ROPE_KEYS.get(rope_type, ()):
            # As in transformers, the key next to the rope parameters wins over the same key among them.
            rope["original_max_position_embeddings"] = original
        found.append(RopeParameters.from_dict(rope, strict))
    if len(set(found)) > 1:
        both = " and ".join(str(rope.to_dict()) for rope in found)
        tolerate(f"rope_scaling and rope_parameters differ, {both}: rope_scaling is taken", strict)
    return found[0] if found else RopeParameters.from_dict(shared)
