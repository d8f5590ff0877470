"""The gate's command: ``fastllama-regress``, ``fastllama bench regress``, ``python -m benchmarks.regress``.

Exits with 0 when the head is not slower, 1 when it is slower or its outputs differ, 2 when it could not be measured, 3
with ``--strict`` when the outcome is inconclusive, 130 after Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import CTRL_C, progress, stderr, stdout

from . import MIN_ROUNDS, ROUNDS_TO_FAIL

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from .gate import Result
    from .rounds import Metric

FAILED, UNAVAILABLE, INCONCLUSIVE = 1, 2, 3
NAME = "fastllama-regress"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastllama" / "regress"

Metrics = Annotated[str, typer.Option(help="tpot-bN or ttft-bN for a batch of N, with commas.")]
Threshold = Annotated[str, typer.Option(help="Slowdown in percent, or auto: 3, on a CPU more if it is noisy.")]
Accept = Annotated[bool, typer.Option("--accept-different-outputs", help="Time revisions whose outputs differ.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each process.", show_default="all cores")]
Summary = Annotated[Path | None, typer.Option(envvar="GITHUB_STEP_SUMMARY", help="File to append the report to.")]
Slowdown = Annotated[float, typer.Option(min=0, help="Percent by which the head's steps are made longer, as a proof.")]
SkipOldBase = Annotated[bool, typer.Option("--skip-old-base", help="Exit with 0 when the base cannot be measured.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def regress(
    base: Annotated[str, typer.Option(help="Revision to compare with: a branch, a tag, a commit.")],
    head: Annotated[str, typer.Option(help="Revision to judge; . is the checkout as it is.")] = ".",
    repo: Annotated[Path, typer.Option(help="A folder in the repository.")] = Path(),
    model: options.Model = "demo",
    dtype: Annotated[str, typer.Option(help="Dtype that is timed; outputs are compared in float32.")] = "bfloat16",
    device: options.Device = None,
    metrics: Metrics = "tpot-b1,ttft-b1,tpot-b4",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=MIN_ROUNDS, help="Rounds of fresh processes.")] = 3,
    max_rounds: Annotated[int, typer.Option(min=ROUNDS_TO_FAIL, help="Maximum rounds while inconclusive.")] = 12,
    turns: Annotated[int, typer.Option(min=2, help="Decodes of each process in a round.")] = 8,
    minutes: Annotated[float, typer.Option(min=0, help="Time limit for more rounds than --rounds, in minutes.")] = 15.0,
    threshold: Threshold = "auto",
    accept_different_outputs: Accept = False,
    python: Annotated[Path | None, typer.Option(help="Interpreter of both.", show_default="this one")] = None,
    threads: Threads = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for worktrees and what was compiled.")] = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Markdown file to write.")] = None,
    json_file: options.JsonFile = None,
    summary: Summary = None,
    slowdown: Slowdown = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when inconclusive.")] = False,
    skip_old_base: SkipOldBase = False,
    quiet: options.Quiet = False,
) -> None:
    """Fail when one revision of fastllama decodes slower than another."""
    asked = dict(locals())
    from ..workload import Unavailable

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that worktrees and workers go
    try:
        asked |= {"cache": (cache_dir or CACHE).resolve(), "metrics": _metrics(metrics)}
        asked |= {"threshold": _threshold(threshold), "python": _interpreter(python), "slowdown": slowdown / 100}
        asked |= {"device": options.pick_device(device), "max_rounds": max(rounds, max_rounds)}
        found = _run(asked, skip_old_base, quiet)
        _publish(found, report_file, json_file, summary)
    except KeyboardInterrupt:
        raise typer.Exit(CTRL_C) from None
    except (Unavailable, OSError) as error:
        print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(UNAVAILABLE) from None
    except typer.BadParameter:
        raise
    except Exception:
        traceback.print_exc()  # a fault of the gate: its exit code must not say that the head is slower
        raise typer.Exit(UNAVAILABLE) from None
    if not isinstance(found, str) and (found.failed or (strict and found.undecided)):
        raise typer.Exit(FAILED if found.failed else INCONCLUSIVE)


def _run(asked: dict[str, Any], skip_old_base: bool, quiet: bool) -> Result | str:
    from . import gate

    settings = gate.Settings(**{each.name: asked[each.name] for each in dataclasses.fields(gate.Settings)})
    try:
        with progress(quiet) as say:
            return gate.run(settings, say)
    except gate.BaseUnavailable as error:
        if not skip_old_base:
            raise
        return str(error)


def _publish(result: Result | str, report_file: Path | None, json_file: str | None, summary: Path | None) -> None:
    from ..environment import environment
    from . import report

    if isinstance(result, str):
        stdout().print(f"not measured: {result}", markup=False)
        markdown, found = f"## Latency: not measured: {result}\n", None
    else:
        machine = environment(next((info["device_type"] for info in result.info.values()), "cpu"))
        report.show(result, stderr() if json_file == "-" else stdout())
        markdown = report.markdown(result, machine, shlex.join([NAME, *sys.argv[1:]]))
        found = json.dumps(report.to_dict(result, machine), ensure_ascii=False, allow_nan=False) + "\n"
    for path, text, mode in ((report_file, markdown, "w"), (summary, markdown, "a"), (json_file, found, "w")):
        if path == "-" and text:
            sys.stdout.write(text)
        elif path and text:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, mode, encoding="utf-8") as file:
                file.write(text)


def _metrics(names: str) -> tuple[Metric, ...]:
    from .rounds import Metric

    try:
        return tuple(dict.fromkeys(Metric.parse(name.strip()) for name in names.split(",")))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--metrics") from None


def _threshold(text: str) -> float | None:
    with suppress(ValueError):
        if text == "auto":
            return None
        if 0 < (percent := float(text.rstrip("% "))) < 1000:
            return percent / 100
    raise typer.BadParameter(f"{text!r} is neither a number of percent nor auto", param_hint="--threshold")


def _interpreter(python: Path | None) -> Path:
    absolute = Path(os.path.abspath(python or sys.executable))
    if not os.access(absolute, os.X_OK):
        raise typer.BadParameter(f"{python} is no interpreter", param_hint="--python")
    return absolute
