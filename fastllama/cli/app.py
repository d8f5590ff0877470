"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from fastllama.cli.chat import chat
from fastllama.cli.console import installed_version, write
from fastllama.cli.generate import generate
from fastllama.cli.info import info
from fastllama_benchmarks.commands.app import app as bench  # pyright: ignore[reportMissingImports] (benchmarks/, see pyproject)

app = typer.Typer(
    help="Decode Llama checkpoints as fast as the memory of the machine allows.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, info):
    app.command()(command)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    """Decode Llama checkpoints as fast as the memory of the machine allows."""
    if version:
        write(f"fastllama {installed_version('fastllama')}\n")
    elif context.invoked_subcommand is None:
        write(context.get_help() + "\n")
