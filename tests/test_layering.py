"""The direction of imports: a module imports only modules above it in LAYERS, the kernels none of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastllama"
KERNELS = ROOT / "kernels" / "fastllama_kernels"

LAYERS = (
    "config",
    "rope",
    "masks",
    "cache",
    "ops",
    "model",
    "quantize",
    "checkpoint",
    "tokenizer",
    "sampling",
    "fused",
    "state",
    "graphs",
    "engine",
    "generate",
    "measure",
    "__init__",  # the public names: what comes after may use them, what comes before may not
    "speculate",
    "integrations",
    "serve",
    "cli",
    "__main__",
)
LAZY_IMPORTERS = {"model", "__init__"}  # may import what is below them, but only inside a function
KERNEL_IMPORTERS = {"ops"}  # the one door to fastllama_kernels
KERNEL_IMPORTS = {"fastllama_kernels", "torch", "triton"} | sys.stdlib_module_names


class Import(NamedTuple):
    """One imported module: its dotted name, whether importing the file imports it, and where it stands."""

    name: str
    at_import: bool
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every module that the source of a file of ``package`` imports, in functions and type checks too."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_import, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (Import(f"{base}.{alias.name}", at_import, node.lineno) for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_check(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not lazy)

    yield from visit(ast.parse(source), True)


def is_type_check(node: ast.AST) -> bool:
    """Whether this is an ``if TYPE_CHECKING:`` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def layer_of(dotted: str) -> str:
    """``fastllama.cache.StaticCache`` → ``cache``; a name that is no module is one of the package's own."""
    first = dotted.split(".")[1] if "." in dotted else "__init__"
    return first if first in LAYERS else "__init__"


def violations(module: str, source: str) -> list[str]:
    """What the source of a file of the layer ``module`` imports against the order, one line each."""
    found = []
    for name, at_import, line in imports_of(source, "fastllama"):
        top = name.split(".")[0]
        if top == "fastllama_kernels" and module not in KERNEL_IMPORTERS:
            found.append(f"{module}:{line} imports {name}; only {sorted(KERNEL_IMPORTERS)} may")
        if top != "fastllama" or layer_of(name) == module:
            continue
        downward = LAYERS.index(layer_of(name)) > LAYERS.index(module)
        if downward and (at_import or module not in LAZY_IMPORTERS):
            found.append(f"{module}:{line} imports {name}, which is below it")
    return found


def python_files(folder: Path) -> list[Path]:
    """The Python files in and under a folder."""
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert module in LAYERS, f"{path.name} has no place in LAYERS yet"
    assert not violations(module, path.read_text())


@pytest.mark.parametrize("path", python_files(KERNELS), ids=lambda p: str(p.relative_to(KERNELS)))
def test_kernels_import_torch_triton_and_the_standard_library_alone(path: Path) -> None:
    package = ".".join(["fastllama_kernels", *path.relative_to(KERNELS).parent.parts])
    tops = {found.name.split(".")[0] for found in imports_of(path.read_text(), package)}
    assert tops <= KERNEL_IMPORTS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cache", "from fastllama.model import LlamaForCausalLM"),
        ("cache", "from .model import LlamaForCausalLM"),
        ("cache", "from . import model"),
        ("cache", "import fastllama.model as m"),
        ("cache", "from fastllama import LlamaForCausalLM"),
        ("cache", "def f():\n    from fastllama import model"),
        ("model", "from fastllama.generate import generate"),
        ("model", "class A:\n    from fastllama.generate import generate"),
        ("engine", "import fastllama_kernels.rms_norm"),
    ],
)
def test_an_import_against_the_order_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "from fastllama.cache import StaticCache"),
        ("model", "def f():\n    from fastllama.generate import generate"),
        ("model", "if TYPE_CHECKING:\n    from fastllama.engine import Engine"),
        ("ops", "import fastllama_kernels"),
        ("cli", "import torch\nfrom fastllama import load_tokenizer"),
        ("generate", "import fastllama.generate"),
    ],
)
def test_an_import_along_the_order_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_the_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
