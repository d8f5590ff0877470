"""The ``fastllama`` command.

Results go to stdout: text, JSON, tables. Progress, statistics and errors go to stderr. Exit codes: 0, 1 for an error,
2 for wrong usage, 130 after Ctrl-C, 141 when the reader of stdout went away.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the command."""
    from fastllama.cli.app import app

    app(prog_name="fastllama")
