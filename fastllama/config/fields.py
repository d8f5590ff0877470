"""Checks of config fields with one wording of their errors, and JSON files read and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: the file holds anything else; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file through a temporary name, so that ``file`` is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)


def plain_eos(eos: Any) -> int | tuple[int, ...] | None:
    """Normalize EOS ids: an int stays, a list becomes a tuple, None stays."""
    if eos is None:
        return None
    ids = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    for token in ids:
        check_int("eos_token_id", token, at_least=0)
    return ids if isinstance(eos, (list, tuple)) else eos


def plain_pad(pad: int | None) -> int | None:
    """Normalize a pad id: old conversions write -1 for no padding token, which torch would take for the last row."""
    return None if pad == -1 else pad


def numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise bad(name, values, "a list of numbers")
    for value in values:
        check_number(name, value, above=0)
    return tuple(values)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise bad(name, value, "true or false")


def check_int(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise bad(name, value, f"an integer of at least {at_least}")


def check_number(
    name: str, value: Any, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and value > above and at_least <= value <= at_most:
        return
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {at_least:g}"] if at_least > -math.inf else []
    bounds += [f"at most {at_most:g}"] if at_most < math.inf else []
    raise bad(name, value, " and ".join(["a number", *bounds]))


def bad(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is {got!r}; expected {expected}")
