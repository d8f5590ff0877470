"""One report on one pandas frame: console, Markdown, README and plots."""

import functools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .contenders import FASTLLAMA
from .records import LAUNCHES

Record = Mapping[str, Any]

BOUND = "bound"
SIZES = ("kind", "time", "model", "dtype", "device", "batch", "prompt_len", "new_tokens", "capacity")
REFERENCES = ("torch", "F.linear")
OUTPUTS = {"--json", "--record", "--plot", "--out"}  # options, and their values, that do not decide what is measured
PLACES = {"--gpt-fast": "DIR", "--llama-bench": "PATH"}


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each contender of each record, by number, the bound's first; of kernels for each operation."""
    return pd.DataFrame(
        {"record": number, **{name: record.get(name) for name in SIZES}, **row}
        for number, record in enumerate(records)
        for row in ROWS.get(record["kind"], _contender_rows)(record)
    )


def _contender_rows(record: Record) -> Iterator[dict[str, Any]]:
    if record["kind"] == "decode":
        speed = 1e3 * record["batch"] / record["floor_ms"]
        yield {"name": BOUND, "tpot_ms": record["floor_ms"], "tokens_per_second": speed, "mbu": 1.0}
    for name, entry in {FASTLLAMA: record, **record.get("peers", {})}.items():
        if "unavailable" in entry:
            continue
        if record["kind"] == "startup":
            for caches, phases in entry["phases"].items():
                ratio = (entry.get("ratio") or {}).get(caches)
                yield {"name": f"{name}, {caches}", "ratio": ratio, "parity": entry["parity"], **phases}
            continue
        kept = ("ttft_ms", "tokens_per_second", "mbu", "first_run_s", "ratio", "parity")
        rate = 1e3 * record["batch"] * record["prompt_len"] / entry["ttft_ms"]
        plain = {field: entry.get(field) for field in kept}
        yield {"name": name, "prompt_rate": rate, **plain, **_quantiles("tpot_ms", entry)}


def _kernel_rows(record: Record) -> Iterator[dict[str, Any]]:
    kept = ("shape", "calls_per_step", "bytes", "in_cache", "bandwidth_gb_s", "mbu", "parity")
    for kernel in record["kernels"]:
        times = _quantiles("us", kernel)
        ratios = {name: kernel["references"].get(name, {}).get("ratio") for name in REFERENCES}
        yield {"name": kernel["label"], **{field: kernel.get(field) for field in kept}, **times, **ratios}


def _quality_rows(record: Record) -> Iterator[dict[str, Any]]:
    plain = record["schemes"]["none"]
    for name, scheme in record["schemes"].items():
        cost = scheme["perplexity"] / plain["perplexity"] - 1
        yield {"name": name, **scheme, "cost": cost, "smaller": plain["bytes_per_step"] / scheme["bytes_per_step"]}


def _speculation_rows(record: Record) -> Iterator[dict[str, Any]]:
    for name, text in record["texts"].items():
        accepted = " ".join(percent(share) for share in text["acceptance"] if share is not None)
        yield {"name": name, **text, "accepted": accepted}


ROWS = {"kernels": _kernel_rows, "quality": _quality_rows, "speculation": _speculation_rows}


def _quantiles(name: str, entry: Record) -> dict[str, Any]:
    found = entry.get(name) or {}
    return {name: found.get("p50"), f"{name}_p20": found.get("p20"), f"{name}_p80": found.get("p80")}


