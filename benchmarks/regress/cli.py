"""The ``fastllama-regress`` command.

Exits with 0 when the head is not slower (or nobody can tell, see ``--strict``), 1 when it is slower or its outputs
differ, 2 when it could not be measured or was asked for something impossible, 3 with ``--strict`` when the outcome is
inconclusive, 130 after Ctrl-C. The report goes to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastllama.cli.console import progress, stderr, stdout

from ..environment import environment
from ..harness import Unavailable
from . import gate, report
from .plot import draw
from .rounds import Metric
from .verdict import MIN_ROUNDS, ROUNDS_TO_FAIL, Outcome

FAILED, UNAVAILABLE, INCONCLUSIVE, CTRL_C = 1, 2, 3, 130
NAME = "fastllama-regress"
METRICS = "tpot-b1,ttft-b1,tpot-b4"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command."""
    app(prog_name=NAME)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def regress(
    base: Annotated[str, typer.Option(help="Revision to compare with: a branch, a tag, a commit.")],
    head: Annotated[str, typer.Option(help="Revision to judge; . is the checkout as it is.")] = ".",
    repo: Annotated[Path, typer.Option(help="A folder in the repository.")] = Path(),
    model: Annotated[str, typer.Option("--model", "-m", help="demo, a folder, a hub id, or random:SHAPE.")] = "demo",
    dtype: Annotated[str, typer.Option(help="What is timed; outputs are compared in float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else cuda if there is one.")] = None,
    metrics: Annotated[str, typer.Option(help="tpot-bN or ttft-bN for a batch of N, with commas.")] = METRICS,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=MIN_ROUNDS, help="Rounds of fresh processes.")] = 3,
    max_rounds: Annotated[int, typer.Option(min=ROUNDS_TO_FAIL, help="So many at most, while inconclusive.")] = 12,
    turns: Annotated[int, typer.Option(min=2, help="Decodes of each process in a round.")] = 8,
    minutes: Annotated[float, typer.Option(min=0, help="After so many, no more rounds than --rounds.")] = 15.0,
    threshold: Annotated[
        str, typer.Option(help="Slowdown in percent, or auto: 3, on a CPU more if it is noisy.")
    ] = "auto",
    accept_different_outputs: Annotated[bool, typer.Option("--accept-different-outputs")] = False,
    python: Annotated[
        Path | None, typer.Option(help="Interpreter for both, in place of environments made here.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; else all cores.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="For environments and what was compiled.")] = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write Markdown, and a plot beside it.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write every sample as JSON; - is stdout.")] = None,
    summary: Annotated[
        Path | None, typer.Option(envvar="GITHUB_STEP_SUMMARY", help="Append the report to this file.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 3 when inconclusive.")] = False,
    skip_old_base: Annotated[bool, typer.Option(help="Exit with 0 when the base cannot be measured.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fail when one revision of fastllama decodes slower than another."""
    with _one_line_errors(), _interrupted_by_sigterm():
        settings = gate.Settings(
            repo=repo,
            base=base,
            head=head,
            cache=(cache_dir or _default_cache()).resolve(),
            metrics=_metrics(metrics),
            model=model,
            dtype=dtype,
            device=device,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            rounds=rounds,
            max_rounds=max(rounds, max_rounds),
            turns=turns,
            minutes=minutes,
            threshold=_threshold(threshold),
            accept_different_outputs=accept_different_outputs,
            python=_interpreter(python),
            threads=threads,
        )
        try:
            with progress(quiet) as say:
                result = gate.run(settings, say)
        except gate.BaseUnavailable as error:
            if not skip_old_base:
                raise
            _skipped(str(error), report_file, summary)
            return
        _tell(result, report_file, json_file, summary)
    if result.failed:
        raise typer.Exit(FAILED)
    if strict and result.has(Outcome.UNDECIDED):
        raise typer.Exit(INCONCLUSIVE)


def _tell(result: gate.Result, report_file: Path | None, json_file: str | None, summary: Path | None) -> None:
    """Write everything that was asked for."""
    machine = environment(_device(result))
    command = shlex.join([NAME, *sys.argv[1:]])
    console = stderr() if json_file == "-" else stdout()
    if result.verdicts:
        console.print(_table(result))
    color = "red" if result.failed else "yellow" if result.has(Outcome.UNDECIDED) else "green"
    console.print(Text(report.headline(result), style=color))
    if report_file:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        plot = _plot(result, report_file.with_suffix(".svg"))
        report_file.write_text(report.markdown(result, machine, command, plot), encoding="utf-8")
    if summary:
        _append(summary, report.markdown(result, machine, command))
    if json_file:
        line = json.dumps(report.to_dict(result, machine), ensure_ascii=False, allow_nan=False) + "\n"
        if json_file == "-":
            sys.stdout.write(line)
        else:
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
            Path(json_file).write_text(line, encoding="utf-8")


def _plot(result: gate.Result, path: Path) -> str | None:
    if not result.verdicts:
        return None
    try:
        draw(result, path)
    except Unavailable as error:
        stderr().print(str(error), markup=False)
        return None
    return path.name


def _skipped(reason: str, report_file: Path | None, summary: Path | None) -> None:
    text = f"not measured: {reason}"
    stdout().print(text, markup=False)
    for path in filter(None, (report_file, summary)):
        _append(path, f"## Latency: {text}\n")


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _table(result: gate.Result) -> Table:
    table = Table(*report.COLUMNS, box=None, pad_edge=False, header_style="")
    for row in report.table_rows(result):
        table.add_row(*map(Text, row))
    return table


def _device(result: gate.Result) -> str:
    return next((info["device_type"] for info in result.info.values()), "cpu")


def _metrics(names: str) -> tuple[Metric, ...]:
    try:
        return tuple(dict.fromkeys(Metric.parse(name.strip()) for name in names.split(",")))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--metrics") from None


def _threshold(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        percent = float(text.rstrip("% "))
    except ValueError:
        percent = -1.0
    if not 0 < percent < 1000:
        raise typer.BadParameter(f"{text!r} is neither a number of percent nor auto", param_hint="--threshold")
    return percent / 100


def _interpreter(python: Path | None) -> Path | None:
    """The interpreter as given, made absolute; links are kept, since an environment's python is one."""
    if python is None:
        return None
    absolute = Path(os.path.abspath(python))
    if not os.access(absolute, os.X_OK):
        raise typer.BadParameter(f"{python} is no interpreter", param_hint="--python")
    return absolute


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastllama" / "regress"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What cannot be measured is one line on stderr, and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(CTRL_C) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except (Unavailable, OSError) as error:
        print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(UNAVAILABLE) from None
    except Exception:
        traceback.print_exc()  # a fault of the gate: its exit code must not say that the head is slower
        raise typer.Exit(UNAVAILABLE) from None


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """While open, SIGTERM ends the run as Ctrl-C does, so that worktrees and workers go."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
