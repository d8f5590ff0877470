"""README.md's figures, from committed records: nobody types them.

    python -m benchmarks.readme            # write the table between the markers
    python -m benchmarks.readme --check    # say in one line, and by exiting with 1, if it is not what the records say

ROWS below says what each row shows and which record it takes: the newest that fits. A row without a record is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import labels
from .ours import OURS
from .peers.gpt_fast import NAME as GPT_FAST
from .peers.llama_cpp import NAME as LLAMA_CPP
from .peers.transformers import EAGER as TRANSFORMERS
from .peers.transformers import STATIC
from .records import RECORDS, RecordError, read_all

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PEERS = {TRANSFORMERS: "transformers", STATIC: "static+compile", GPT_FAST: "gpt-fast", LLAMA_CPP: "llama.cpp"}
NOT_RUN = "not run"
LIVE, FEW_SLOTS, MANY_SLOTS = 64, 128, 8192

Record = Mapping[str, Any]


class ReadmeError(ValueError):
    """README.md cannot be filled; the message is one line."""


@dataclass(frozen=True)
class Cells:
    """What a row shows.

    Attributes:
        values: of each contender by name, as text.
        ratio: fastllama's speed over that of transformers.
        mbu: memory-bandwidth utilisation.
    """

    values: dict[str, str]
    ratio: str = ""
    mbu: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: what it shows, with its unit.
        fields: what a record must say to be shown; ``device`` without its number.
        cells: makes the cells of the newest such record; None where it lacks what the row shows.
    """

    label: str
    fields: Mapping[str, Any]
    cells: Callable[[Record], Cells | None]


# ---- what a record shows -------------------------------------------------------------------------------------------


def decode_cells(record: Record) -> Cells:
    """Tokens per second."""
    return _speed_cells(record, "tokens_per_second", percent(record["mbu"]))


def prefill_cells(record: Record) -> Cells:
    """Milliseconds to the first token."""
    return _speed_cells(record, "ttft_ms", "")


def _speed_cells(record: Record, name: str, mbu: str) -> Cells:
    ratio = _ratio(record)
    values = _values(record, lambda entry: number(entry[name]))
    return Cells(values, "" if ratio is None else times(ratio), mbu)


def startup_cells(record: Record) -> Cells:
    """Seconds from a process's start to its first token, on empty and on warm caches."""

    def on_each(seconds: Callable[[str], str]) -> str:
        return " / ".join(map(seconds, ("empty", "warm")))

    ratio = _ratio(record)
    values = _values(record, lambda entry: on_each(lambda c: number(entry["phases"][c]["to_first_token"])))
    return Cells(values, "" if ratio is None else on_each(lambda caches: times(ratio[caches])))


def capacity_cells(record: Record) -> Cells | None:
    """Milliseconds a token in many slots and, by turns with that, in few; None where there is no latter."""
    few = record["peers"].get(f"{FEW_SLOTS} slots", {})
    if not few.get("parity"):
        return None
    both = (entry["tpot_ms"]["p50"] for entry in (record, few))
    return Cells({OURS: " / ".join(map(number, both))}, "", percent(record["mbu"]))


def _values(record: Record, text: Callable[[Record], str]) -> dict[str, str]:
    """A cell for fastllama and each peer; those without a figure say why."""
    values = {OURS: text(record)}
    for name, peer in record["peers"].items():
        if "unavailable" in peer:
            values[name] = NOT_RUN
        elif peer["parity"] is None:
            values[name] = f"{text(peer)} (unchecked)"
        else:
            values[name] = text(peer) if peer["parity"] else "wrong output"
    return values


def _ratio(record: Record) -> Any:
    """That to transformers; None where it has no right output."""
    peer = record["peers"].get(TRANSFORMERS, {})
    return peer.get("ratio") if peer.get("parity") else None


# ---- the rows ------------------------------------------------------------------------------------------------------


def _fields(kind: str, model: str, dtype: str = "bfloat16", device: str = "cpu", **others: Any) -> dict[str, Any]:
    return {"kind": kind, "model": model, "dtype": dtype, "device": device, "quantize": None, "sweep": None} | others


DEMO, ONE_B, EIGHT_B = "demo", "random:llama-3.2-1b", "random:llama-3.1-8b"
CAPACITY = {"sweep": "capacity", "sweep_value": MANY_SLOTS, "live_tokens": LIVE}

