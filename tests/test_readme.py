"""The pages are true: Python runs and prints what they show, commands exist, the tutorial's run, links lead somewhere.

A code block is skipped only where a comment ``<!-- not run: reason -->`` stands before it. A ``text`` block right after
a code block is its expected output.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from fastllama.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
DEMO = ROOT / "fastllama" / "data" / "demo"

BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+? -->\s*\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(\n```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)")
HUB_ID = re.compile(r"""(?P<quote>["'])meta-llama/[\w.-]+(?P=quote)""")
SEPARATORS = {"|", "||", "&&", ";", "&"}

page_param = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Block(NamedTuple):
    """A code block: its code, the line it begins on, whether the page skips it, and the output the page shows."""

    code: str
    line: int
    skipped: bool
    output: str | None = None


def blocks(text: str, language: str) -> list[Block]:
    """The code blocks of a page in one language."""
    return [
        Block(match["code"], text.count("\n", 0, match.start("code")), match["skip"] is not None, match["output"])
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command in a shell snippet, without assignments before them."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in SEPARATORS:
                yield from [words] if words else []
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


def problem_of(command: list[str]) -> str | None:
    """Why a command of ours would not run, or None; other commands are not checked."""
    program, *words = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in words if "=" not in word and word not in targets]
        return f"no target {unknown}" if unknown else None
    if program == "fastllama":
        return problem_of_ours(words)
    if program == "pytest":
        missing = [word for word in words if "/" in word and not (ROOT / word.split("::")[0]).exists()]
        return f"no file {missing}" if missing else None
    if program.startswith("python"):
        path = words[1].replace(".", "/") if words[0] == "-m" else words[0]
        ours = path.endswith(".py") or path.startswith("benchmarks")
        exists = any((ROOT / name).is_file() for name in (path, f"{path}.py", f"{path}/__main__.py"))
        return f"no file {path}" if ours and not exists else None
    return None


def problem_of_ours(words: list[str]) -> str | None:
    """Why ``fastllama WORDS`` would be wrong usage, or None."""
    command, rest = typer.main.get_command(app), words
    while rest and not rest[0].startswith("-") and (subcommands := getattr(command, "commands", None)):
        name, *rest = rest
        if name not in subcommands:
            return f"no command {name}"
        command = subcommands[name]
    if getattr(command, "commands", None) and words[0] == "bench":
        command = command.commands["decode"]  # type: ignore[attr-defined] (what bench runs by default)
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    used = {word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)}
    unknown = used - known - {"-h", "--help"}
    return f"{command.name} has no option {sorted(unknown)}" if unknown else None


def lines_of(text: str) -> list[str]:
    """The lines of an output, without empty ones around it and spaces at the ends of lines."""
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@page_param
def test_python_blocks_run_with_the_demo_checkpoint_and_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(), "python"):
        if block.skipped:
            continue
        code = "\n" * block.line + HUB_ID.sub(repr(str(DEMO)), block.code)
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(page), "exec"), names)
        if block.output is not None:
            assert lines_of(printed.getvalue()) == lines_of(block.output), f"{page.name}, line {block.line}"


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "fastllama"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastllama "$@"\n')
    command.chmod(0o755)
    script = "\n".join(block.code for block in blocks(TUTORIAL.read_text(), "bash") if not block.skipped)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@page_param
def test_commands_of_shell_blocks_exist(page: Path) -> None:
    problems = [
        f"line {block.line}: {' '.join(command)}: {problem}"
        for block in blocks(page.read_text(), "bash") + blocks(page.read_text(), "sh")
        if not block.skipped
        for command in commands(block.code)
        if (problem := problem_of(command))
    ]
    assert problems == []


@page_param
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(page.read_text())]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_blocks_are_found_with_their_lines_and_marks() -> None:
    page = "a\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\ny\n```\n```bash\nls\n```\n"
    assert blocks(page, "python") == [Block("x = 1\n", 2, False), Block("y\n", 7, True)]
    assert [block.code for block in blocks(page, "bash")] == ["ls\n"]


def test_an_output_belongs_to_the_block_right_before_it() -> None:
    page = "```python\nprint(1)\n```\n```text\n1\n```\n\n```python\nx\n```\n\n```text\n2\n```\n"
    assert [block.output for block in blocks(page, "python")] == ["1\n", None]


@pytest.mark.parametrize(
    "line",
    [
        "make demo PROMPT='x y'",
        "$ fastllama generate 'def f(' --max-new-tokens 5 --top-k=3 | head -1",
        "HF_HUB_OFFLINE=1 fastllama bench --peers none --json - && make test  # all of them",
        "fastllama --version",
        "fastllama bench decode --capacity 64",
        "python -m benchmarks.records",
        "fastllama chat -m random:llama-3.2-1b",
        "pip install fastllama",
        "pytest tests/test_readme.py::nothing -k x",
    ],
)
def test_good_commands_have_no_problem(line: str) -> None:
    assert [problem_of(command) for command in commands(line)] == [None] * len(list(commands(line)))


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "fastllama nothing",
        "ls | fastllama generate --nothing 3 x",
        "python benchmarks/nothing.py",
        "python -m benchmarks.nothing",
        "fastllama bench decode --nothing",
        "fastllama bench nothing",
        "fastllama bench --nothing",
        "pytest tests/nothing",
    ],
)
def test_commands_that_do_not_exist_are_found(line: str) -> None:
    assert any(problem_of(command) for command in commands(line))
