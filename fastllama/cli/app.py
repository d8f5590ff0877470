"""The ``fastllama`` command, assembled from its subcommands."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastllama.cli.chat import chat
from fastllama.cli.console import installed_version, write
from fastllama.cli.generate import generate
from fastllama.cli.info import info
from fastllama.cli.quantize import quantize

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS = "fastllama.commands"  # the entry points by which other packages add commands


class AddedGroup(TyperGroup):
    """Commands that another package adds; it is imported when one of them is named.

    Their line in the list of commands is the first of the package's docstring.

    Args:
        entry_point: names a ``typer.Typer``.
    """

    def __init__(self, entry_point: EntryPoint) -> None:
        self._entry_point = entry_point
        package = importlib.import_module(entry_point.module.split(".")[0])
        summary = (package.__doc__ or "").strip().splitlines()
        super().__init__(name=entry_point.name, short_help=summary[0] if summary else None)

    @functools.cached_property
    def loaded(self) -> TyperGroup:
        """What the entry point names."""
        group = typer.main.get_group(self._entry_point.load())
        group.name = self.name
        return group

    @property
    def commands(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.loaded.commands

    @commands.setter
    def commands(self, _: Any) -> None:
        """There are none before it is loaded."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self.loaded.make_context(*args, **options)


class OpenGroup(TyperGroup):
    """Own commands, and those of entry points, which are looked for when none of the own ones is named."""

    @property
    def commands(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own | self._added

    @commands.setter
    def commands(self, own: Any) -> None:
        self._own = own

    @functools.cached_property
    def _added(self) -> dict[str, AddedGroup]:
        from importlib.metadata import entry_points

        return {entry_point.name: AddedGroup(entry_point) for entry_point in entry_points(group=COMMANDS)}

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer 0.29 imports pydantic to check a None
        return option

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._own.get(cmd_name) or self._added.get(cmd_name)


app = typer.Typer(
    cls=OpenGroup,
    help="A decoding engine for Llama checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # to import what frames and colours take is most of the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, info, quantize):
    app.command()(command)


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
