"""The ``fastllama`` command.

What it writes for others goes to stdout: text, JSON, tables that were asked for. Progress, statistics and
errors go to stderr. It exits with 0, with 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 141 when its
reader went away.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the command."""
    from fastllama.cli.app import app

    app(prog_name="fastllama")
