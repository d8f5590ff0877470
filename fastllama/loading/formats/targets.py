"""Which group of a compressed-tensors config a matrix belongs to: by its name, by a pattern, or by its class.

The order is that of ``utils/match.py`` of its source: a name goes before a pattern, a pattern before a class, and
``ignore`` before all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastllama.loading.formats.parts import Parts

PATTERN = "re:"


class Group(NamedTuple):
    """What a config says of a matrix's weights.

    Attributes:
        place: where it stands in the config.
        weights: the values; empty where nothing is said.
    """

    place: str
    weights: Mapping[str, Any]


def group_of(parts: Parts) -> Group:
    """The group of a matrix that is quantized; a preset, which is a list of targets, says nothing here.

    Raises:
        CheckpointError: the config leaves this matrix as it is.
    """
    groups = parts.declared.get("config_groups") or {}
    if parts.declared.method != "compressed-tensors" or not groups:
        return Group("config_groups", {})
    if ignored := _first(parts.module, parts.declared.get("ignore") or []):
        raise parts.error(f"its weights are quantized, but the config's ignore has {ignored!r}")
    targets = {target: name for name, group in groups.items() for target in _targets(group)}
    target = _first(parts.module, targets)
    if target is None:
        raise parts.error(f"its weights are quantized, but no target in config_groups fits ({', '.join(targets)})")
    group = groups[targets[target]]
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return Group(f"config_groups.{targets[target]}", weights or {})


def _targets(group: Any) -> list[str]:
    return group if isinstance(group, list) else group.get("targets") or ["Linear"]


def _first(module: str, targets: Iterable[str]) -> str | None:
    """The target that goes first of those that fit a module."""
    targets, kind = sorted(targets), "Embedding" if module.endswith("embed_tokens") else "Linear"
    names = [each for each in targets if _is_same(each, module)]
    patterns = [each for each in targets if each.startswith(PATTERN) and re.match(each[len(PATTERN) :], module)]
    return next(iter([*names, *patterns, *(each for each in targets if each == kind)]), None)


def _is_same(one: str, other: str) -> bool:
    """Whether two names are those of the same module; one may lack the prefix of a wrapper that the other has."""
    short, long = sorted((one, other), key=len)
    return short == long or ("layers." in short and long.endswith(f".{short}"))
