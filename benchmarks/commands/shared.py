"""The options that the commands of ``fastllama bench`` share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastllama.cli.console import stderr, stdout, write_json
from fastllama.cli.options import Loaded

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from collections.abc import Mapping

    from rich.console import RenderableType

    from ..peers import Places

Batch = Annotated[int, typer.Option(min=1, help="Sequences decoded together.")]
PromptLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt, which is random.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens of each decode.")]
Capacity = Annotated[int | None, typer.Option(min=2, help="Slots of the KV cache; else what is needed or more.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")]
Peers = Annotated[
    str, typer.Option(help="all, none, or some of eager,transformers,static,gpt-fast,llama.cpp.", metavar="LIST")
]
GptFast = Annotated[Path | None, typer.Option("--gpt-fast", metavar="DIR", help="A checkout of gpt-fast.")]
LlamaBench = Annotated[Path | None, typer.Option("--llama-bench", metavar="PATH", help="The program; else from PATH.")]
Record = Annotated[Path | None, typer.Option(metavar="FILE", help="Append the record to this file of JSON lines.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures: .png, .svg or .pdf.")]


def chosen_peers(text: str, gpt_fast: Path | None, llama_bench: Path | None) -> tuple[tuple[str, ...], Places]:
    """The names that ``--peers`` gives, and where the peers are."""
    from ..peers import Places, parse

    try:
        return parse(text), Places(gpt_fast, llama_bench)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def describe(loaded: Loaded, quantize: str | None) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    return loaded.describe() | {"quantize": quantize, "config": loaded.model.config.to_dict()}


def show(report: RenderableType, json_file: str | None) -> None:
    """Print a table to stdout, or to stderr where stdout belongs to the JSON."""
    (stderr() if json_file == "-" else stdout()).print(report)


def keep(
    kind: str, fields: Mapping[str, Any], device: Any, json_file: str | None, record_file: Path | None
) -> dict[str, Any]:
    """Make the record, write it and append it.

    Raises:
        RecordError: the outputs failed the parity gate; nothing is written.
    """
    from ..environment import environment
    from ..records import RecordError, append, new_record

    record = new_record(kind, fields, environment(device))
    if not record["parity"]:
        raise RecordError("the outputs failed the parity gate: no figures are recorded")
    if json_file:
        write_json(record, json_file)
    if record_file:
        append(record, record_file)
    return record