ROWS = (
    Row("demo checkpoint (5.5M), tokens/s", _fields("decode", DEMO, batch=1, prompt_len=64), decode_cells),
    Row("1.24B, tokens/s", _fields("decode", ONE_B, batch=1, prompt_len=64), decode_cells),
    Row(
        "1.24B, 512-token prompt to first token, ms", _fields("prefill", ONE_B, batch=1, prompt_len=512), prefill_cells
    ),
    Row("1.24B, process to first token, empty / warm caches, s", _fields("startup", ONE_B), startup_cells),
    Row(
        f"1.24B, {LIVE} live tokens in {MANY_SLOTS} slots / in {FEW_SLOTS}, ms a token",
        _fields("decode", ONE_B, batch=1, **CAPACITY),
        capacity_cells,
    ),
    Row("1.24B on a GPU, tokens/s", _fields("decode", ONE_B, device="cuda", batch=1, prompt_len=512), decode_cells),
    Row("8.03B on a GPU, tokens/s", _fields("decode", EIGHT_B, device="cuda", batch=1, prompt_len=512), decode_cells),
)


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """The table as it grows, and the notes below it that say where each row was measured."""

    rows: list[tuple[str, Cells, Record, int]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)

    def add(self, label: str, cells: Cells, record: Record) -> None:
        """Add a row; rows of one machine, commit and day share a note."""
        origin = ", ".join(f(record) for f in (labels.machine, labels.software, labels.revision, labels.day))
        if origin not in self.origins:
            self.origins.append(origin)
        self.rows.append((label, cells, record, self.origins.index(origin) + 1))

    def markdown(self) -> str:
        """The table and its notes; empty where there is no row."""
        if not self.rows:
            return ""
        ran = {name for _, cells, *_ in self.rows for name, text in cells.values.items() if text != NOT_RUN}
        shown = [OURS, *(name for name in PEERS if name in ran)]
        header = ["", *(PEERS.get(name, name) for name in shown), "ratio", "MBU", "measured by", "on"]
        lines = [_line(header), "|" + "---|" * len(header)]
        for label, cells, record, origin in self.rows:
            values = [cells.values.get(name, "") for name in shown]
            lines.append(_line([label, *values, cells.ratio, cells.mbu, f"`{labels.command(record)}`", str(origin)]))
        notes = [f"{at}. {origin}" for at, origin in enumerate(self.origins, start=1)]
        return "\n".join([*lines, "", *notes])


def figures(records: Iterable[Record], rows: Sequence[Row] = ROWS) -> str:
    """The rows that there are records for, as Markdown."""
    known, table = list(records), Table()
    for row in rows:
        record = newest(known, row.fields)
        cells = row.cells(record) if record is not None else None
        if record is not None and cells is not None:
            table.add(row.label, cells, record)
    return table.markdown()


def newest(records: Iterable[Record], fields: Mapping[str, Any]) -> Record | None:
    """The record with these fields that was measured last; of equally old ones the last in the files."""

    def fits(record: Record) -> bool:
        found = {**record, "device": record["device"].split(":")[0]}
        return all(found.get(name) == value for name, value in fields.items())

    return max(enumerate(filter(fits, records)), key=lambda pair: (pair[1]["time"], pair[0]), default=(0, None))[1]


def fill(text: str, table: str) -> str:
    """The text with the table in place of what is between the markers.

    Raises:
        ReadmeError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ReadmeError(f"expected {BEGIN} and, below it, {END}, once each")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}" if table else f"{before}{BEGIN}\n{END}{after}"


def number(value: float) -> str:
    """Three digits, or all there are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def percent(fraction: float) -> str:
    """A fraction as a whole percentage."""
    return f"{100 * fraction:.0f} %"


def times(ratio: float) -> str:
    """A ratio with two decimals."""
    return f"{ratio:.2f} x"


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


# ---- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check README.md; the exit status."""
    parser = argparse.ArgumentParser("benchmarks.readme", description="README.md's figures from committed records.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if there is something to write"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help="folder of .jsonl files")
    options = parser.parse_args(arguments)
    try:
        present = options.readme.read_text(encoding="utf-8")
        wanted = fill(present, figures(read_all(options.records)))
    except (ReadmeError, RecordError, OSError) as error:
        return _fail(f"{options.readme.name}: {error}" if isinstance(error, ReadmeError) else str(error))
    if options.check:
        told = f"{options.readme.name} is not what the records say: run python -m benchmarks.readme"
        return 0 if present == wanted else _fail(told)
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"readme: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
