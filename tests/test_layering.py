"""The direction of imports: a folder imports only folders above it in LAYERS, the kernels none of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastllama"
KERNELS = ROOT / "kernels" / "fastllama_kernels"
BENCHMARKS = ROOT / "benchmarks"

LAYERS = (
    "version",
    "ops",
    "config",
    "model",
    "quantization",
    "loading",
    "tokenizer",
    "engine",
    "generation",
    "causal_lm",
    "measure",
    "__init__",  # the public names: what comes after may use them, what comes before may not
    "integrations",
    "cli",
    "__main__",
    "fastllama_benchmarks",  # found by an entry point; nothing of fastllama imports it
)
KERNEL_IMPORTERS = {"ops"}  # the one door to fastllama_kernels
KERNEL_IMPORTS = {"fastllama_kernels", "filelock", "torch", "triton"} | sys.stdlib_module_names


def imports_of(source: str, package: str) -> Iterator[tuple[str, int]]:
    """Every module that the source of a file of ``package`` imports, in functions and type checks too, and its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(dotted: str) -> str:
    """``fastllama.model.cache`` → ``model``; a name that is no module is one of the package's own."""
    if dotted.split(".")[0] == "fastllama_benchmarks":
        return "fastllama_benchmarks"
    first = dotted.split(".")[1] if "." in dotted else "__init__"
    return first if first in LAYERS else "__init__"


def violations(layer: str, source: str, package: str = "fastllama") -> list[str]:
    """What the source of a file of this layer imports against the order, one line each."""
    found = []
    for name, line in imports_of(source, package):
        top = name.split(".")[0]
        if top == "fastllama_kernels" and layer not in KERNEL_IMPORTERS:
            found.append(f"{layer}:{line} imports {name}; only {sorted(KERNEL_IMPORTERS)} may")
        if top in ("fastllama", "fastllama_benchmarks") and LAYERS.index(layer_of(name)) > LAYERS.index(layer):
            found.append(f"{layer}:{line} imports {name}, which is below it")
    return found


def python_files(folder: Path) -> list[Path]:
    """The Python files in and under a folder."""
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    layer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert layer in LAYERS, f"{path.name} has no place in LAYERS yet"
    package = ".".join(["fastllama", *path.relative_to(PACKAGE).parent.parts])
    assert not violations(layer, path.read_text(), package)


@pytest.mark.parametrize(
    ("root", "name"), [(PACKAGE, "fastllama"), (KERNELS, "fastllama_kernels"), (BENCHMARKS, "fastllama_benchmarks")]
)
def test_no_two_modules_import_each_other(root: Path, name: str) -> None:
    files = {}
    for path in python_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join([name, *parts]).removesuffix(".__init__")] = path
    imported = {}
    for module, path in files.items():
        package = ".".join([name, *path.relative_to(root).parent.parts])
        names = {name for name, _ in imports_of(path.read_text(), package)}
        imported[module] = {name if name in files else name.rpartition(".")[0] for name in names} & set(files)
    cleared: set[str] = set()
    while free := [module for module in imported if module not in cleared and not imported[module] - cleared]:
        cleared.update(free)
    assert not set(imported) - cleared, "these import each other in a circle"


@pytest.mark.parametrize("path", python_files(KERNELS), ids=lambda p: str(p.relative_to(KERNELS)))
def test_kernels_import_torch_triton_and_the_standard_library_alone(path: Path) -> None:
    package = ".".join(["fastllama_kernels", *path.relative_to(KERNELS).parent.parts])
    assert {name.split(".")[0] for name, _ in imports_of(path.read_text(), package)} <= KERNEL_IMPORTS


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("model", "from fastllama.causal_lm import LlamaForCausalLM"),
        ("model", "from ..causal_lm import LlamaForCausalLM"),
        ("model", "from .. import causal_lm"),
        ("model", "import fastllama.causal_lm as m"),
        ("model", "from fastllama import LlamaForCausalLM"),
        ("model", "def f():\n    from fastllama import engine"),
        ("model", "if TYPE_CHECKING:\n    from fastllama.engine.runner import Runner"),
        ("engine", "import fastllama_kernels.linear.op"),
        ("cli", "import fastllama_benchmarks"),
        ("cli", "def f():\n    from fastllama_benchmarks.cli import app"),
    ],
)
def test_an_import_against_the_order_is_seen(layer: str, source: str) -> None:
    assert len(violations(layer, source, f"fastllama.{layer}")) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("model", "from fastllama.model.cache import StaticCache"),
        ("model", "from .cache import StaticCache"),
        ("engine", "def f():\n    from fastllama.model import llama"),
        ("ops", "import fastllama_kernels"),
        ("cli", "import torch\nfrom fastllama import load_tokenizer"),
    ],
)
def test_an_import_along_the_order_is_allowed(layer: str, source: str) -> None:
    assert violations(layer, source, f"fastllama.{layer}") == []


def test_the_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
