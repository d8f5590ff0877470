"""Everything that is worth measuring on a GPU, in one go that is meant to take less than nine minutes on an H200.

    python -m benchmarks.gpu_suite                        # in a checkout: nothing has to be installed but its libraries
    python -m benchmarks.gpu_suite --list                 # the plan
    python -m benchmarks.gpu_suite --only 1b kernels      # parts of it
    python -m benchmarks.gpu_suite --device cpu --tiny    # rehearse the suite itself

Every step runs in a process of its own with a limit of time, so that a crash, a lost device or a hang costs one step.
Records are appended the moment they exist. Steps are in the order of their value; none is started that would not end
within the budget. What failed or was skipped is a line in the table that it ends in.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
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

from .gpu.plan import STEPS, TESTS, Step

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
BUDGET_SECONDS = 520.0
MEMORY_SHARE = 0.75  # of the device that rehearsals may take together: the tests run beside them
NOTE = "note: "
REHEARSAL_SECONDS = 120.0
MARKS = ("gpu", "triton")  # of tests that are worth running on a GPU
USAGE_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or with ``--step`` one step of it; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        return _tell("\n".join(f"{step.name:16} {step.expected:4.0f} s  {step.what}" for step in STEPS))
    _make_importable()
    if options.step:
        return _run_step(options)
    if problem := _problem(options):
        sys.stderr.write(f"gpu_suite: {problem}\n")
        return USAGE_ERROR
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside still gets its table
    with tempfile.TemporaryDirectory(prefix="fastllama-gpu-suite-") as workspace:
        return Suite(options, Path(workspace)).run()


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser("gpu_suite", description="Measure fastllama on a GPU, beside its peers.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the suite itself")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for records and logs; else benchmarks/records")
    parser.add_argument("--gpt-fast", type=Path, metavar="DIR", help="a checkout of gpt-fast")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS, metavar="S")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these steps alone; see --list")
    parser.add_argument("--list", action="store_true", help="show the steps and leave")
    for hidden in ("step", "workspace", "records", "profile"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    return parser


def _make_importable() -> None:
    """Let a checkout's own packages be found where none are installed."""
    for package, folder in (("fastllama", ROOT), ("fastllama_kernels", ROOT / "kernels")):
        if importlib.util.find_spec(package) is None:
            sys.path.append(str(folder))