def number(value: Any) -> str:
    """Three digits, or all there are before the point; empty for what there is not."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def times(ratio: Any, form: str = "{:.2f} x") -> str:
    """A ratio, with two decimals unless another form is given; empty for what there is not."""
    return number(ratio) and form.format(ratio)


percent = functools.partial(times, form="{:.0%}")


def _cell(name: str, form: Callable[[Any], str] = number) -> Callable[[Record], str]:
    return lambda row: form(row.get(name))


def _spread(name: str) -> Callable[[Record], str]:
    def text(row: Record) -> str:
        low, middle, high = (number(row.get(each)) for each in (f"{name}_p20", name, f"{name}_p80"))
        return f"{middle} ({low}-{high})" if low else middle

    return text


Columns = dict[str, Callable[[Record], str]]
DECODE: Columns = {
    "": _cell("name", str),
    "TTFT ms": _cell("ttft_ms"),
    "prompt/s": _cell("prompt_rate"),
    "TPOT ms (p20-p80)": _spread("tpot_ms"),
    "tok/s": _cell("tokens_per_second"),
    "MBU": _cell("mbu", percent),
    "start": _cell("first_run_s"),
    "speed-up": _cell("ratio", times),
}
QUALITY: Columns = {
    "": _cell("name", str),
    "MB a step": lambda row: number(row["bytes_per_step"] / 1e6),
    "smaller": _cell("smaller", times),
    "perplexity": _cell("perplexity", "{:.4g}".format),
    "cost": lambda row: f"{row['cost']:+.2%}",
    "KL, nats": _cell("divergence", "{:.2g}".format),
    "same token": _cell("agreement", "{:.1%}".format),
}
SPECULATION: Columns = {
    "": _cell("name", str),
    "plain tok/s": _cell("plain_tokens_per_second"),
    "tok/s": _cell("tokens_per_second"),
    "speed-up": _cell("ratio", times),
    "tokens a step": _cell("tokens_per_step"),
    "accepted, by place": _cell("accepted", str),
}
COLUMNS: dict[str, Columns] = {
    "speculation": SPECULATION,
    "decode": DECODE,
    "prefill": DECODE,
    "quality": QUALITY,
    "startup": {
        "": _cell("name", str),
        **{phase: _cell(phase) for phase in ("import", "load", "compile")},
        "1st token": _cell("first_token"),
        "to 1st": _cell("to_first_token"),
        "to last": _cell("to_last_token"),
        "speed-up": _cell("ratio", times),
    },
    "kernels": {
        "": _cell("name", str),
        "calls": _cell("calls_per_step", str),
        "MB": lambda row: number(row["bytes"] / 1e6),
        "us (p20-p80)": _spread("us"),
        "GB/s": _cell("bandwidth_gb_s"),
        "MBU": lambda row: "cache" if row["in_cache"] else percent(row["mbu"]),
        **{name: _cell(name, times) for name in REFERENCES},
    },
}


def cells(record: Record) -> pd.DataFrame:
    """A record's table as text."""
    columns = COLUMNS[record["kind"]]
    rows = ([text(row) for text in columns.values()] for row in frame([record]).to_dict("records"))
    return pd.DataFrame(rows, columns=list(columns))


def terminal(found: pd.DataFrame) -> Table:
    """A frame of text as a table for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    for column in found.columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for row in found.itertuples(index=False):
        table.add_row(*row, style="dim" if row[0] == BOUND else "")
    return table


def console(record: Record) -> Group:
    """A record's table for a terminal, then what its figures are worth."""
    table = [terminal(cells(record))] if record["kind"] in COLUMNS else []
    return Group(*table, *(Text(line, style="dim") for line in remarks(record)))


