"""Checks of config fields with one wording of their errors, and JSON files read and written."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
INDEX_LIMIT = 2**31 - 1  # of sizes and ids: more is no model, and would overflow on the way

logger = logging.getLogger(__name__)


def tolerate(message: str, strict: bool) -> None:
    """Warn about something in a checkpoint that does not change what it computes, or refuse it.

    Raises:
        ValueError: ``strict`` is set.
    """
    if strict:
        raise ValueError(f"{message} (refused because strict is set)")
    logger.warning("%s", message)


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file, with or without a byte order mark.

    Raises:
        ValueError: the file holds anything else; the message names it.
    """
    try:
        content = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {_what_is_wrong(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def _what_is_wrong(error: ValueError) -> str:
    """The error of the JSON library, and what to do about the commonest one, which it describes as another."""
    if isinstance(error, json.JSONDecodeError):
        before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
        if (before.endswith(",") and after[:1] in ("}", "]")) or re.match(r",\s*[}\]]", after):
            return f"a comma before a closing bracket, in line {error.lineno}; remove the comma"
    return str(error)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file through a temporary name, so that ``file`` is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def plain_eos(eos: Any) -> int | tuple[int, ...] | None:
    """Normalize EOS ids: an int stays, a list becomes a tuple, None stays; negative ids, such as -1, mean none."""
    eos = eos.tolist() if hasattr(eos, "tolist") else eos  # of a tensor
    if eos is None or _is_negative(eos):
        return None
    is_list = isinstance(eos, (list, tuple))
    ids = tuple(token for token in eos if not _is_negative(token)) if is_list else (eos,)
    for token in ids:
        check_int("eos_token_id", token, at_least=0)
    return ids if is_list else eos


def plain_id(token: Any) -> Any:
    """Normalize the id of one token: the first of a list; a negative one, such as -1, means none."""
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return None if _is_negative(token) else token


def _is_negative(token: Any) -> bool:
    return isinstance(token, int) and token < 0


def numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise bad(name, values, "a list of numbers")
    for value in values:
        check_number(name, value, above=0)
    return tuple(values)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise bad(name, value, "true or false")


def check_int(name: str, value: Any, at_least: int, at_most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise bad(name, value, f"an integer of at least {at_least}")
    if at_most is not None and value > at_most:
        raise bad(name, value, f"at most {at_most}")


def check_number(
    name: str, value: Any, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if is_number and value > above and at_least <= value <= at_most:
        return
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {at_least:g}"] if at_least > -math.inf else []
    bounds += [f"at most {at_most:g}"] if at_most < math.inf else []
    raise bad(name, value, " and ".join(["a number", *bounds]))


def bad(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is {shortened(repr(got))}; expected {expected}")


def shortened(text: str, limit: int = 300) -> str:
    """The text, or its beginning where a file has put too much there."""
    return text if len(text) <= limit else f"{text[:limit]}…"
