"""One report on one pandas frame: console, Markdown and what the README and the drawings are made of.

:func:`frame` has a row for each contender of each record; :data:`COLUMNS` says what a table shows of such a row.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .contenders import FASTLLAMA

Record = Mapping[str, Any]
Row = Mapping[str, Any]

BOUND = "bound"
SIZES = ("kind", "time", "model", "dtype", "device", "shape", "batch", "prompt_len", "new_tokens", "capacity")
PHASES = ("import", "load", "compile", "first_token", "to_first_token", "to_last_token")
REFERENCES = ("torch", "F.linear")


# ---- the frame -------------------------------------------------------------------------------------------------------


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each contender of each record (by number ``record``), the bound's first; of kernels one an operation."""
    rows = {"decode": _decode_rows, "prefill": _decode_rows, "startup": _startup_rows, "kernels": _kernel_rows}
    return pd.DataFrame([
        {"record": number, **{name: record.get(name) for name in SIZES}, **row}
        for number, record in enumerate(records)
        for row in rows.get(record["kind"], _no_rows)(record)
    ])  # fmt: skip


def _contenders(record: Record) -> Iterator[tuple[str, Record]]:
    yield FASTLLAMA, record
    yield from record["peers"].items()


def _decode_rows(record: Record) -> Iterator[dict[str, Any]]:
    if record.get("floor_ms") and record["kind"] == "decode":
        speed = 1e3 * record["batch"] / record["floor_ms"]
        yield {"name": BOUND, "tpot_ms": record["floor_ms"], "tokens_per_second": speed, "mbu": 1.0}
    for name, entry in _contenders(record):
        if "unavailable" in entry:
            yield {"name": name, "unavailable": entry["unavailable"]}
            continue
        tpot_ms, ttft_ms = entry.get("tpot_ms") or {}, entry["ttft_ms"]
        yield {
            "name": name,
            "ttft_ms": ttft_ms,
            "prompt_rate": 1e3 * record["batch"] * record["prompt_len"] / ttft_ms,
            "tpot_ms": tpot_ms.get("p50"),
            "tpot_p20": tpot_ms.get("p20"),
            "tpot_p80": tpot_ms.get("p80"),
            "tokens_per_second": entry["tokens_per_second"],
            "mbu": entry.get("mbu"),
            "first_run_s": entry.get("first_run_s"),
            "ratio": entry.get("ratio"),
            "parity": entry["parity"],
        }


def _startup_rows(record: Record) -> Iterator[dict[str, Any]]:
    for name, entry in _contenders(record):
        if "unavailable" in entry:
            yield {"name": name, "unavailable": entry["unavailable"]}
            continue
        for caches, phases in entry["phases"].items():
            ratio = (entry.get("ratio") or {}).get(caches)
            yield {"name": name, "caches": caches, "ratio": ratio, "parity": entry["parity"], **phases}


def _kernel_rows(record: Record) -> Iterator[dict[str, Any]]:
    for kernel in record["kernels"]:
        us = kernel.get("us") or {}
        kept = ("label", "implementation", "calls_per_step", "bytes", "in_cache", "bandwidth_gb_s", "mbu", "parity")
        ratios = {name: kernel["references"].get(name, {}).get("ratio") for name in REFERENCES}
        times = {"us": us.get("p50"), "us_p20": us.get("p20"), "us_p80": us.get("p80")}
        # ``op_shape``: the model's shape is a column of its own.
        yield {"name": FASTLLAMA, "op_shape": kernel["shape"], **{k: kernel.get(k) for k in kept}, **times, **ratios}


def _no_rows(record: Record) -> Iterator[dict[str, Any]]:
    yield from ()


