"""docs/reference.md, generated from the docstrings and signatures of fastllama's public names.

python tools/reference.py            write the page
python tools/reference.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main

import fastllama
import fastllama.tokenizer
from fastllama.cli.app import app
from fastllama.integrations.transformers import accelerate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
INTRODUCTION = """\
# Reference

<!-- Generated from docstrings by tools/reference.py: edit those and run `make docs`. -->

Every public name. Whatever is not on this page may change without notice. Shapes are written in brackets: `b` rows of a
batch, `t` tokens, `n` tokens in total, `s` cache slots, `h` query heads, `k` key/value heads, `d` head dimension, `m`
hidden size, `v` vocabulary.
"""
COMMANDS = ("generate", "chat", "info", "quantize")
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?: .*\n?|\n)+)", re.M)
ENTRY = re.compile(r"^(?P<names>\**[\w.]+(?:, \**[\w.]+)*): (?P<text>.*(?:\n[ ].*)*)", re.M)
TITLES = {"Args": "Arguments"}
WIDTH = 120


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## fastllama\n", *_names(fastllama, sorted(fastllama.__all__))]
    parts += ["## fastllama.tokenizer\n", "What `load_tokenizer` returns.\n"]
    parts += _names(fastllama.tokenizer, [name for name in fastllama.tokenizer.__all__ if name != "load_tokenizer"])
    parts += ["## fastllama.integrations.transformers\n", *_function("accelerate", accelerate, level=3)]
    parts += ["## The command line\n", *_commands()]
    return "\n".join(parts)


def _names(module: Any, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        public = getattr(module, name)
        yield from _class(name, public) if inspect.isclass(public) else _function(name, public, level=3)


def _class(name: str, cls: type) -> Iterator[str]:
    yield f"### {name}\n"
    if not issubclass(cls, Exception | dict):
        yield _code(_call(name, cls.__init__, is_method=True))
    yield _prose(inspect.getdoc(cls) or "")
    for member, owner in _members(cls).items():
        found = inspect.getattr_static(owner, member)
        if isinstance(found, property):
            assert found.fget is not None
            settable = " May be set." if found.fset and "may be set" not in str(found.__doc__) else ""
            yield f"#### {name}.{member}\n"
            yield _prose(f"{inspect.getdoc(found)}{settable}")
        else:
            is_method = not isinstance(found, classmethod | staticmethod)
            yield from _function(f"{name}.{member}", getattr(found, "__func__", found), level=4, is_method=is_method)


def _members(cls: type) -> dict[str, type]:
    """The documented public members of a class and of its bases in fastllama, with the class that defines each."""
    found: dict[str, type] = {}
    for owner in cls.__mro__:
        if not owner.__module__.startswith("fastllama"):
            continue
        for name, member in vars(owner).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            is_own = callable(function) and getattr(function, "__name__", None) == name and not inspect.isclass(member)
            if is_own and function.__doc__ and (name == "__call__" or not name.startswith("_")):
                found.setdefault(name, owner)
    return found


def _function(name: str, function: Callable[..., Any], level: int, is_method: bool = False) -> Iterator[str]:
    yield f"{'#' * level} {name.replace('.__call__', '()')}\n"
    if inspect.ismethod(function) or (not is_method and level == 4):
        is_method = True  # a class method's first argument is not given either
    yield _code(_call(name.removesuffix(".__call__"), function, is_method))
    yield _prose(inspect.getdoc(function) or "")


def _call(name: str, function: Any, is_method: bool) -> str:
    """``name(argument: type = default, ...) -> type``, one argument a line where it would be long."""
    signature = inspect.signature(function)
    arguments, has_star = [], False
    for parameter in list(signature.parameters.values())[is_method:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            arguments.append("*")
        has_star = has_star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        arguments.append(_argument(parameter))
    returned = signature.return_annotation
    arrow = "" if returned in (signature.empty, "None", None) else f" -> {_type(returned)}"
    line = f"{name}({', '.join(arguments)}){arrow}"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){arrow}"


def _argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
    return f"{stars}{parameter.name}{kind}{default}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value) if isinstance(value, int | float | tuple | None) else "..."


def _code(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _prose(docstring: str) -> str:
    """A docstring in Markdown: its sections as lists, its roles and double backticks as code."""
    text = SECTION.sub(_section, docstring + "\n")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _section(match: re.Match[str]) -> str:
    title, body = TITLES.get(match[1], match[1]), textwrap.dedent(match[2]).strip()
    if match[1] in ("Returns", "Yields"):
        return f"{title}: {body}\n\n"
    entries = [
        "- " + ", ".join(f"`{name}`" for name in entry["names"].split(", ")) + f": {textwrap.dedent(entry['text'])}"
        for entry in ENTRY.finditer(body)
    ]
    lines = [re.sub(r"\n\s*", "\n  ", entry) for entry in entries]
    return f"{title}:\n\n" + "\n".join(lines) + "\n\n"


def _commands() -> Iterator[str]:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in COMMANDS:
        command = commands[name]
        yield f"### fastllama {name}\n"
        yield _prose(inspect.cleandoc(command.help))
        yield "| option | meaning | default |\n|---|---|---|"
        yield from (_option(option) for option in command.params)
        yield ""
    yield "### fastllama bench\n\nSee [measuring](measuring.md).\n"


def _option(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"| `{option.name}` | {option.help} | |"
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default = option.default if isinstance(option.default, str) else "off" if option.default is False else ""
    if isinstance(option.show_default, str):
        default = option.show_default
    return f"| {names} | {option.help} | {default} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; the exit status."""
    parser = argparse.ArgumentParser(description="docs/reference.md from docstrings.")
    parser.add_argument("--check", action="store_true", help="Exit with 1 if the page is out of date.")
    wanted = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != wanted:
        print(f"{PAGE.name} is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