def markdown(table: pd.DataFrame) -> str:
    """A frame of text as a Markdown table."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in rows)


def remarks(record: Record) -> list[str]:
    """What a reader should know besides the table, one line each."""
    own = {
        "quality": _quality_remarks,
        "decode": _decode_remarks,
        "startup": _startup_remarks,
        "kernels": _kernel_remarks,
        "launches": _launches,
        "speculation": _speculation_remarks,
    }
    lines = [*own.get(record["kind"], lambda _: ())(record)]
    lines += [f"DISTURBED: {why}" for why in record.get("disturbed", ())]
    for name, peer in record.get("peers", {}).items():
        same, total = peer.get("same_tokens"), record["new_tokens"]
        if "unavailable" in peer:
            lines.append(f"{name} not run: {peer['unavailable']}")
        elif peer["parity"] is None:
            lines.append(f"{name} reports no tokens: its output is not checked")
        elif not peer["parity"]:
            lines.append(f"{name} FAILED parity: {(peer.get('parity_detail') or {}).get('note', 'wrong tokens')}")
        elif same is not None and same < total:
            lines.append(f"{name} decoded other tokens from token {same + 1} of {total} on, within rounding")
    return lines


def _decode_remarks(record: Record) -> Iterator[str]:
    method = record.get("memory_bandwidth_method")
    speed = f"{record['memory_bandwidth_gb_s']:.1f} GB/s, measured in this run ({method})"
    yield f"bound: {record['bytes_per_step'] / 1e6:.1f} MB of weights and live cache a step at {speed}"
    yield "MBU: memory-bandwidth utilisation, percent of the bound; start: seconds of the first run of the process"
    yield "speed-up: fastllama's tokens/s over the contender's"
    if parity := record.get("parity_detail"):
        outcome = "passed" if parity["passed"] else f"FAILED: {parity['note']}"
        best = f"{parity['best']} of {parity['tokens']} tokens have the best float32 logit"
        gap = f"{parity['worst_gap']:.2g} below it (allowed: {parity['bound']:.2g})"
        yield f"parity {outcome}: {best}, the others lie at most {gap}"
    costs = f"{record['compiles_after_warmup']} compilations, {record['recordings_after_warmup']} graph recordings"
    yield f"after warm-up: {costs}; peak memory {decimal(record['peak_memory_bytes'] or 0)}"


def _quality_remarks(record: Record) -> Iterator[str]:
    yield f"of {record['schemes']['none']['tokens']} tokens of {record['text']}; none: the weights, not in codes"


def _speculation_remarks(record: Record) -> Iterator[str]:
    costs = ", ".join(f"{size}: {number(cost)}" for size, cost in record["costs"].items())
    yield f"{record['new_tokens']} new tokens, batch {record['batch']}; a number: the share of drafts that are right"
    yield "accepted, by place: drafted tokens that came true, the first ones first"
    yield f"a step of t tokens a row over one of 1 takes: {costs or 'none is taken'}"
    second = record["assistant"] or {}
    if second:
        yield f"drafts by a second model, {second['num_hidden_layers']} layers of {second['hidden_size']}"
    for name, text in record["texts"].items():
        if not text["parity"]:
            yield f"{name} FAILED: {'wrong' if text['same_tokens'] else 'other'} tokens"


def _startup_remarks(record: Record) -> Iterator[str]:
    processes = f"{record['cold_rounds']} processes on empty and {record['rounds']} on warm compile caches"
    tokens = f"prompt of {record['prompt_len']} tokens, {record['new_tokens']} new tokens"
    yield f"seconds, medians of {processes}; {tokens}"
    yield "compile: what the first call takes longer than a settled one; 1st token: of a settled call"
    yield "to 1st, to last: from the start of the process; speed-up: the contender's time to the first token over ours"
    yield f"parity {'passed' if record['parity'] else 'FAILED'}"


def _kernel_remarks(record: Record) -> Iterator[str]:
    speed = f"{record['memory_bandwidth_gb_s']:.1f} GB/s ({record.get('memory_bandwidth_method')})"
    yield f"MB: what a call reads; MBU: percent of the memory bandwidth of this run, {speed}"
    yield f"{', '.join(REFERENCES)}: their time over fastllama's"
    compiled = [kernel["label"] for kernel in record["kernels"] if kernel["implementation"] != "kernel"]
    yield f"torch operators fused by Inductor: {'; '.join(compiled)}" if compiled else "all are kernels of fastllama"
    if record.get("step_us"):
        step, torch_step, bound = (record[name] / 1e3 for name in ("step_us", "torch_step_us", "floor_us"))
        yield f"a greedy step of these calls: {step:.3g} ms, of torch's {torch_step:.3g} ms; bound: {bound:.3g} ms"
    for kernel in record["kernels"]:
        if not kernel["parity"]:
            error, bound = (kernel["parity_detail"][name] for name in ("error", "bound"))
            yield f"{kernel['label']} is WRONG by {error:.3g}, allowed are {bound:.3g}: not timed"


def _launches(record: Record) -> Iterator[str]:
    host, kernels, copies, us = (number(record[name]) for name in LAUNCHES)
    yield f"host time {host} us a step; {kernels} kernels and {copies} copies a step, {us} us in kernels"
    for kernel in record["top_kernels"]:
        yield f"{kernel['us']:10.1f} us {kernel['calls']:6.3g} calls  {kernel['name'][:100]}"


def newest(records: Iterable[Record], **fields: Any) -> Record | None:
    """The record with these fields (``device`` without its number) that was measured last."""

    def fits(record: Record) -> bool:
        found = {**record, "device": record["device"].split(":")[0]}
        return all(found.get(name) == value for name, value in fields.items())

    return max(enumerate(filter(fits, records)), key=lambda pair: (pair[1]["time"], pair[0]), default=(0, None))[1]


def point(record: Record) -> str:
    """Model, batch, prompt and slots in short."""
    sizes = "/".join(str(record.get(name, record.get("live", ""))) for name in ("prompt_len", "capacity"))
    return f"{Path(record['model']).name} b{record.get('batch', 1)} {sizes}"


def origin(record: Record) -> str:
    """Machine, software, commit and day."""
    found = record["environment"]
    gpu, threads = found["gpu"], found["threads"]
    machine = f"{gpu['name']}, CUDA {gpu['cuda']}" if gpu else f"{found['cpu']}, {threads} thread{'s' * (threads != 1)}"
    commit = f"commit {(found['commit'] or 'unknown')[:9]}" + " with changes" * bool(found["dirty"])
    return f"{machine}, torch {found['packages']['torch']}, {commit}, {record['time'][:10]}"


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
        elif name not in ("--quiet", "-q", "--debug"):
            kept.append(word)
    return shlex.join(kept)