# ---- what a table shows ----------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 3) -> str:
    """That number of digits, or all there are before the point; empty for what there is not."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def percent(fraction: Any) -> str:
    """A fraction as a percentage with one decimal."""
    return "" if number(fraction) == "" else f"{100 * fraction:.1f} %"


def times(ratio: Any) -> str:
    """A ratio with two decimals."""
    return "" if number(ratio) == "" else f"{ratio:.2f} x"


def _spread(name: str, low: str, high: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        middle = number(row.get(name))
        spread = f" ({number(row.get(low))}-{number(row.get(high))})" if number(row.get(low)) else ""
        return middle + spread

    return text


def _cell(name: str, form: Callable[[Any], str] = number) -> Callable[[Row], str]:
    return lambda row: form(row.get(name))


Columns = dict[str, Callable[[Row], str]]
DECODE: Columns = {
    "": _cell("name", str),
    "TTFT ms": _cell("ttft_ms"),
    "prompt/s": _cell("prompt_rate"),
    "TPOT ms (p20-p80)": _spread("tpot_ms", "tpot_p20", "tpot_p80"),
    "tok/s": _cell("tokens_per_second"),
    "MBU": _cell("mbu", percent),
    "start s": _cell("first_run_s"),
    "speed-up": _cell("ratio", times),
}
COLUMNS: dict[str, Columns] = {
    "decode": DECODE,
    "prefill": DECODE,
    "startup": {
        "": lambda row: f"{row['name']}, {row['caches']}",
        **{name.replace("_", " ").replace("token", "tok"): _cell(name) for name in PHASES},
        "speed-up": _cell("ratio", times),
    },
    "kernels": {
        "": _cell("label", str),
        "calls": _cell("calls_per_step", str),
        "MB": lambda row: number(row["bytes"] / 1e6),
        "us (p20-p80)": _spread("us", "us_p20", "us_p80"),
        "GB/s": _cell("bandwidth_gb_s"),
        "MBU": lambda row: "cache" if row["in_cache"] else percent(row["mbu"]),
        **{name: _cell(name, times) for name in REFERENCES},
    },
}


def cells(record: Record) -> pd.DataFrame:
    """A record's table as text: a row for each contender that ran."""
    columns = COLUMNS[record["kind"]]
    found = frame([record])
    if "unavailable" in found:
        found = found[found["unavailable"].isna()]
    rows = ([text(row) for text in columns.values()] for row in found.to_dict("records"))
    return pd.DataFrame(rows, columns=list(columns))


# ---- how it is shown -------------------------------------------------------------------------------------------------


def console(record: Record) -> Group:
    """A record's table for a terminal, then what its figures are worth."""
    if record["kind"] == "launches":
        return Group(*(Text(line, style="dim") for line in remarks(record)))
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    found = cells(record)
    for column in found.columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for row in found.itertuples(index=False):
        table.add_row(*row, style="dim" if row[0] == BOUND else "")
    return Group(table, *(Text(line, style="dim") for line in remarks(record)))


