"""LlamaConfig: a frozen dataclass read from ``config.json``.

Both spellings are read: transformers v4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and v5
(``rope_parameters``, ``dtype``). Every key of a file is accounted for: it is a field here, or it is on a list of keys
that cannot change what the model computes, or it is an error that names it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllama import ops
from fastllama.config.fields import (
    CONFIG_NAME,
    bad,
    check_bool,
    check_int,
    check_number,
    numbers,
    plain_eos,
    plain_pad,
    read_json,
    write_json,
)
from fastllama.config.generation import INERT_GENERATION, UNSUPPORTED_GENERATION, GenerationConfig

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64")

# fmt: off
# What each rope type reads besides rope_type, rope_theta and partial_rotary_factor: the keys it cannot do
# without, then all.
_ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_KEYS: dict[str, tuple[str, ...]] = _ROPE_REQUIRED | {
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Keys of config.json that Llama inference never reads, whatever their value.
_INERT_KEYS = frozenset({
    "architectures", "auto_map", "transformers_version", "transformers.js_config", "_name_or_path",
    "name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal",
    "_flash_attn_2_enabled", "attn_implementation", "experts_implementation", "use_return_dict",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "finetuning_task", "id2label",
    "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix",
    "sep_token_id", "cross_attention_hidden_size", "gradient_checkpointing", "max_sequence_length",
    "model_max_length", "is_decoder", "is_llama_config", "unsloth_fixed", "unsloth_version",
})

# Keys that would change the result, each with the one value (besides null) under which it does not.
_NEUTRAL_VALUES: dict[str, Any] = {
    "sliding_window": None, "use_sliding_window": False, "quantization_config": None,
    "compression_config": None, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "is_encoder_decoder": False, "tie_encoder_decoder": False, "add_cross_attention": False,
    "pruned_heads": {}, "per_layer_config": {},
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """Parameters of the rotary position embedding, named as in ``rope_parameters`` of a v5 config.json.

    ``rope_type`` decides which of the others are read (see :mod:`fastllama.model.rope`); the rest stay None.
    ``original_max_position_embeddings`` is the context length before it was extended, in tokens; where a type
    needs it and it is None, :class:`LlamaConfig` fills in its ``max_position_embeddings``.

    Raises:
        ValueError: a value out of range; the message has the parameter, the value and what was expected.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in tuple(_ROPE_KEYS):
            raise bad("rope_type", self.rope_type, f"one of {', '.join(_ROPE_KEYS)}")
        for name in _ROPE_REQUIRED[self.rope_type]:
            if getattr(self, name) is None:
                raise bad(name, None, f"a value, because rope_type is {self.rope_type!r}")
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers(name, getattr(self, name)))
        self._check_values()

    def _check_values(self) -> None:
        check_number("rope_theta", self.rope_theta, above=0)
        for name in ("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=0)
        if self.original_max_position_embeddings is not None:
            check_int("original_max_position_embeddings", self.original_max_position_embeddings, at_least=1)
        if self.truncate is not None:
            check_bool("truncate", self.truncate)
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise bad("high_freq_factor", self.high_freq_factor, "another value than low_freq_factor")
        if self.partial_rotary_factor != 1.0:
            expected = "1.0: Llama rotates every dimension of a head"
            raise bad("partial_rotary_factor", self.partial_rotary_factor, expected)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``rope_parameters`` object of a v5 config.json: the keys that this type reads and that are set."""
        names = ("rope_type", "rope_theta", *_ROPE_KEYS[self.rope_type])
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, rope: Mapping[str, Any]) -> RopeParameters:
        """Read a ``rope_parameters`` or ``rope_scaling`` object.

        A key that only another type reads is left out with a warning, as in transformers.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        values = {key: value for key, value in rope.items() if value is not None}
        legacy = values.pop("type", None)
        rope_type = values.setdefault("rope_type", legacy or "default")
        if legacy not in (None, rope_type):
            raise bad("rope_type", rope_type, f"the same as type, which is {legacy!r}: remove one of them")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            expected = f"{', '.join(known)} (one set for all layers)"
            raise ValueError(f"unknown rope parameters {', '.join(unknown)}; expected some of {expected}")
        read = {"rope_type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS.get(str(rope_type), known)}
        if unread := sorted(set(values) - read):
            logger.warning("rope_type %r does not read %s: left out", rope_type, ", ".join(unread))
        return cls(**{key: value for key, value in values.items() if key in read})


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama network; fields are named as in a v4 ``config.json``.

    ``num_key_value_heads`` and ``head_dim`` may be given as None. They become ``num_attention_heads``
    (multi-head attention) and ``hidden_size // num_attention_heads``, so readers always find integers.

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

    def __post_init__(self) -> None:
        check_int("num_attention_heads", self.num_attention_heads, at_least=1)
        check_int("hidden_size", self.hidden_size, at_least=1)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                expected = f"a multiple of num_attention_heads={self.num_attention_heads}, or head_dim given"
                raise bad("hidden_size", self.hidden_size, expected)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "eos_token_id", plain_eos(self.eos_token_id))
        object.__setattr__(self, "pad_token_id", plain_pad(self.pad_token_id))
        self._check_shape()
        self._check_constants()
        self._complete_rope()

    def _check_shape(self) -> None:
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("head_dim", "max_position_embeddings", "pretraining_tp"):
            check_int(name, getattr(self, name), at_least=1)
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads={self.num_attention_heads}"
            raise bad("num_key_value_heads", self.num_key_value_heads, expected)
        if self.head_dim % 2:
            raise bad("head_dim", self.head_dim, "an even number: rotary embedding turns pairs")
        if self.vocab_size % self.pretraining_tp:
            raise bad("pretraining_tp", self.pretraining_tp, f"a divisor of vocab_size={self.vocab_size}")

    def _check_constants(self) -> None:
        if self.hidden_act not in ops.ACTIVATIONS:
            raise bad("hidden_act", self.hidden_act, f"one of {', '.join(ops.ACTIVATIONS)}")
        if self.dtype not in DTYPES:
            raise bad("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        check_number("rms_norm_eps", self.rms_norm_eps, at_least=0)
        check_number("initializer_range", self.initializer_range, at_least=0)
        check_number("attention_dropout", self.attention_dropout, at_least=0, at_most=1)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_bool(field.name, getattr(self, field.name))
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), at_least=0)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise bad("pad_token_id", self.pad_token_id, f"less than vocab_size={self.vocab_size}")

    def _complete_rope(self) -> None:
        rope = self.rope
        if not isinstance(rope, RopeParameters):
            raise bad("rope", rope, "RopeParameters; LlamaConfig.from_dict reads the JSON spellings")
        reads_original = "original_max_position_embeddings" in _ROPE_KEYS[rope.rope_type]
        if reads_original and rope.original_max_position_embeddings is None:
            rope = dataclasses.replace(rope, original_max_position_embeddings=self.max_position_embeddings)
            object.__setattr__(self, "rope", rope)
        if rope.rope_type == "dynamic" and self.head_dim < 4:
            raise bad("head_dim", self.head_dim, "at least 4 for rope_type 'dynamic'")
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise bad(f"length of {name}", len(factors), f"head_dim / 2 = {self.head_dim // 2}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the object of a ``config.json``, in the spelling of transformers v4, v5, or both at once.

        null means the default of a field, except for token ids, where it means that there is none.

        Raises:
            ValueError: it is not a Llama, has an unknown key, sets something that fastllama does not compute, or
                spells one thing twice with two values.
        """
        values: dict[str, Any] = dict(config)
        model_type = values.pop("model_type", None)
        if model_type not in (None, "llama"):
            raise bad("model_type", model_type, "'llama': fastllama runs Llama checkpoints only")
        _drop_inert(values)
        rope = _take_rope(values)
        dtype = _take_dtype(values)
        values = {key: value for key, value in values.items() if value is not None or key in _TOKEN_IDS}
        if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(
                f"unknown config keys {', '.join(unknown)}: they may change what the model computes; "
                "if they do not, remove them from config.json"
            )
        values |= {"rope": rope, "dtype": dtype}
        return cls(**values)

    @classmethod
    def from_hf(cls, config: Any) -> LlamaConfig:
        """Read a transformers config object, through its ``to_dict()``."""
        return cls.from_dict(config.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> LlamaConfig:
        """Read a ``config.json``, given the file or its folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as :meth:`from_dict`, with the file's name before the message.
        """
        file = Path(path)
        file = file / CONFIG_NAME if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no {file}; expected a folder with a {CONFIG_NAME}, or the file itself")
        try:
            return cls.from_dict(read_json(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the object of a ``config.json`` in both spellings, which transformers v4 and v5 both read."""
        config = dataclasses.asdict(self)
        del config["rope"]
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        rope = self.rope.to_dict()
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return config | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": self.dtype,
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


def _drop_inert(values: dict[str, Any]) -> None:
    """Remove the keys without effect on the network from ``values``, once they are known to be neutral."""
    layer_types = values.pop("layer_types", None)
    if layer_types is not None and layer_types != ["full_attention"] * len(layer_types):
        raise bad("layer_types", layer_types, "'full_attention' for every layer")
    for key, neutral in _NEUTRAL_VALUES.items():
        value = values.pop(key, None)
        if value is not None and value != neutral:
            raise bad(key, value, f"{neutral!r}: fastllama does not compute anything else")
    generation = {field.name for field in dataclasses.fields(GenerationConfig)}
    inert = _INERT_KEYS | set(UNSUPPORTED_GENERATION) | INERT_GENERATION | generation
    for key in inert - {field.name for field in dataclasses.fields(LlamaConfig)}:
        values.pop(key, None)


def _take_dtype(values: dict[str, Any]) -> str:
    """Take ``dtype`` (v5) and ``torch_dtype`` (v4), a torch.dtype or its name, out of ``values``."""
    spelled = {key: values.pop(key, None) for key in ("dtype", "torch_dtype")}
    found = {str(value).removeprefix("torch.") for value in spelled.values() if value is not None}
    if len(found) > 1:
        raise ValueError(f"dtype and torch_dtype differ: {spelled}; remove one of them")
    return found.pop() if found else LlamaConfig.dtype


def _take_rope(values: dict[str, Any]) -> RopeParameters:
    """Take the rope parameters of both spellings out of ``values``; where both are there they must agree."""
    theta = values.pop("rope_theta", None)
    original = values.pop("original_max_position_embeddings", None)
    shared = {} if theta is None else {"rope_theta": theta}
    found: list[RopeParameters] = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.pop(key, None) or {}
        if not isinstance(rope, Mapping):
            raise bad(key, rope, "an object with a rope_type")
        if not rope:
            continue
        rope = shared | {name: value for name, value in rope.items() if value is not None}
        rope_type = str(rope.get("rope_type", rope.get("type")))
        if original is not None and "original_max_position_embeddings" in _ROPE_KEYS.get(rope_type, ()):
            # As in transformers, the key next to the rope parameters wins over the same key among them.
            rope["original_max_position_embeddings"] = original
        found.append(RopeParameters.from_dict(rope))
    if len(set(found)) > 1:
        both = " and ".join(str(rope.to_dict()) for rope in found)
        raise ValueError(f"rope_parameters and rope_scaling differ: {both}; remove one of them")
    return found[0] if found else RopeParameters.from_dict(shared)
