"""Everything worth measuring on a GPU, in one go: ``gpu_suite.json``, command lines with limits, then one table.

Each line runs in a process of its own, so that a crash, a lost device or a hang costs one line, and none is started
that would not end within the budget; what failed or was skipped is a line below the table. ``--device cpu --tiny``
rehearses the suite; ``python -m benchmarks.gpu_suite`` runs it in a checkout that is not installed.
"""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a checkout that is not installed
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastllama.cli.console import CTRL_C  # noqa: E402

from .records import read  # noqa: E402

BUDGET_SECONDS = 520.0
MAX_WIDTH = 160
TESTS = "tests"


class Line(NamedTuple):
    """A command of ``fastllama bench``, or of pytest, with sizes to be filled in."""

    name: str
    expected: float  # seconds that it should take on an H100 or H200
    limit: float  # seconds after which it is ended
    what: str
    command: str


@functools.cache
def plan() -> dict[str, Any]:
    """The lines, and the sizes for them: ``full``, or ``tiny`` ones for a model of ``tiny_model``."""
    from fastllama.config.fields import read_json

    found = read_json(Path(__file__).with_suffix(".json"))
    return found | {"lines": [Line(**line) for line in found["lines"]]}


def gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the suite itself.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for records.", show_default="the package's")
    ] = None,
    gpt_fast: Annotated[Path | None, typer.Option(metavar="DIR", help="A checkout of gpt-fast.")] = None,
    budget_seconds: Annotated[float, typer.Option(metavar="S", help="Seconds for all lines.")] = BUDGET_SECONDS,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A line to run; may be repeated.")] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Show the lines and leave.")] = False,
) -> None:
    """Measure everything on a GPU in one go."""
    lines = plan()["lines"]
    if as_list:
        for line in lines:
            typer.echo(f"{line.name:11} {line.expected:4.0f} s  {line.what}\n{'':19}{line.command}")
        return
    if unknown := sorted(set(only or ()) - {line.name for line in lines}):
        raise typer.BadParameter(f"no line is called {', '.join(unknown)}; see --list", param_hint="--only")
    if gpt_fast and not gpt_fast.is_dir():
        raise typer.BadParameter(f"there is no folder {gpt_fast}", param_hint="--gpt-fast")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} sees no CUDA device; --device cpu --tiny tries the suite")
    # What tiny shapes give is no record.
    records = Path(tempfile.gettempdir()) / "fastllama-gpu-suite" if tiny else ROOT / "benchmarks" / "records"
    folder = (out or records).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside still gets its table
    with tempfile.TemporaryDirectory(prefix="fastllama-gpu-suite-") as workspace:
        suite = Suite(device, folder, Path(workspace), budget_seconds, gpt_fast, tiny)
        code = suite.run([line for line in lines if not only or line.name in only])
    raise typer.Exit(code)


@dataclass
class Suite:
    """One run of the suite."""

    device: str
    out: Path  # for records and logs
    workspace: Path  # goes afterwards
    budget_seconds: float = BUDGET_SECONDS
    gpt_fast: Path | None = None
    tiny: bool = False
    notes: list[str] = field(default_factory=list)  # what failed or was skipped

    def __post_init__(self) -> None:
        import torch

        self._start = time.monotonic()
        device = f"gpu {torch.cuda.get_device_name()}" if self.device == "cuda" else self.device
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        stem = f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}"
        self.records, self.log = self.out / f"{stem}.jsonl", self.out / f"{stem}-log.txt"

    def run(self, lines: Sequence[Line]) -> int:
        """All lines, then the table; 0 where everything that was started succeeded."""
        before = len(read(self.records)) if self.records.exists() else 0
        if self.tiny:
            write_tiny_model(self.workspace / "tiny")
        code = 0
        try:
            for line in lines:
                code |= not self.attempt(line)
        except KeyboardInterrupt:
            self.notes.append("interrupted")
            code = CTRL_C
        self.notes.append(f"{time.monotonic() - self._start:.0f} s in all; records and log in {self.out}")
        typer.echo(table(read(self.records)[before:] if self.records.exists() else [], self.notes))
        return code

    def attempt(self, line: Line) -> bool:
        """Run a line if the budget allows; whether it succeeded or was rightly left out."""
        elapsed = time.monotonic() - self._start
        left = max(self.budget_seconds - elapsed, 0.0)
        if line.expected > left:
            self.notes.append(f"{line.name} skipped: it takes about {line.expected:.0f} s, {left:.0f} s are left")
            return True
        typer.echo(f"[{elapsed:4.0f} s] {line.name}: {line.what}")
        limit = min(line.limit, left)
        code, last = run_process(self.command(line), limit, self.log)
        if code is None:
            self.notes.append(f"{line.name} ended after {limit:.0f} s, before it was through; see the log")
        elif code or line.name == TESTS:
            self.notes.append(f"{line.name} ended with code {code}: {last}")
        return code == 0

    def command(self, line: Line) -> list[str]:
        """What runs a line."""
        sizes, tiny = plan()["full"], {**plan()["tiny"], **dict.fromkeys(("1b", "8b"), str(self.workspace / "tiny"))}
        words = shlex.split(line.command.format(**tiny if self.tiny else sizes))
        if line.name == TESTS:
            return [sys.executable, "-m", "pytest", *words]
        if self.gpt_fast and "gpt-fast" in line.command:
            words += ["--gpt-fast", str(self.gpt_fast.resolve())]
        words += ["--device", self.device, "--record", str(self.records), "--quiet"]
        return [sys.executable, "-m", f"{__package__}.cli", *words]


def run_process(command: Sequence[str], limit: float, log: Path) -> tuple[int | None, str]:
    """Run a process and all that it starts for a limited time; its exit code, None if it was ended, and last line."""
    # A checkout is importable where nothing is installed.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as file:
        offset = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_bytes()[offset:].decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
    return code, lines[-1].strip("= ")


def write_tiny_model(folder: Path) -> None:
    """A checkpoint of random weights that every line loads."""
    import torch

    from fastllama import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**plan()["tiny_model"])).bfloat16().save_pretrained(folder)


def table(records: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """One table of each kind of record with what has to be said about them, then the notes, as plain text."""
    import pandas as pd

    from .report import cells, origin, point, remarks

    lines = [origin(records[-1])] if records else ["no records"]
    for kind in ("decode", "kernels", "startup"):
        if found := [cells(each).assign(run=point(each)) for each in records if each["kind"] == kind]:
            lines += ["", *pd.concat(found).to_string(index=False).splitlines()]
    for each in records:
        said = remarks(each)
        if each["kind"] != "launches":
            said = [line for line in said if " not run: " in line or "FAILED" in line or "DISTURBED" in line]
        lines += [f"{point(each)}: {line}" for line in said]
    return "\n".join(line[:MAX_WIDTH].rstrip() for line in [*lines, "", *notes])


if __name__ == "__main__":
    typer.run(gpu)
