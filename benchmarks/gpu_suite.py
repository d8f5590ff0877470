"""Everything that is worth measuring on a GPU, in one go: a list of command lines with limits, and one table at the end.

    fastllama bench gpu                        # or, in a checkout: python -m benchmarks.gpu_suite
    fastllama bench gpu --list                 # the plan
    fastllama bench gpu --only 1b --only 8b    # parts of it
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
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 520.0
MARKS = ("gpu", "triton")  # of tests that are worth running on a GPU
USAGE_ERROR, INTERRUPTED = 2, 130
MAX_NOTES, MAX_WIDTH = 30, 160


@dataclass(frozen=True)
class Line:
    """A command of the suite.

    Attributes:
        name: for ``--only``.
        what: one line.
        command: arguments of ``fastllama bench``, or of pytest, with sizes to be filled in.
        expected: seconds that it should take on an H100 or H200.
        limit: seconds after which it is ended.
    """

    name: str
    what: str
    command: str
    expected: float
    limit: float


TESTS = "tests"
FULL = {"1b": "random:llama-3.2-1b", "8b": "random:llama-3.1-8b"} | dict(
    new="96", short="512", long="8192", longest="32672", some="8", many="32", slots="640", long_slots="8320",
    longest_slots="32768",
)  # fmt: skip
TINY = dict.fromkeys(("1b", "8b"), "tiny") | dict(
    new="32", short="16", long="160", longest="320", some="2", many="2", slots="128", long_slots="256",
    longest_slots="384",
)  # fmt: skip
ONE = "decode --model {%s} --new-tokens {new} --prompt-len {short} --capacity {slots} --rounds 3"
LONG = "decode --model {%s} --new-tokens {new} --prompt-len {short},{long} --capacity {long_slots} --rounds 2"
PEERS = " --peers transformers,static,gpt-fast --launches"
LINES = (
    Line(TESTS, "tests marked gpu and triton", "-m 'gpu or triton' -q -rs -p no:cacheprovider", 100, 170),
    Line("1b", "1B shape, batch 1, short context: peers, and what a step launches", ONE % "1b" + PEERS, 70, 150),
    Line("8b", "8B shape, the same", ONE % "8b" + PEERS, 110, 220),
    Line("1b-kernels", "each operation of a step, 1B shape", "kernels --model {1b} --live {short} --rounds 3", 20, 80),
    Line("8b-kernels", "the same, 8B shape", "kernels --model {8b} --live {short} --rounds 3", 25, 80),
    Line(
        "8b-attention", "attention over a cache that no GPU's cache holds",
        "kernels --model {8b} --live {longest} --only attention --rounds 3", 15, 60,
    ),
    Line("8b-batches", "8B shape, larger batches", ONE % "8b" + " --batch {some},{many} --peers none", 45, 110),
    Line("1b-batches", "1B shape, larger batches", ONE % "1b" + " --batch {some},{many} --peers none", 35, 90),
    Line("8b-long", "8B shape, long context, and short in a long cache", LONG % "8b" + " --peers none", 55, 150),
    Line("1b-long", "1B shape, the same, batch 1 to the largest", LONG % "1b" + " --peers none --batch 1,{many}", 60, 150),
    Line(
        "8b-32k", "8B shape, batch 1, 32k tokens",
        "decode --model {8b} --new-tokens {new} --prompt-len {longest} --capacity {longest_slots} --rounds 1 --peers none",
        60, 180,
    ),
    Line("startup", "process start to first token, 1B shape", "startup --model {1b} --peers transformers --rounds 1", 90, 200),
)  # fmt: skip

GOALS_OF = "H200"
#: What a decode in bf16 is to reach there: (model, batch, prompt) → microseconds a step, or a share of the bandwidth.
GOALS = {
    (FULL["1b"], 1, 512): 640.0,
    (FULL["8b"], 1, 512): 3880.0,
    (FULL["1b"], 8, 512): 712.0,
    (FULL["1b"], 32, 512): 824.0,
    (FULL["8b"], 1, 32672): 0.9,
}


def gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the suite itself.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for records and logs. [default: benchmarks/records]")
    ] = None,
    gpt_fast: Annotated[Path | None, typer.Option(metavar="DIR", help="A checkout of gpt-fast.")] = None,
    budget_seconds: Annotated[float, typer.Option(metavar="S", help="Seconds for all lines.")] = BUDGET_SECONDS,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A line to run; may be repeated.")] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Show the lines and leave.")] = False,
) -> None:
    """Measure everything on a GPU in one go."""
    if as_list:
        for line in LINES:
            typer.echo(f"{line.name:13} {line.expected:4.0f} s  {line.what}\n{'':21}{line.command}")
        return
    try:
        folder = _checked(device, tiny, out, gpt_fast, only or [])
    except ValueError as error:
        typer.echo(f"gpu_suite: {error}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside still gets its table
    with tempfile.TemporaryDirectory(prefix="fastllama-gpu-suite-") as workspace:
        suite = Suite(device, folder, Path(workspace), budget_seconds, gpt_fast, tiny)
        code = suite.run([line for line in LINES if not only or line.name in only])
    raise typer.Exit(code)


def _checked(device: str, tiny: bool, out: Path | None, gpt_fast: Path | None, only: Sequence[str]) -> Path:
    """The folder for results; ValueError with one line if the suite cannot run at all."""
    import torch

    if unknown := sorted(set(only) - {line.name for line in LINES}):
        raise ValueError(f"no line is called {', '.join(unknown)}; see --list")
    if device == "cuda" and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise ValueError(
            f"torch {torch.__version__}, built for {built}, sees no CUDA device; --device cpu --tiny tries the suite"
        )
    if gpt_fast and not gpt_fast.is_dir():
        raise ValueError(f"--gpt-fast {gpt_fast}: there is no such folder")
    if out is None:  # what tiny shapes give is no record
        out = Path(tempfile.gettempdir()) / "fastllama-gpu-suite" if tiny else ROOT / "benchmarks" / "records"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from None
    return out.resolve()


@dataclass
class Suite:
    """One run of the suite.

    Attributes:
        device: cuda or cpu.
        out: folder for records and logs.
        workspace: a folder that goes afterwards.
        budget_seconds: for all lines.
        gpt_fast: a checkout of gpt-fast.
        tiny: whether to fill in tiny sizes.
        notes: what failed or was skipped.
    """

    device: str
    out: Path
    workspace: Path
    budget_seconds: float = BUDGET_SECONDS
    gpt_fast: Path | None = None
    tiny: bool = False
    notes: list[str] = field(default_factory=list)

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
        sizes = {**FULL, **(TINY | dict.fromkeys(("1b", "8b"), str(self.workspace / "tiny")) if self.tiny else {})}
        words = shlex.split(line.command.format(**sizes))
        if line.name == TESTS:
            return [sys.executable, "-m", "pytest", *words, *marked_files(ROOT / "tests")]
        places = ["--gpt-fast", str(self.gpt_fast.resolve())] if self.gpt_fast and "gpt-fast" in line.command else []
        common = ["--dtype", "bfloat16", "--device", self.device, "--record", str(self.records), "--quiet"]
        return [sys.executable, "-m", f"{__package__}.cli", *words, *places, *common]

    def environment(self) -> dict[str, str]:
        """Offline, and with this checkout importable where nothing is installed."""
        if not (ROOT / "fastllama_benchmarks").exists() and not (self.workspace / "fastllama_benchmarks").exists():
            (self.workspace / "fastllama_benchmarks").symlink_to(Path(__file__).parent)  # as its tests name it
        own = map(str, (self.workspace, ROOT, ROOT / "kernels"))
        path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_process(
    command: Sequence[str], limit: float, log: Path, env: Mapping[str, str]
) -> tuple[int | None, str]:
    """Run a process and all that it starts for a limited time; its exit status, None if it was ended, and last line."""
    with open(log, "ab") as file:
        offset = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with open(log, "rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
    return code, lines[-1].strip("= ")


def write_tiny_model(folder: Path) -> None:
    """A checkpoint of random weights that every line loads."""
    import torch

    from fastllama import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def file_name(device: str) -> str:
    """What files of this device are called: lowercase letters, digits and hyphens."""
    import torch

    name = f"gpu {torch.cuda.get_device_name()}" if device == "cuda" else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def marked_files(folder: Path) -> list[str]:
    """The test files that mention one of ``MARKS``: others are not even imported, since they may need more packages."""
    wanted = tuple(f"mark.{mark}" for mark in MARKS)
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py")}
    return sorted(str(path) for path, text in texts.items() if any(mark in text for mark in wanted))


# ---- the table -------------------------------------------------------------------------------------------------------


def table(records: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Decodes, operations, then notes, as plain text."""
    import pandas as pd

    from .report import cells, origin, remarks, text

    lines = [origin(records[-1])] if records else ["no records"]
    decodes = [record for record in records if record["kind"] == "decode"]
    launches = {point(record): record for record in records if record["kind"] == "launches"}
    if decodes:
        rows = [_decode_row(record, launches.get(point(record), {})) for record in decodes]
        lines += ["", *text(pd.DataFrame(rows).fillna(""))]
    for record in records:
        if record["kind"] in ("kernels", "startup"):
            lines += ["", f"{record['kind']}, {record['model']}", *text(cells(record))]
    found = [line for each in decodes for line in remarks(each) if " not run: " in line or "FAILED" in line]
    found += [f"{record['model']} {line}" for record in records for line in record.get("disturbed", ())]
    lines += ["", *dict.fromkeys([*notes, *found])][: MAX_NOTES + 1]
    return "\n".join(line[:MAX_WIDTH].rstrip() for line in lines)


