"""RopeParameters: a frozen dataclass read from ``rope_parameters`` or ``rope_scaling`` of a ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastllama.config.fields import bad, check_bool, check_int, check_number, numbers, tolerate

# fmt: off
# What each rope type reads besides rope_type, rope_theta and partial_rotary_factor: the keys it cannot do
# without, then all.
ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_KEYS: dict[str, tuple[str, ...]] = ROPE_REQUIRED | {
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# fmt: on

# Parameters that other rotary embeddings read, and what they change.
OTHER_ROPES = {
    "mrope_section": "which part of a head turns with the position in time, height or width",
    "mrope_interleaved": "which part of a head turns with the position in time, height or width",
    "interleaved": "which dimensions of a head turn together",
    "short_mscale": "the size of rotated heads",
    "long_mscale": "the size of rotated heads",
    "full_attention": "the rotation, by the kind of layer",
    "sliding_attention": "the rotation, by the kind of layer",
}


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
        if self.rope_type not in tuple(ROPE_KEYS):
            raise bad("rope_type", self.rope_type, f"one of {', '.join(ROPE_KEYS)}")
        for name in ROPE_REQUIRED[self.rope_type]:
            if getattr(self, name) is None:
                raise bad(name, None, f"a value, because rope_type is {self.rope_type!r}")
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers(name, getattr(self, name)))
        for name in ("beta_fast", "beta_slow"):  # as in transformers, where 0 is the default's value too
            if getattr(self, name) == 0:
                object.__setattr__(self, name, None)
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
        names = ("rope_type", "rope_theta", *ROPE_KEYS[self.rope_type])
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, rope: Mapping[str, Any], strict: bool = False) -> RopeParameters:
        """Read a ``rope_parameters`` or ``rope_scaling`` object.

        As in transformers, ``rope_type`` counts where ``type`` says something else, and a key that this type does not
        read is left out; either with a warning.

        Args:
            rope: the object.
            strict: refuse what is otherwise warned about.

        Raises:
            ValueError: a key that only another rotary embedding reads, or a value out of range.
        """
        values = {key: value for key, value in rope.items() if value is not None}
        legacy = values.pop("type", None)
        rope_type = values.setdefault("rope_type", legacy or "default")
        if legacy not in (None, rope_type):
            tolerate(f"rope_type is {rope_type!r} and type is {legacy!r}: rope_type is taken", strict)
        for key in OTHER_ROPES.keys() & values.keys():
            raise ValueError(f"rope parameter {key} would change {OTHER_ROPES[key]}, which fastllama does not compute")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            tolerate(f"unknown rope parameters {', '.join(unknown)}: left out", strict)
        read = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS.get(str(rope_type), known)}
        if unread := sorted((set(values) & known) - read):
            tolerate(f"rope_type {rope_type!r} does not read {', '.join(unread)}: left out", strict)
        return cls(**{key: value for key, value in values.items() if key in read & known})
