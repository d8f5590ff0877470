"""Output and exit codes of every command: results on stdout, progress and one-line errors on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:  # not needed to answer --help
    from rich.console import Console

CTRL_C, BROKEN_PIPE = 130, 141
PACKAGES = ("fastllama", "torch", "triton", "transformers", "tokenizers", "safetensors")


def stdout() -> Console:
    """A console for tables; a new one each time, since stdout may have been redirected."""
    from rich.console import Console

    class ConsoleOfPipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return ConsoleOfPipe(highlight=False)


def stderr() -> Console:
    """A console for notes and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def write(text: str) -> None:
    """Write text to stdout unchanged and flush."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(record: Mapping[str, Any], file: str) -> None:
    """Write one JSON object on one line to a file, or to stdout for ``-``."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if file == "-":
        write(line)
        return
    with open(file, "w", encoding="utf-8") as target:
        target.write(line)


def installed_version(package: str) -> str:
    """The version of a distribution, or ``not installed``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": sys.version.split()[0]} | {name: installed_version(name) for name in PACKAGES}


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show progress messages on stderr, including the engine's messages about compiling.

    Yields a function that sets the message. An empty message ends the display, because a spinner would erase other
    output on its line. Where stderr is not a terminal, each message is a line.
    """
    from rich.text import Text

    console = stderr()
    status = console.status("") if console.is_terminal else None
    over = quiet

    def say(message: str) -> None:
        nonlocal over
        if over:
            return
        if not message:
            over = True
            if status:
                status.stop()
        elif status:
            status.update(Text(message, style="dim"))
            status.start()
        else:
            console.print(message, markup=False)

    with engine_messages(say):
        try:
            yield say
        finally:
            say("")


@contextmanager
def engine_messages(say: Callable[[str], None]) -> Iterator[None]:
    """Pass the engine's INFO log records to ``say``; warnings have a line of their own."""
    logger = logging.getLogger("fastllama.engine")  # and every module of that folder
    handler = logging.Handler(logging.INFO)
    handler.addFilter(lambda record: record.levelno < logging.WARNING)
    handler.emit = lambda record: say(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def log_to_stderr(level: int) -> None:
    """Show log records of this level and above, unless logging is configured already."""
    handler = logging.StreamHandler()
    handler.setLevel(level)  # on the handler too, since a logger may pass more to other handlers
    logging.basicConfig(level=level, format="fastllama: %(message)s", handlers=[handler])


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn an exception into one line on stderr and an exit code; with ``debug`` it is raised as it is."""
    log_to_stderr(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt on a line of its own
        raise typer.Exit(CTRL_C) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        raise typer.Exit(BROKEN_PIPE) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        print(f"fastllama: error: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


def one_line(error: Exception) -> str:
    """The message of an error, with its type where it was not written for users."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | NotImplementedError | OSError | ImportError) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"