def point(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names a decode: model, batch, prompt and slots."""
    return tuple(record.get(name) for name in ("model", "batch", "prompt_len", "capacity"))


def _decode_row(record: Mapping[str, Any], launches: Mapping[str, Any]) -> dict[str, str]:
    from .report import number, percent, times

    model, batch, prompt_len, capacity = point(record)
    row = {
        "decode": f"{Path(model).name} b{batch} {prompt_len}/{capacity}",
        "step us": number(1e3 * record["tpot_ms"]["p50"]),
        "goal": goal(record),
        "bound us": number(1e3 * record["floor_ms"]),
        "MBU": percent(record["mbu"]),
        "tok/s": number(record["tokens_per_second"]),
        "TTFT ms": number(record["ttft_ms"]),
        "parity": "passed" if record["parity"] else "FAILED",
        "compiled": str(record["compiles_after_warmup"]),
        "recorded": str(record["recordings_after_warmup"]),
        "host us": number(launches.get("host_us_per_step")),
        "kernels": number(launches.get("kernels_per_step")),
        "kernel us": number(launches.get("kernel_us_per_step")),
    }
    for name, peer in record["peers"].items():
        row[name.replace("transformers ", "")] = "wrong" if peer.get("parity") is False else times(peer.get("ratio")) or "-"
    return row


def goal(record: Mapping[str, Any]) -> str:
    """What this decode is to reach, and whether it does; empty where nothing is asked."""
    asked = GOALS.get(point(record)[:3])  # pyright: ignore[reportArgumentType]
    gpu = record["environment"].get("gpu")
    if asked is None or not gpu or GOALS_OF not in gpu["name"]:
        return ""
    if asked < 1:
        return f"{100 * asked:.0f}% {'met' if record['mbu'] >= asked else 'missed'}"
    return f"{asked:.0f} {'met' if 1e3 * record['tpot_ms']['p50'] <= asked else 'missed'}"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout that is not installed
    typer.run(gpu)
