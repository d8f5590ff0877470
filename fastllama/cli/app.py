"""The ``fastllama`` command, assembled from its subcommands."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from fastllama.cli.chat import chat
from fastllama.cli.console import installed_version, write
from fastllama.cli.generate import generate
from fastllama.cli.info import info
from fastllama.cli.quantize import quantize

COMMANDS = "fastllama.commands"  # the entry points by which other packages add commands

app = typer.Typer(
    help="A decoding engine for Llama checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, info, quantize):
    app.command()(command)
for entry_point in entry_points(group=COMMANDS):
    app.add_typer(entry_point.load(), name=entry_point.name)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Version of fastllama.")] = False,
) -> None:
    """A decoding engine for Llama checkpoints."""
    if version:
        write(f"fastllama {installed_version('fastllama')}\n")
    elif context.invoked_subcommand is None:
        write(context.get_help() + "\n")