def _problem(options: argparse.Namespace) -> str | None:
    """Why the suite cannot run at all, in one line."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        return f"torch {torch.__version__}, built for {built}, sees no CUDA device; --device cpu --tiny tries the suite"
    if options.gpt_fast and not options.gpt_fast.is_dir():
        return f"--gpt-fast {options.gpt_fast}: there is no such folder"
    if options.out is None:  # what tiny shapes give is no record
        options.out = Path(tempfile.gettempdir()) / "fastllama-gpu-suite" if options.tiny else RECORDS
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {options.out}: {error.strerror}"
    return None


def _run_step(options: argparse.Namespace) -> int:
    import torch

    from .gpu.steps import Task, run

    return run(
        Task(
            options.step,
            torch.empty(0, device=options.device).device,  # with its index, as a model's
            options.tiny,
            Path(options.workspace),
            Path(options.records),
            Path(options.profile),
            options.gpt_fast,
            options.rehearse,
        )
    )


def _tell(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


class Process:
    """A process and those it starts, with its output in a file.

    Args:
        command: to run.
        log: what it writes is appended here.
        env: its environment.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._log, self._is_over = log, False
        self._offset = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None where it took longer and was ended."""
        try:
            return self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """End it, if it runs, and whatever it has started."""
        if self._is_over:
            return
        self._is_over = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        """What has been written to the file since it was started."""
        with open(self._log, "rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")


@dataclass
class Suite:
    """One run of the suite.

    Args:
        options: of the command.
        workspace: a folder that goes afterwards.
    """

    options: argparse.Namespace
    workspace: Path
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        out, device = self.options.out.resolve(), self.options.device
        name = "gpu-" * (device == "cuda") + file_name(device_name(device))
        stem = out / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}"
        self.records = Path(f"{stem}.jsonl")
        self.log, self.pytest_log, self.profile = (Path(f"{stem}-{what}.txt") for what in ("log", "pytest", "profile"))
        for file in (self.log, self.pytest_log, self.profile):
            file.unlink(missing_ok=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the suite was started."""
        return time.monotonic() - self._start

    def run(self) -> int:
        """All steps, then the table; 0 where everything that was started succeeded."""
        from .gpu.table import report
        from .records import RecordError, read

        try:
            before = len(read(self.records)) if self.records.exists() else 0
        except RecordError as error:
            sys.stderr.write(f"gpu_suite: {error}; records cannot be added there\n")
            return USAGE_ERROR
        if self.options.tiny:
            from .gpu.steps import write_tiny_model

            write_tiny_model(self.workspace)
        steps = [step for step in STEPS if not self.options.only or step.name in self.options.only]
        code = 0
        try:
            for step in steps:
                code |= not self._attempt(step, steps)
        except KeyboardInterrupt:
            self.notes.append("interrupted")
            code = INTERRUPTED
        spent = [f"{name} {seconds:.0f}" for name, seconds in (self.seconds | {"in all": self.elapsed}).items()]
        self.notes.append(f"seconds: {', '.join(spent)}")
        self.notes.append(f"in {self.records.parent}: {', '.join(self._files()) or 'nothing'}")
        records = read(self.records)[before:] if self.records.exists() else []
        table = report(records, self.notes)
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"\n{table}\n")
        _tell(table)
        return code

    def _attempt(self, step: Step, steps: Sequence[Step]) -> bool:
        """Run a step if the budget allows; whether it succeeded or was rightly left out."""
        left = max(self.options.budget_seconds - self.elapsed, 0.0)
        if step.expected > left:
            self.notes.append(f"{step.name} skipped: it takes about {step.expected:.0f} s, {left:.0f} s are left")
            return True
        _tell(f"[{self.elapsed:4.0f} s] {step.name}: {step.what}")
        start = time.monotonic()
        limit = min(step.limit, left)
        code = self._test(limit, steps) if step.name == TESTS else self._measure(step, limit)
        self.seconds[step.name] = time.monotonic() - start
        if code is None:
            self.notes.append(f"{step.name} ended after {limit:.0f} s, before it was through; see the log")
        return code == 0

    def _measure(self, step: Step, limit: float) -> int | None:
        process = Process(self._command(step), self.log, self._environment())
        try:
            code = process.wait(limit)
        finally:
            said = process.said()
            found = [line.removeprefix(NOTE) for line in said.splitlines() if line.startswith(NOTE)]
            self.notes += found
        if code and not found:
            lines = said.strip().splitlines() or ["it wrote nothing"]
            self.notes.append(f"{step.name} ended with code {code}: {lines[-1]}")
        return code

    def _test(self, limit: float, steps: Sequence[Step]) -> int | None:
        """The tests that need a GPU, and beside them the compilations of the steps to come."""
        deadline = time.monotonic() + min(limit, REHEARSAL_SECONDS)
        rehearsed = self._rehearsed(steps)
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // max(len(rehearsed), 1)))}
        rehearsals = {
            step.name: Process([*self._command(step), "--rehearse"], self.log, self._environment() | threads)
            for step in rehearsed
        }
        try:
            code = self._run_tests(limit)
            codes = {name: process.wait(deadline - time.monotonic()) for name, process in rehearsals.items()}
        finally:
            for process in rehearsals.values():
                process.end()
        if unready := [name for name, status in codes.items() if status != 0]:
            self.notes.append(f"not compiled beforehand: {', '.join(unready)}; see the log")
        return code

    def _rehearsed(self, steps: Sequence[Step]) -> list[Step]:
        """The steps to compile beforehand: as many as the device's memory holds together. None on a CPU."""
        if self.options.device != "cuda":
            return []
        import torch

        room, chosen = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory / 1e9, []
        for step in steps:
            if step.is_rehearsed and step.gigabytes <= room:
                room -= step.gigabytes
                chosen.append(step)
        return chosen

    def _run_tests(self, limit: float) -> int | None:
        files = marked_files(ROOT / "tests")
        if importlib.util.find_spec("pytest") is None or not files:
            self.notes.append(
                "tests not run: " + ("none is marked for a GPU here" if not files else "there is no pytest")
            )
            return 0
        if importlib.util.find_spec("fastllama_benchmarks") is None:  # a checkout that is not installed
            (self.workspace / "fastllama_benchmarks").symlink_to(ROOT / "benchmarks")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            " or ".join(MARKS),
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            *files,
        ]
        process = Process(command, self.pytest_log, self._environment())
        code = process.wait(limit)
        lines = process.said().strip().splitlines() or ["pytest wrote nothing"]
        self.notes.append(f"tests: {lines[-1].strip('= ')}")
        return code

    def _command(self, step: Step) -> list[str]:
        """What runs a step."""
        options = self.options
        files = {"workspace": self.workspace, "records": self.records, "profile": self.profile}
        return [
            *(sys.executable, "-m", f"{__package__}.gpu_suite", "--step", step.name, "--device", options.device),
            *(["--tiny"] if options.tiny else []),
            *(["--gpt-fast", str(options.gpt_fast.resolve())] if options.gpt_fast else []),
            *(argument for name, path in files.items() for argument in (f"--{name}", str(path))),
        ]

    def _environment(self) -> dict[str, str]:
        from .remote import worker_environment

        return worker_environment(self.workspace, ROOT, ROOT / "kernels") | {"HF_HUB_OFFLINE": "1"}

    def _files(self) -> list[str]:
        found = (self.records, self.log, self.pytest_log, self.profile)
        return [file.name for file in found if file.exists()]


def device_name(device: str) -> str:
    """What the device is called."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def file_name(name: str) -> str:
    """A name of lowercase letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def marked_files(folder: Path) -> list[str]:
    """The test files that mention one of ``MARKS``: others are not even imported, since they may need more packages."""
    wanted = tuple(f"mark.{mark}" for mark in MARKS)
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py")}
    return sorted(str(path) for path, text in texts.items() if any(mark in text for mark in wanted))


if __name__ == "__main__":
    sys.exit(main())