def markdown(table: pd.DataFrame) -> str:
    """A frame of text as a Markdown table."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in map(str, row))}|" for row in rows)


def text(table: pd.DataFrame) -> list[str]:
    """A frame of text as lines: the first column left-aligned, the others right-aligned."""
    rows = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(table.columns))]
    return [
        "  ".join([str(row[0]).ljust(widths[0]), *(str(row[at]).rjust(widths[at]) for at in range(1, len(row)))])
        for row in rows
    ]


# ---- what the figures are worth --------------------------------------------------------------------------------------


def remarks(record: Record) -> list[str]:
    """What a reader should know besides the table, one line each."""
    own = {"decode": _decode_remarks, "startup": _startup_remarks, "kernels": _kernel_remarks, "launches": _launches}
    lines = [*own.get(record["kind"], lambda _: ())(record)]
    lines += [f"DISTURBED: {why}" for why in record.get("disturbed", ())]
    for name, peer in record.get("peers", {}).items():
        if "unavailable" in peer:
            lines.append(f"{name} not run: {peer['unavailable']}")
        elif peer["parity"] is None:
            lines.append(f"{name} reports no tokens: its output is not checked")
        elif not peer["parity"]:
            lines.append(f"{name} FAILED parity: {(peer.get('parity_detail') or {}).get('note', 'wrong tokens')}")
        elif record["kind"] == "decode" and peer.get("same_tokens", record["new_tokens"]) < record["new_tokens"]:
            at, total = peer["same_tokens"] + 1, record["new_tokens"]
            lines.append(f"{name} decoded other tokens from token {at} of {total} on, within rounding")
    return lines


def _decode_remarks(record: Record) -> Iterator[str]:
    gb_s, method = record["memory_bandwidth_gb_s"], record.get("memory_bandwidth_method", "")
    yield (
        f"bound: {record['bytes_per_step'] / 1e6:.1f} MB of weights and live cache a step at {gb_s:.1f} GB/s, measured "
        f"in this run ({method}); MBU: memory-bandwidth utilisation, percent of it"
    )
    yield "start: the first run of the process; speed-up: fastllama's tokens/s over the contender's"
    if parity := record.get("parity_detail"):
        outcome = "passed" if parity["passed"] else f"FAILED: {parity['note']}"
        yield (
            f"parity {outcome}: {parity['best']} of {parity['tokens']} tokens have the best float32 logit, the others "
            f"lie at most {parity['worst_gap']:.2g} below it (allowed: {parity['bound']:.2g})"
        )
    peak = record["peak_memory_bytes"]
    yield (
        f"after warm-up: {record['compiles_after_warmup']} compilations, {record['recordings_after_warmup']} graph "
        f"recordings; peak memory {'unknown' if peak is None else decimal(peak)}"
    )


def _startup_remarks(record: Record) -> Iterator[str]:
    yield (
        f"seconds, medians of {record['cold_rounds']} processes on empty and {record['rounds']} on warm compile caches; "
        f"prompt of {record['prompt_len']} tokens, {record['new_tokens']} new tokens"
    )
    yield (
        "compile: what the first call takes longer than a settled one; first tok: of a settled call; to first, to last: "
        "from the start of the process; speed-up: the contender's time to the first token over fastllama's"
    )
    yield f"parity {'passed' if record['parity'] else 'FAILED'}"


def _kernel_remarks(record: Record) -> Iterator[str]:
    yield (
        f"MB: what a call reads; MBU: percent of the memory bandwidth of this run, {record['memory_bandwidth_gb_s']:.1f} "
        f"GB/s ({record.get('memory_bandwidth_method', '')}); {', '.join(REFERENCES)}: their time over fastllama's"
    )
    compiled = [kernel["label"] for kernel in record["kernels"] if kernel["implementation"] != "kernel"]
    yield f"torch operators fused by Inductor: {'; '.join(compiled)}" if compiled else "all are kernels of fastllama"
    if record.get("step_us"):
        step, bound = record["step_us"], record["floor_us"]
        yield (
            f"a greedy step of these calls alone: {step / 1e3:.3g} ms, of torch's {record['torch_step_us'] / 1e3:.3g} ms; "
            f"bound: {bound / 1e3:.3g} ms, {100 * bound / step:.0f} % of the first"
        )
    for kernel in record["kernels"]:
        if not kernel["parity"]:
            detail = kernel["parity_detail"]
            error, bound = detail["error"], detail["bound"]
            yield f"{kernel['label']} is WRONG by {error:.3g}, allowed are {bound:.3g}: not timed"


def _launches(record: Record) -> Iterator[str]:
    yield (
        f"host time {number(record['host_us_per_step'])} us a step; {number(record['kernels_per_step'])} kernels and "
        f"{number(record['copies_per_step'])} copies a step, {number(record['kernel_us_per_step'])} us in kernels"
    )
    for kernel in record["top_kernels"]:
        yield f"{kernel['us']:10.1f} us {kernel['calls']:6.3g} calls  {kernel['name'][:100]}"


# ---- where a record comes from ---------------------------------------------------------------------------------------


def newest(records: Iterable[Record], **fields: Any) -> Record | None:
    """The record with these fields that was measured last (``device`` without its number); of equally old ones the last
    in the files."""

    def fits(record: Record) -> bool:
        found = {**record, "device": record["device"].split(":")[0]}
        return all(found.get(name) == value for name, value in fields.items())

    return max(enumerate(filter(fits, records)), key=lambda pair: (pair[1]["time"], pair[0]), default=(0, None))[1]


def machine(record: Record) -> str:
    """The GPU, or the processor and the number of threads of torch."""
    environment = record["environment"]
    if environment["gpu"]:
        return str(environment["gpu"]["name"])
    threads = environment["threads"]
    return f"{environment['cpu']}, {threads} thread{'s' * (threads != 1)}"


def origin(record: Record) -> str:
    """Machine, software, commit and day."""
    environment = record["environment"]
    cuda = f", CUDA {environment['gpu']['cuda']}" if environment["gpu"] else ""
    commit = f"commit {environment['commit'][:9]}" if environment["commit"] else "unknown commit"
    changes = " with changes" if environment["dirty"] else ""
    torch = environment["packages"]["torch"]
    return f"{machine(record)}, torch {torch}{cuda}, {commit}{changes}, {record['time'][:10]}"


OUTPUTS = {"--json", "--record", "--plot", "--out", "--records", "--workspace", "--profile"}  # and a value each
PLACES = {"--gpt-fast": "DIR", "--llama-bench": "PATH"}
FLAGS = {"--quiet", "-q", "--debug"}


def command(record: Record) -> str:
    """The command that measured it, without where its results went and with no path of the machine's."""
    program, *words = record["environment"]["argv"]
    kept, rest = ["fastllama"] if program in ("fastllama", "__main__.py") else ["fastllama", "bench"], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in OUTPUTS or name in PLACES:
            if not equals:
                next(rest, None)
            kept += [name, PLACES[name]] if name in PLACES else []
        elif name not in FLAGS:
            kept.append(word)
    return shlex.join(kept)
