"""QuantizationConfig: in how many bits which weights are kept."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastllama.config.fields import bad, check_bool, check_int

VERSION = 1  # of the folders that are written
METHOD = "fastllama"
HEAD = re.compile(r"(^|\.)(lm_head|embed_tokens)$")
SCHEMES = ("int8", "int4")
LEAST_GROUP = 32


class Scheme(NamedTuple):
    """As which codes a matrix is kept.

    Attributes:
        bits: of a code, 4 or 8.
        group: columns that share a scale.
        has_offsets: codes stand for scale · code + offset; else for scale · (code - 2^(bits - 1)).
    """

    bits: int
    group: int
    has_offsets: bool


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """In how many bits the weights of linear maps are kept; norms and biases stay as they are.

    Attributes:
        bits: of a weight of a decoder layer, 4 or 8.
        group_size: columns that share a scale, a multiple of 32; None: all of a row.
        symmetric: 4-bit codes stand for scale · (code - 8); else for scale · code + offset, with an offset a group,
            which is nearer to the weights and takes 2 bytes a group more.
        head_bits: of a weight of the head and of the embedding, 4 or 8; None leaves them as they are. 8-bit ones have a
            scale a row, 4-bit ones one a group.
        exclude: names of modules that are left as they are, whole (``model.layers.0.mlp.down_proj``) or their last
            parts (``down_proj``).
        modules: schemes of single modules, by name, before everything else: of checkpoints whose matrices differ.
        activations: ``"int8"``: on a CPU products take activations in 8 bits, in blocks of 32 with a scale each, for
            speed; None: as they are.

    Raises:
        ValueError: a value that is none of these.
    """

    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = False
    head_bits: int | None = 8
    exclude: tuple[str, ...] = ()
    modules: tuple[tuple[str, Scheme], ...] = ()
    activations: str | None = "int8"

    def __post_init__(self) -> None:
        for name, values in {"bits": (4, 8), "head_bits": (4, 8, None), "activations": ("int8", None)}.items():
            if getattr(self, name) not in values:
                raise bad(name, getattr(self, name), f"one of {', '.join(map(str, values))}")
        check_bool("symmetric", self.symmetric)
        if self.group_size is not None:
            check_int("group_size", self.group_size, at_least=LEAST_GROUP)
            if self.group_size % LEAST_GROUP:
                raise bad("group_size", self.group_size, f"a multiple of {LEAST_GROUP}, or None for whole rows")
        names = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise bad("exclude", self.exclude, "names of modules")
        object.__setattr__(self, "exclude", tuple(names))
        object.__setattr__(self, "modules", tuple(_modules(self.modules)))

    @classmethod
    def of(cls, scheme: str | QuantizationConfig | None) -> QuantizationConfig | None:
        """The config that a name stands for: ``"int8"`` with a scale a row, ``"int4"`` with offsets and groups of 32.

        Raises:
            ValueError: no such scheme.
        """
        if scheme is None or isinstance(scheme, QuantizationConfig):
            return scheme
        if scheme not in SCHEMES:
            raise bad("quantize", scheme, f"None, 'none', {', '.join(map(repr, SCHEMES))} or a QuantizationConfig")
        return cls(bits=8, group_size=None) if scheme == "int8" else cls()

    @classmethod
    def holding(cls, schemes: Mapping[str, Scheme], columns: Mapping[str, int]) -> QuantizationConfig:
        """The config under which modules have these schemes, and no others.

        Args:
            schemes: of the modules that are quantized, at least one.
            columns: of all modules that could be.
        """

        def general(name: str) -> tuple[int, int | None, bool]:
            bits, group, has_offsets = schemes[name]
            return bits, None if group == columns[name] else group, has_offsets

        (bits, group, has_offsets), _ = Counter(map(general, schemes)).most_common(1)[0]
        symmetric = bits == 4 and not has_offsets
        config = cls(bits, group, symmetric, None, tuple(name for name in columns if name not in schemes))
        others = {name: scheme for name, scheme in schemes.items() if config.scheme_of(name, columns[name]) != scheme}
        return dataclasses.replace(config, modules=tuple(others.items()))

    def scheme_of(self, module: str, columns: int) -> Scheme | None:
        """The scheme of a module's weight; None: it is left as it is.

        Args:
            module: its name in the model.
            columns: of its weight.

        Raises:
            ValueError: the group does not divide the columns.
        """
        if any(module == name or module.endswith(f".{name}") for name in self.exclude):
            return None
        if scheme := dict(self.modules).get(module):
            return scheme
        is_head = HEAD.search(module) is not None
        bits = self.head_bits if is_head else self.bits
        if bits is None:
            return None
        group = columns if self.group_size is None or (is_head and bits == 8) else self.group_size
        if columns % group or group % LEAST_GROUP:
            raise ValueError(
                f"{module} has {columns} columns, which groups of {group} do not divide"
                f" (groups are multiples of {LEAST_GROUP}); choose another group_size, or exclude {module!r}"
            )
        return Scheme(bits, group, bits == 4 and not self.symmetric)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """Read the object that :meth:`to_dict` writes.

        Raises:
            ValueError: it is another method's, of a newer version, or damaged.
        """
        method, version = values.get("quant_method"), values.get("version")
        if method != METHOD:
            raise bad("quant_method", method, f"{METHOD!r}: other quantized checkpoints are not read yet")
        if not isinstance(version, int) or version > VERSION:
            raise bad("version of quantization_config", version, f"at most {VERSION}; update fastllama")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known - {"quant_method", "version"}):
            raise ValueError(f"unknown keys in quantization_config: {', '.join(unknown)}; expected {', '.join(known)}")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The object that config.json holds as ``quantization_config``."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in (field.name for field in dataclasses.fields(self))
        }
        values |= {"exclude": list(self.exclude), "modules": {name: each._asdict() for name, each in self.modules}}
        return values | {"quant_method": METHOD, "version": VERSION}


def _modules(values: Any) -> list[tuple[str, Scheme]]:
    """Schemes by module, from pairs or from the object that a config.json holds."""
    try:
        pairs = values.items() if isinstance(values, Mapping) else values
        found = [(str(name), Scheme(**each) if isinstance(each, Mapping) else Scheme(*each)) for name, each in pairs]
    except (TypeError, ValueError, AttributeError):
        raise bad("modules", values, "an object from names of modules to bits, group and has_offsets") from None
    for name, (bits, group, has_offsets) in found:
        if (
            bits not in (4, 8)
            or not isinstance(group, int)
            or group < 1
            or group % LEAST_GROUP
            or not isinstance(has_offsets, bool)
        ):
            raise bad(
                f"modules[{name!r}]",
                (bits, group, has_offsets),
                "4 or 8 bits, a group of 32 columns or a multiple, a bool",
            )
    return found
