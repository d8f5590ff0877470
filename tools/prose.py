"""Words that this project's prose does without, held by ``make lint``.

    python tools/prose.py [FILE ...]      every page and source file that git knows, unless files are named

Prose is the text of Markdown pages outside code; in Python and C++ comments, docstrings and messages: every string with
a space in it; the Makefile as a whole. ``tools/words.txt`` is the part of the list that codespell can hold, which is
single words.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

#: What is not written, and what is written instead.
WORDS = {
    re.compile(rf"\b({words})\b".replace(" ", r"\s+"), re.IGNORECASE): instead
    for words, instead in {
        r"by turns": "interleaved",
        r"beside": "compared with, next to",
        r"so many": "a number, as in: maximum number of tokens",
        r"(?<!math\.)floors?": "bound",
        r"tells?|told": "return, report, say",
        r"draws?|drawn|drawings?|drew": "sample; of a figure, plot",
        r"reckon(s|ed|ing)?": "assume, count on",
    }.items()
}
DOCSTRING_START = re.compile(r"Of\b")
CPP = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.S)  # comments and strings
FILES = ("*.md", "*.py", "*.cpp", "*.h", "Makefile")
CODE = re.compile(r"^```.*?^```$|<!--.*?-->|``[^`]+``|`[^`]+`|\]\([^)]*\)", re.M | re.S)


class Finding(NamedTuple):
    """A word that is not written, where it stands, and what to write instead."""

    line: int
    word: str
    instead: str


def findings(file: Path) -> Iterator[Finding]:
    """The findings in one file, top to bottom."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from sorted({*_in_strings(text), *_in_comments(text)})
    elif file.suffix in (".cpp", ".h"):
        for match in CPP.finditer(text):
            if " " in match[0]:
                yield from _in_prose(match[0], 1 + text.count("\n", 0, match.start()))
    else:
        yield from _in_prose(text, 1)


def _in_prose(text: str, first_line: int) -> Iterator[Finding]:
    text = CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for pattern, instead in WORDS.items():
        for match in pattern.finditer(text):
            yield Finding(first_line + text.count("\n", 0, match.start()), match[0], instead)


def _in_strings(text: str) -> Iterator[Finding]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from _in_prose(node.value, node.lineno)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and DOCSTRING_START.match(docstring):
                yield Finding(node.body[0].lineno, "Of", "a noun or a verb first")


def _in_comments(text: str) -> Iterator[Finding]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from _in_prose(token.string, token.start[0])


def tracked() -> list[Path]:
    """The pages and sources that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FILES, ":!third_party"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def main(names: Iterable[str]) -> int:
    """Print the findings; the exit status, 1 if there are any."""
    files = [Path(name).resolve() for name in names] or tracked()
    found = [(file, finding) for file in files if file != Path(__file__) for finding in findings(file)]
    for file, finding in found:
        print(f"{file.relative_to(ROOT)}:{finding.line}: {finding.word!r}: write {finding.instead}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
