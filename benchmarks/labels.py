"""What people are told of a record's origin: machine, software, commit, day, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

#: Options that name places or say where results go: they do not decide what is measured.
OUTPUT_FLAGS = {"--quiet", "-q", "--debug"}
OUTPUT_OPTIONS = {"--json", "--record", "--plot", "--out", "--records", "--workspace", "--profile"}
PLACE_OPTIONS = {"--gpt-fast": "DIR", "--llama-bench": "PATH"}
RENAMED = {"--step": "--only"}  # the GPU suite's processes are told one step each


def machine(record: Mapping[str, Any]) -> str:
    """The GPU, or the processor and how many threads torch used."""
    environment = record["environment"]
    if environment["gpu"]:
        return str(environment["gpu"]["name"])
    threads = environment["threads"]
    return f"{environment['cpu']}, {threads} thread{'s' * (threads != 1)}"


def software(record: Mapping[str, Any]) -> str:
    """torch's version, and CUDA's where it was used."""
    environment = record["environment"]
    torch = f"torch {environment['packages']['torch']}"
    return f"{torch}, CUDA {environment['gpu']['cuda']}" if environment["gpu"] else torch


def revision(record: Mapping[str, Any]) -> str:
    """The commit, and whether the tree differed from it."""
    commit = record["environment"]["commit"]
    if not commit:
        return "of an unknown commit"
    return f"commit {commit[:9]}" + (" with changes" if record["environment"]["dirty"] else "")


def day(record: Mapping[str, Any]) -> str:
    """The date of the measurement, UTC."""
    return record["time"][:10]


def command(record: Mapping[str, Any]) -> str:
    """The command that measured it, without where its results went and with no path of the machine's."""
    program, *words = record["environment"]["argv"]
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in OUTPUT_FLAGS:
            continue
        if name in OUTPUT_OPTIONS or name in PLACE_OPTIONS:
            if not equals:
                next(rest, None)
            kept += [name, PLACE_OPTIONS[name]] if name in PLACE_OPTIONS else []
        else:
            kept.append(RENAMED.get(word, word))
    return shlex.join([*_program(program), *kept])


def _program(name: str) -> list[str]:
    """How to start what ``sys.argv[0]`` names."""
    if name == "__main__.py":
        return ["fastllama"]
    return ["python", "-m", f"benchmarks.{name.removesuffix('.py')}"] if name.endswith(".py") else [name]
