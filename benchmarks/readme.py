"""README.md's figures, from committed records: nobody types them.

``fastllama bench report --readme``, or ``python -m benchmarks.readme``, fills the region between the markers with one
table of :data:`ROWS`, where each row was measured, and who wins; ``--check`` exits with 1 if it is not what the
records say.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from fastllama.cli.console import errors_in_one_line

from .contenders import FASTLLAMA, GPT_FAST, LLAMA_CPP, STATIC, TRANSFORMERS, title_of
from .records import RECORDS, read_all
from .report import Record, command, markdown, newest, number, origin

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PEERS = {
    title_of(TRANSFORMERS): "transformers",
    title_of(STATIC): "transformers, compiled",
    GPT_FAST: "gpt-fast",
    LLAMA_CPP: "llama.cpp",
}
SPOKEN = {title_of(STATIC): "compiled transformers"}
ONE_B, EIGHT_B = "random:llama-3.2-1b", "random:llama-3.1-8b"
ROWS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B shape, bf16": {"model": ONE_B, "device": "cpu", "prompt_len": 64},
    "Llama-3.2-1B shape, bf16, GPU": {"model": ONE_B, "device": "cuda", "prompt_len": 512},
    "Llama-3.1-8B shape, bf16, GPU": {"model": EIGHT_B, "device": "cuda", "prompt_len": 512},
}
LONG_PROMPT = 512
MARKS = "¹²³"


def figures(records: Iterable[Record]) -> str:
    """The region: table, origins, sentences; empty where there is no record to show."""
    known = [record for record in records if not record.get("sweep")]  # a point of an old sweep is no plain decode
    asked = {label: {"kind": "decode", "dtype": "bfloat16", "batch": 1, **fields} for label, fields in ROWS.items()}
    shown = {label: found for label, fields in asked.items() if (found := newest(known, **fields))}
    if not shown:
        return ""
    marks = MARKS if len(shown) > 1 else [""]
    peers = [name for name in PEERS if any("ratio" in record["peers"].get(name, {}) for record in shown.values())]
    rows, origins, sentences = [], [], []
    for mark, (label, record) in zip(marks, shown.items(), strict=False):
        rows.append([label + mark, number(record["tokens_per_second"]), *(_cell(record, name) for name in peers)])
        origins.append(f"{mark} {origin(record)}: `{command(record)}`".strip())
        sentences.append(" ".join(_sentences(f"{label}: " * (len(shown) > 1), record, known)))
    table = pd.DataFrame(rows, columns=["tokens/s, batch 1", FASTLLAMA, *(PEERS[name] for name in peers)])
    return "\n\n".join([markdown(table), "  \n".join(origins), *sentences])


def _cell(record: Record, name: str) -> str:
    """A peer's figure; one without says why, and one that reports no tokens is marked as unchecked."""
    peer = record["peers"].get(name, {})
    if "ratio" not in peer:
        return "not run"
    mark = r"\*" * (peer["parity"] is None)
    return "wrong output" if peer["parity"] is False else number(peer["tokens_per_second"]) + mark


def _sentences(label: str, record: Record, known: Sequence[Record]) -> Iterator[str]:
    """Who wins, how near the bound fastllama is, and where it loses."""
    right = {name: peer for name, peer in record["peers"].items() if name in PEERS and peer.get("parity") is not False}
    ratios: dict[str, float] = {
        SPOKEN.get(name) or name: peer["ratio"] for name, peer in right.items() if peer.get("ratio")
    }
    wins = {name: ratio for name, ratio in ratios.items() if ratio >= 1}
    parts = [f"{100 * (1 - ratio):.0f} % slower than {name}" for name, ratio in ratios.items() if ratio < 1]
    if wins:
        low, high = (f"{bound(wins.values()):.2f}" for bound in (min, max))
        parts.insert(0, f"{low if low == high else f'{low} to {high}'} times as fast as {_listed(wins)}")
    if parts:
        mbu = f"{100 * record['mbu']:.0f} % memory-bandwidth utilisation"
        yield f"{label}fastllama is {', and '.join(parts)}, at {mbu}."
    same = {name: record[name] for name in ("model", "dtype")} | {"device": record["device"].split(":")[0]}
    prompts = [each for each in known if each["kind"] in ("decode", "prefill") and each["batch"] == 1]
    long, start = newest(prompts, prompt_len=LONG_PROMPT, **same), newest(known, kind="startup", **same)
    losses = [
        (f"with a prompt of {record['prompt_len']} tokens", _slower(record, "ms", "ttft_ms")),
        (f"with a prompt of {LONG_PROMPT} tokens", _slower(long, "ms", "ttft_ms")),
        ("at a first start with empty compile caches", _slower(start, "s", "phases", "empty", "to_first_token")),
        ("at a start with warm ones", _slower(start, "s", "phases", "warm", "to_first_token")),
    ]
    if found := [f"{where} ({times})" for where, times in losses if times]:
        yield f"It is slower to the first token {_listed(found)}."
    if record.get("disturbed"):
        yield f"The machine was not quiet: {'; '.join(record['disturbed'])}."
    if any(peer.get("parity", True) is None for peer in right.values()):
        yield r"\* llama-bench reports no tokens, so its output is not checked."


def _slower(record: Record | None, unit: str, *path: str) -> str:
    """Our time, which lies at that path of fields, and those of the peers that take less; empty where none does."""
    if record is None:
        return ""

    def time_of(entry: Any) -> float:
        return functools.reduce(lambda found, name: found.get(name, {}), path, entry) or math.inf

    ours, times = time_of(record), {name: time_of(peer) for name, peer in record["peers"].items() if name in PEERS}
    faster = [f"{SPOKEN.get(name) or name} {number(time)} {unit}" for name, time in times.items() if time < ours]
    return f"{number(ours)} {unit}; {', '.join(faster)}" if faster else ""


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def fill(page: str, region: str) -> str:
    """The page with the region in place of what is between the markers, which must be there once each and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md: expected {BEGIN} and, below it, {END}, once each")
    return f"{before}{BEGIN}\n\n{region}\n\n{END}{after}" if region else f"{before}{BEGIN}\n{END}{after}"


def main(
    check: Annotated[bool, typer.Option("--check", help="Only report a README that is out of date.")] = False,
    page: Annotated[Path, typer.Option("--readme", metavar="FILE", help="Page to fill.")] = README,
    folder: Annotated[Path, typer.Option("--records", metavar="DIR", help="Folder of records.")] = RECORDS,
) -> None:
    """Fill README.md's figures from committed records."""
    with errors_in_one_line(debug=False):
        present = page.read_text(encoding="utf-8")
        wanted = fill(present, figures(read_all(sorted(folder.glob("*.jsonl")))))
        if not check:
            page.write_text(wanted, encoding="utf-8")
        elif present != wanted:
            raise ValueError(f"{page.name} is not what the records say: run fastllama bench report --readme")


if __name__ == "__main__":
    typer.run(main)
