"""The table in which the GPU suite ends: plain text of at most ``MAX_LINES`` lines, from its records and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plan import GOALS, GOALS_OF

MAX_LINES = 58
MAX_WIDTH = 160
PEER_COLUMNS = {  # of each peer its names in a record: where it ran, and where it did not
    "HF": ("transformers",),
    "HF static": ("transformers static+compile", "static"),
    "gpt-fast": ("gpt-fast",),
}
DECODE_COLUMNS = (
    "decode", "step us", "goal", "floor us", "MBU", "tok/s", "parity", "compiled", "recorded", "host us", "kernels",
    "kernel us", *PEER_COLUMNS,
)  # fmt: skip
KERNEL_COLUMNS = ("operation", "runs", "calls", "us", "GB/s", "MBU", "torch takes")

Record = Mapping[str, Any]
Row = tuple[str, ...]


def report(records: Sequence[Record], notes: Sequence[str]) -> str:
    """Everything, the decodes first; notes that do not fit are counted."""
    lines = [*heading(records), *decode_lines(records), *kernel_lines(records)]
    told = [*dict.fromkeys([*notes, *unavailable(records)])]
    room = max(MAX_LINES - len(lines) - 1, 0)
    if len(told) > room:
        told = [*told[: max(room - 1, 0)], f"... and {len(told) - max(room - 1, 0)} more in the log"]
    return "\n".join(line[:MAX_WIDTH].rstrip() for line in [*lines, "", *told])


def heading(records: Sequence[Record]) -> list[str]:
    """Machine, versions and commit, if there is any record to tell them."""
    if not records:
        return ["no records"]
    found = records[-1]["environment"]
    gpu, packages = found.get("gpu"), found["packages"]
    dirty = ", with changes" if found["dirty"] else ""
    machine = f"{gpu['name']}, driver {gpu['driver_version']}, CUDA {gpu['cuda']}" if gpu else found["cpu"]
    return [
        f"{machine}, torch {packages['torch']}, triton {packages['triton']}, transformers {packages['transformers']}",
        f"commit {found['commit']}{dirty}, {records[-1]['time']}, {records[-1]['dtype']} where nothing else is said",
        "",
    ]


def decode_lines(records: Sequence[Record]) -> list[str]:
    """A row for each decode: shape, precision, batch, tokens of the prompt / slots of the cache."""
    launches = {_point(record): record for record in records if record["kind"] == "launches"}
    rows = [_decode_row(record, launches.get(_point(record), {})) for record in records if record["kind"] == "decode"]
    if not rows:
        return []
    return [*aligned(DECODE_COLUMNS, rows), "peers: fastllama's tokens/s over theirs", ""]


def kernel_lines(records: Sequence[Record]) -> list[str]:
    """A row for each operation of each kernel table."""
    found = [record for record in records if record["kind"] == "kernels"]
    rows = [_kernel_row(record, kernel) for record in found for kernel in record["kernels"]]
    return [*aligned(KERNEL_COLUMNS, rows), ""] if rows else []


def unavailable(records: Sequence[Record]) -> list[str]:
    """Why peers did not run, and which of them decoded wrong tokens."""
    lines = []
    for record in records:
        if record["kind"] != "decode":
            continue
        for name, peer in record["peers"].items():
            if "unavailable" in peer:
                lines.append(f"{name} not run: {peer['unavailable']}")
            elif peer["parity"] is False:
                lines.append(f"{name} FAILED parity at {_title(record)}: {peer['parity_detail']['note']}")
    return lines


def aligned(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Lines of columns: the first left-aligned, the others right-aligned."""
    table = [tuple(columns), *rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(columns))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in range(1, len(columns)))])
        for row in table
    ]


def _decode_row(record: Record, launches: Record) -> Row:
    tpot_ms = record["tpot_ms"]
    return (
        _title(record),
        f"{1e3 * tpot_ms['p50']:.1f}" if tpot_ms else "",
        _goal(record),
        f"{1e3 * record['floor_ms']:.1f}",
        f"{100 * record['mbu']:.1f}%",
        f"{record['tokens_per_second']:.1f}",
        "passed" if record["parity"] else "FAILED",
        str(record["compiles_after_warmup"]),
        str(record["recordings_after_warmup"]),
        _number(launches.get("host_us_per_step"), ".1f"),
        _number(launches.get("kernels_per_step"), ".4g"),
        _number(launches.get("kernel_us_per_step"), ".1f"),
        *(_ratio(record["peers"], names) for names in PEER_COLUMNS.values()),
    )


def _goal(record: Record) -> str:
    """What this decode is to reach, and whether it does; empty where nothing is asked."""
    point = (record.get("shape"), record["batch"], record["prompt_len"])
    goals = [goal for goal in GOALS if (goal.shape, goal.batch, goal.prompt_len) == point]
    gpu = record["environment"].get("gpu")
    if not goals or not gpu or GOALS_OF not in gpu["name"] or record.get("quantize") or not record["tpot_ms"]:
        return ""
    (goal,) = goals
    if goal.step_us is not None:
        return f"{goal.step_us:.0f} {'met' if 1e3 * record['tpot_ms']['p50'] <= goal.step_us else 'missed'}"
    return f"{100 * (goal.mbu or 0):.0f}% {'met' if record['mbu'] >= (goal.mbu or 0) else 'missed'}"


def _kernel_row(record: Record, kernel: Mapping[str, Any]) -> Row:
    title = f"{record.get('shape', record['model'])}: {kernel['label']} {kernel['shape']}"
    if "us" not in kernel:
        return (title, kernel["implementation"], str(kernel["calls_per_step"]), "WRONG", "", "", "")
    torch = kernel["references"].get("torch")
    return (
        title,
        kernel["implementation"],
        str(kernel["calls_per_step"]),
        f"{kernel['us']['p50']:.2f}",
        f"{kernel['bandwidth_gb_s']:.0f}",
        "cached" if kernel["in_cache"] else f"{100 * kernel['mbu']:.0f}%",
        f"{torch['ratio']:.2f}x" if torch else "",
    )


def _ratio(peers: Mapping[str, Any], names: Sequence[str]) -> str:
    peer = next((peers[name] for name in names if name in peers), None)
    if peer is None:
        return ""
    if peer.get("ratio") is None:
        return "-"
    return f"{peer['ratio']:.2f}x" if peer["parity"] is not False else "wrong"


def _point(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("shape", "quantize", "batch", "prompt_len", "capacity"))


def _title(record: Record) -> str:
    shape, quantize, batch, prompt_len, capacity = _point(record)
    return f"{shape or record['model']} {quantize or 'bf16'} b{batch} {prompt_len}/{capacity}"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
