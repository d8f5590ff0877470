"""README.md's figures, from committed records: nobody types them.

    fastllama bench report --readme            # write the region between the markers
    fastllama bench report --readme --check    # exit with 1 if it is not what the records say

One table of :data:`ROWS`, where each row was measured, and a sentence on who wins and where fastllama loses. A row without
a record is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from .contenders import FASTLLAMA, GPT_FAST, LLAMA_CPP, STATIC, TRANSFORMERS, title_of
from .records import RECORDS, RecordError, read_all
from .report import Record, command, markdown, newest, number, origin

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PEERS = {
    title_of(TRANSFORMERS): "transformers",
    title_of(STATIC): "transformers, compiled",
    GPT_FAST: "gpt-fast",
    LLAMA_CPP: "llama.cpp",
}
ONE_B, EIGHT_B = "random:llama-3.2-1b", "random:llama-3.1-8b"
ROWS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B shape, bf16": {"model": ONE_B, "device": "cpu", "prompt_len": 64},
    "Llama-3.2-1B shape, bf16, GPU": {"model": ONE_B, "device": "cuda", "prompt_len": 512},
    "Llama-3.1-8B shape, bf16, GPU": {"model": EIGHT_B, "device": "cuda", "prompt_len": 512},
}
LONG_PROMPT = 512
MARKS = "¹²³"


class ReadmeError(ValueError):
    """README.md cannot be filled; the message is one line."""


def figures(records: Iterable[Record]) -> str:
    """The region: table, origins, sentences; empty where there is no record to show."""
    known = list(records)
    shown = {label: found for label, fields in ROWS.items() if (found := _decode(known, **fields))}
    if not shown:
        return ""
    peers = [name for name in PEERS if any("ratio" in record["peers"].get(name, {}) for record in shown.values())]
    rows = [
        [f"{label}{MARKS[at] * (len(shown) > 1)}", number(record["tokens_per_second"]), *_cells(record, peers)]
        for at, (label, record) in enumerate(shown.items())
    ]
    table = markdown(pd.DataFrame(rows, columns=["tokens/s, batch 1", FASTLLAMA, *(PEERS[name] for name in peers)]))
    origins = [
        f"{MARKS[at] * (len(shown) > 1)} {origin(record)}: `{command(record)}`".strip()
        for at, record in enumerate(shown.values())
    ]
    parts = [table, "  \n".join(origins)]
    parts += [" ".join(_sentences(label, record, known, len(shown) > 1)) for label, record in shown.items()]
    return "\n\n".join(parts)


def _decode(known: Sequence[Record], **fields: Any) -> Record | None:
    plain = [record for record in known if not record.get("sweep")]  # a point of an old sweep is no plain decode
    return newest(plain, kind="decode", dtype="bfloat16", batch=1, **fields)


def _cells(record: Record, peers: Sequence[str]) -> Iterator[str]:
    """A cell for each peer; one without a figure says why, and one that reports no tokens is marked as unchecked."""
    for name in peers:
        peer = record["peers"].get(name, {})
        if "ratio" not in peer:
            yield "not run"
        elif peer["parity"] is False:
            yield "wrong output"
        else:
            yield number(peer["tokens_per_second"]) + "\\*" * (peer["parity"] is None)


def _sentences(label: str, record: Record, known: Sequence[Record], is_named: bool) -> Iterator[str]:
    """Who wins, how near the bound it is, and where fastllama loses."""
    ratios = {
        PEERS[name]: peer["ratio"]
        for name, peer in record["peers"].items()
        if name in PEERS and peer.get("ratio") and peer["parity"] is not False
    }
    wins = {name: ratio for name, ratio in ratios.items() if ratio >= 1}
    losses = {name: ratio for name, ratio in ratios.items() if ratio < 1}
    parts = []
    if wins:
        low, high = (f"{bound(wins.values()):.2f}" for bound in (min, max))
        parts.append(f"{low if low == high else f'{low} to {high}'} times as fast as {_listed(wins)}")
    parts += [f"{100 * (1 - ratio):.0f} % slower than {name}" for name, ratio in losses.items()]
    subject = f"{label}: fastllama" if is_named else "fastllama"
    if parts:
        yield f"{subject} decodes {' and '.join(parts)}, at {100 * record['mbu']:.0f} % memory-bandwidth utilisation."
    yield from _other_losses(record, known)
    if any(record["peers"].get(name, {}).get("parity", True) is None for name in PEERS):
        yield "\\* reports no tokens: its output is not checked."


def _other_losses(record: Record, known: Sequence[Record]) -> Iterator[str]:
    """Long prompts and start-up, where the newest records of the same model say that transformers is faster."""
    same = {name: record[name] for name in ("model", "dtype")} | {"device": record["device"].split(":")[0]}
    plain = [each for each in known if each.get("batch") == 1 and each.get("prompt_len") == LONG_PROMPT]
    prompt = newest([each for each in plain if each["kind"] in ("decode", "prefill")], **same)
    theirs = prompt["peers"].get(TRANSFORMERS, {}).get("ttft_ms") if prompt else None
    if prompt and theirs and theirs < prompt["ttft_ms"]:
        yield (
            f"It is slower with a prompt of {LONG_PROMPT} tokens: {number(prompt['ttft_ms'])} ms to the first token, "
            f"transformers {number(theirs)} ms."
        )
    start = newest(known, kind="startup", **same)
    theirs = start["peers"].get(TRANSFORMERS, {}).get("phases") if start else None
    if start and theirs:
        ours, other = (phases["empty"]["to_first_token"] for phases in (start["phases"], theirs))
        if other < ours:
            yield (
                f"It starts more slowly: {number(ours)} s from an empty compile cache to the first token, "
                f"transformers {number(other)} s."
            )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def fill(page: str, region: str) -> str:
    """The page with the region in place of what is between the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ReadmeError(f"expected {BEGIN} and, below it, {END}, once each")
    return f"{before}{BEGIN}\n\n{region}\n\n{END}{after}" if region else f"{before}{BEGIN}\n{END}{after}"


def write(page: Path, folder: Path, check: bool) -> str | None:
    """Fill the page from a folder of records, or with ``check`` only look; what is wrong in one line, or None."""
    try:
        present = page.read_text(encoding="utf-8")
        wanted = fill(present, figures(read_all(folder)))
    except (ReadmeError, RecordError, OSError) as error:
        return f"{page.name}: {error}" if isinstance(error, ReadmeError) else str(error)
    if check and present != wanted:
        return f"{page.name} is not what the records say: run fastllama bench report --readme"
    if not check:
        page.write_text(wanted, encoding="utf-8")
    return None


def main(
    check: Annotated[bool, typer.Option("--check", help="Only report a README that is out of date.")] = False,
    page: Annotated[Path, typer.Option("--readme", metavar="FILE", help="Page to fill.")] = ROOT / "README.md",
    folder: Annotated[Path, typer.Option("--records", metavar="DIR", help="Folder of records.")] = RECORDS,
) -> None:
    """Fill README.md's figures from committed records."""
    if problem := write(page, folder, check):
        sys.stderr.write(f"readme: {problem}\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
