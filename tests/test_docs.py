"""The pages match the source: files they name exist, messages they quote are raised, the reference is up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOW_IT_WORKS = (ROOT / "docs" / "how-it-works.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
GAP = "…"  # for a name or a number, in messages and in pages
SOURCES = ("fastllama", "kernels/fastllama_kernels")
ROOMS = (*SOURCES, "benchmarks")


def tool(name: str) -> ModuleType:
    """A script of tools/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the rooms -----------------------------------------------------------------------------------------------------


def rooms() -> set[str]:
    """The files that the tables of how-it-works.md give a line to, as paths in the repository."""
    found = set()
    for section in HOW_IT_WORKS.split("\n### ")[1:]:
        folder, _, body = section.partition("\n")
        if folder in ROOMS:
            rows = re.findall(r"^\| (`.*?) \|", body, re.M)
            found |= {f"{folder}/{name}" for row in rows for name in re.findall(r"`([^`]+)`", row)}
    return found


def test_every_file_with_a_room_exists() -> None:
    assert rooms()
    assert [path for path in sorted(rooms()) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("folder", ROOMS)
def test_every_file_has_a_room(folder: str) -> None:
    files = [file for suffix in ("py", "cpp", "h") for file in (ROOT / folder).rglob(f"*.{suffix}")]
    paths = {str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"}
    assert sorted(paths - rooms()) == []


# ---- messages ------------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every string of the library, the kernels and the Makefile, with a gap for what is put in at run time."""
    files = [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]
    return [text for file in files for text in strings(file.read_text())] + [(ROOT / "Makefile").read_text()]


def strings(source: str) -> Iterator[str]:
    """The strings of a Python source; the gaps of f-strings and of logging's format stand as GAP."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdr]", GAP, node.value)


def is_raised(quoted: str, known: list[str]) -> bool:
    """Whether some message holds the parts of a quoted line between its gaps, in order."""
    parts = [re.escape(part.strip()) for part in re.split(f"[{GAP}\n]", quoted) if part.strip()]
    pattern = re.compile(".*?".join(parts), re.S)
    return any(pattern.search(message) for message in known)


def test_the_messages_that_troubleshooting_quotes_are_in_the_source() -> None:
    known = messages()
    quoted = [
        line
        for block in re.findall(r"^```text\n(.*?)^```$", TROUBLESHOOTING, re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(quoted) > 10
    assert [line for line in quoted if not is_raised(line, known)] == []


def test_a_quoted_message_is_compared_around_its_gaps() -> None:
    known = list(strings('raise ValueError(f"got {x} rows, " f"expected {y}")\nlog.info("%d of %s", a, b)'))
    assert is_raised("got … rows, expected …", known)
    assert is_raised("… of …", known)
    assert not is_raised("expected … rows", known)


# ---- generated and linted ------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert tool("reference").main(["--check"]) == 0, "run `make docs`"


def test_sections_of_a_docstring_become_lists() -> None:
    prose = tool("reference")._prose(
        "Do it.\n\nArgs:\n    x, y: ``int``,\n        both.\n\nRaises:\n    ValueError: never."
    )
    assert prose == "Do it.\n\nArguments:\n\n- `x`, `y`: `int`,\n  both.\n\nRaises:\n\n- `ValueError`: never.\n"


@pytest.mark.parametrize(
    ("name", "text", "words", "found"),
    [
        ("a.md", "One {}, one {}.\n", ["by\nturns", "TOLD"], ["TOLD", "by\nturns"]),
        ("a.md", "`{0}` and\n```\n{0}\n```\nthe {0}\n", ["floor"], ["floor"]),
        ("a.py", '"""Of x."""\n\nx = "{0}"\ny = "the {0}"  # {1}\n', ["floor", "draws"], ["Of", "draws", "floor"]),
        ("a.h", '// {0}\nint {0}; /*\n{1} */ f("a {0}", "{1}");\n', ["floor", "told"], ["floor", "floor", "told"]),
        ("Makefile", "{0}: ## {1} a file\n", ["all", "draw"], ["draw"]),
        ("a.py", '"""Math: math.{0} of x; a {0}ing."""\nx = _{1}({1}=1)\n', ["floor", "draw"], []),
    ],
)
def test_the_prose_linter_finds_words_in_prose_only(
    tmp_path: Path, name: str, text: str, words: list[str], found: list[str]
) -> None:
    (tmp_path / name).write_text(text.format(*words))
    assert sorted(finding.word for finding in tool("prose").findings(tmp_path / name)) == found
