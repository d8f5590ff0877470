"""Everything worth measuring on a GPU, in one go: a list of command lines with limits, and one table at the end.

    fastllama bench gpu                        # or, in a checkout: python -m benchmarks.gpu_suite
    fastllama bench gpu --only 1b --only 8b    # parts of it; --list shows all
    fastllama bench gpu --device cpu --tiny    # rehearse the suite itself

Each line runs in a process of its own with a limit of time, so that a crash, a lost device or a hang costs one line.
Records are appended the moment they exist. Lines are in the order of their value; none is started that would not end
within the budget. What failed or was skipped is a line below the table.
"""

from __future__ import annotations

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
BUDGET_SECONDS = 520.0
USAGE_ERROR, INTERRUPTED = 2, 130
MAX_WIDTH = 160
TESTS = "tests"
FULL = {
    "1b": "random:llama-3.2-1b", "8b": "random:llama-3.1-8b", "sizes": "--new-tokens 96 --dtype bfloat16",
    "short": "512", "long": "8192", "longest": "32672", "some": "8", "many": "32",
    "slots": "640", "long_slots": "8320", "longest_slots": "32768",
}  # fmt: skip
TINY = {
    "1b": "tiny", "8b": "tiny", "sizes": "--new-tokens 32 --dtype bfloat16",
    "short": "16", "long": "160", "longest": "320", "some": "2", "many": "2",
    "slots": "128", "long_slots": "256", "longest_slots": "384",
}  # fmt: skip


class Line(NamedTuple):
    """A command of ``fastllama bench``, or of pytest, with sizes to be filled in."""

    name: str
    what: str
    command: str
    expected: float  # seconds that it should take on an H100 or H200
    limit: float  # seconds after which it is ended


def _decode(model: str, options: str) -> str:
    return f"decode --model {{{model}}} {{sizes}} {options}"


PEERS = "--prompt-len {short} --capacity {slots} --rounds 3 --peers transformers,static,gpt-fast --launches"
BATCHES = "--prompt-len {short} --capacity {slots} --rounds 3 --peers none --batch {some},{many}"
LONG = "--prompt-len {short},{long} --capacity {long_slots} --rounds 2 --peers none"
LONGEST = "--prompt-len {longest} --capacity {longest_slots} --rounds 1 --peers none"
LINES = (
    Line(
        TESTS,
        "tests marked gpu and triton",
        "tests --ignore tests/benchmarks -m 'gpu or triton' -q -p no:cacheprovider",
        100,
        170,
    ),
    Line("1b", "1B shape, batch 1, short context: peers, and what a step launches", _decode("1b", PEERS), 70, 150),
    Line("8b", "8B shape, the same", _decode("8b", PEERS), 110, 220),
    Line("1b-kernels", "each operation of a step, 1B shape", "kernels --model {1b} --live {short}", 20, 80),
    Line("8b-kernels", "8B shape, the same", "kernels --model {8b} --live {short}", 25, 80),
    Line("attention", "over 134 MB a layer", "kernels --model {8b} --live {longest} --only attention", 15, 60),
    Line("8b-batches", "8B shape, larger batches", _decode("8b", BATCHES), 45, 110),
    Line("1b-batches", "1B shape, larger batches", _decode("1b", BATCHES), 35, 90),
    Line("8b-long", "8B shape, long context, and short in a long cache", _decode("8b", LONG), 55, 150),
    Line("1b-long", "1B shape, the same, and a large batch", _decode("1b", LONG + " --batch 1,{many}"), 60, 150),
    Line("8b-32k", "8B shape, batch 1, 32k tokens", _decode("8b", LONGEST), 60, 180),
    Line("startup", "process start to first token", "startup --model {1b} --peers transformers --rounds 1", 90, 200),
)


def gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the suite itself.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for records. [default: the package's]")
    ] = None,
    gpt_fast: Annotated[Path | None, typer.Option(metavar="DIR", help="A checkout of gpt-fast.")] = None,
    budget_seconds: Annotated[float, typer.Option(metavar="S", help="Seconds for all lines.")] = BUDGET_SECONDS,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A line to run; may be repeated.")] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Show the lines and leave.")] = False,
) -> None:
    """Measure everything on a GPU in one go."""
    if as_list:
        for line in LINES:
            typer.echo(f"{line.name:11} {line.expected:4.0f} s  {line.what}\n{'':19}{line.command}")
        return
    if problem := _problem(device, gpt_fast, only or []):
        typer.echo(f"gpu_suite: {problem}", err=True)
        raise typer.Exit(USAGE_ERROR)
    # What tiny shapes give is no record.
    records = Path(tempfile.gettempdir()) / "fastllama-gpu-suite" if tiny else ROOT / "benchmarks" / "records"
    folder = (out or records).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside still gets its table
    with tempfile.TemporaryDirectory(prefix="fastllama-gpu-suite-") as workspace:
        suite = Suite(device, folder, Path(workspace), budget_seconds, gpt_fast, tiny)
        code = suite.run([line for line in LINES if not only or line.name in only])
    raise typer.Exit(code)


def _problem(device: str, gpt_fast: Path | None, only: Sequence[str]) -> str | None:
    """Why the suite cannot run at all, in one line."""
    import torch

    if unknown := sorted(set(only) - {line.name for line in LINES}):
        return f"no line is called {', '.join(unknown)}; see --list"
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; --device cpu --tiny tries the suite"
    if gpt_fast and not gpt_fast.is_dir():
        return f"--gpt-fast {gpt_fast}: there is no such folder"
    return None


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
        self._start = time.monotonic()
        stem = f"{file_name(self.device)}-{datetime.now(timezone.utc):%Y-%m-%d}"
        self.records, self.log = self.out / f"{stem}.jsonl", self.out / f"{stem}-log.txt"

    def run(self, lines: Sequence[Line]) -> int:
        """All lines, then the table; 0 where everything that was started succeeded."""
        from .records import read

        before = len(read(self.records)) if self.records.exists() else 0
        if self.tiny:
            write_tiny_model(self.workspace / "tiny")
        code = 0
        try:
            for line in lines:
                code |= not self.attempt(line)
        except KeyboardInterrupt:
            self.notes.append("interrupted")
            code = INTERRUPTED
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
        code, last = run_process(self.command(line), limit, self.log, self.environment())
        if code is None:
            self.notes.append(f"{line.name} ended after {limit:.0f} s, before it was through; see the log")
        elif code or line.name == TESTS:
            self.notes.append(f"{line.name} ended with code {code}: {last}")
        return code == 0

    def command(self, line: Line) -> list[str]:
        """What runs a line."""
        tiny = {**TINY, **dict.fromkeys(("1b", "8b"), str(self.workspace / "tiny"))}
        words = shlex.split(line.command.format(**tiny if self.tiny else FULL))
        if line.name == TESTS:
            return [sys.executable, "-m", "pytest", *words]
        if self.gpt_fast and "gpt-fast" in line.command:
            words += ["--gpt-fast", str(self.gpt_fast.resolve())]
        words += ["--device", self.device, "--record", str(self.records), "--quiet"]
        return [sys.executable, "-m", f"{__package__}.cli", *words]

    def environment(self) -> dict[str, str]:
        """Offline, and with this checkout importable where nothing is installed."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_process(command: Sequence[str], limit: float, log: Path, env: Mapping[str, str]) -> tuple[int | None, str]:
    """Run a process and all that it starts for a limited time; its exit code, None if it was ended, and last line."""
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
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def file_name(device: str) -> str:
    """What files of this device are called: lowercase letters, digits and hyphens."""
    import torch

    name = f"gpu {torch.cuda.get_device_name()}" if device == "cuda" else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(records: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """One table of each kind of record with what has to be said about them, then the notes, as plain text."""
    import pandas as pd

    from .report import cells, origin, point, remarks

    lines = [origin(records[-1])] if records else ["no records"]
    for kind in ("decode", "kernels", "startup"):
        found = [cells(each).assign(run=point(each)) for each in records if each["kind"] == kind]
        if found:
            lines += ["", *pd.concat(found).to_string(index=False).splitlines()]
    for each in records:
        said = remarks(each)
        if each["kind"] != "launches":
            said = [line for line in said if " not run: " in line or "FAILED" in line or "DISTURBED" in line]
        lines += [f"{point(each)}: {line}" for line in said]
    return "\n".join(line[:MAX_WIDTH].rstrip() for line in [*lines, "", *notes])


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout that is not installed
    typer.run(gpu)
