"""Records of measurements: one JSON object a line, in files that only grow; docs/measuring.md lists the fields.

``schema`` is raised when a field changes its meaning or goes away; new ones do not raise it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllama import LlamaForCausalLM

SCHEMA = 1
RECORDS = Path(__file__).resolve().parent / "records"

Types = dict[str, tuple[type, ...]]
NUMBER, INT_OR_NONE = (float, int), (int, type(None))
COMMON: Types = dict.fromkeys(("kind", "time", "model", "dtype", "device"), (str,)) | {
    "schema": (int,), "parity": (bool,), "environment": (dict,),
}  # fmt: skip
DECODE: Types = {
    **dict.fromkeys(("batch", "prompt_len", "new_tokens", "rounds", "bytes_per_step"), (int,)),
    **dict.fromkeys(("compiles_after_warmup", "recordings_after_warmup"), (int,)),
    **dict.fromkeys(("tokens_per_second", "ttft_ms", "bandwidth_gb_s", "memory_bandwidth_gb_s"), NUMBER),
    **dict.fromkeys(("mbu", "floor_ms"), NUMBER),
    **dict.fromkeys(("capacity", "peak_memory_bytes"), INT_OR_NONE),
    "tpot_ms": (dict, type(None)),
    "peers": (dict,),
}
#: Of new records; launches and quality did not have it once.
NEW: Types = {"memory_bandwidth_gb_s": NUMBER}
LAUNCHES = ("host_us_per_step", "kernels_per_step", "copies_per_step", "kernel_us_per_step")
KINDS: dict[str, Types] = {
    "decode": DECODE,
    # No longer written: what a prompt takes is a column of a decode.
    "prefill": {name: DECODE[name] for name in ("batch", "prompt_len", "rounds", "tokens_per_second", "peers")},
    "startup": {"phases": (dict,), "peers": (dict,)},
    "kernels": {"kernels": (list,), "memory_bandwidth_gb_s": NUMBER},
    "quality": {"schemes": (dict,), "text": (str,)},
    "speculation": {
        **dict.fromkeys(("batch", "prompt_len", "new_tokens", "rounds"), (int,)),
        **dict.fromkeys(("texts", "costs"), (dict,)),
        "assistant": (dict, str, type(None)),
    },
    "launches": {
        **dict.fromkeys(("batch", "prompt_len", "capacity"), (int,)),
        **dict.fromkeys(LAUNCHES, (*NUMBER, type(None))),
        "top_kernels": (list,),
    },
}


class RecordError(ValueError):
    """A record that may not be kept, or a file that holds something other than records."""


def weight_fields(name: str, model: LlamaForCausalLM, quantize: str | None = None) -> dict[str, Any]:
    """The fields of every record that say which weights were measured, and where they lay."""
    kind, scheme = str(model.dtype).removeprefix("torch."), None if quantize == "none" else quantize
    cache = model.kv_cache_dtype and str(model.kv_cache_dtype).removeprefix("torch.")
    where = {"model": name, "dtype": kind, "device": str(model.device), "quantize": scheme, "kv_cache_dtype": cache}
    return where | {"config": model.config.to_dict()}


def new_record(kind: str, fields: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """A record of this moment."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"schema": SCHEMA, "kind": kind, "time": now} | dict(fields) | {"environment": dict(environment)}
    validate(record, NEW)
    return record


def validate(record: Mapping[str, Any], more: Types | None = None) -> None:
    """Raise RecordError for a record that does not follow the schema and has these fields, naming all at fault."""
    kind, schema = record.get("kind"), record.get("schema")
    if schema != SCHEMA:
        raise RecordError(f"records of schema {SCHEMA} are known, this one says {schema!r}")
    if kind not in KINDS:
        raise RecordError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    faults = []
    for name, types in (COMMON | KINDS[kind] | (more or {})).items():
        value, expected = record.get(name), " or ".join(each.__name__ for each in types)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            faults.append(f"{name} is {type(value).__name__ if name in record else 'missing'}, expected {expected}")
    if faults:
        raise RecordError(f"not a {kind} record: {'; '.join(faults)}")


def append(record: Mapping[str, Any], path: str | os.PathLike[str] | None) -> None:
    """Add one record to a file, if one is given, which is made where it is not there; nothing that is there changes."""
    validate(record)
    if not record["parity"]:
        raise RecordError("refused: the outputs failed the parity gate, so the figures mean nothing")
    if path is None:
        return
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(line.encode())  # in one write, so that two writers do not mix their lines
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file, oldest first."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
                validate(found[-1])
            except ValueError as error:
                raise RecordError(f"{path}, line {number}: {error}") from error
    return found


def read_all(paths: Iterable[Path] | None = None) -> Iterator[dict[str, Any]]:
    """The records of these files; None: of the committed ones."""
    for path in sorted(RECORDS.glob("*.jsonl")) if paths is None else paths:
        yield from read(path)
