"""What is imported when: nothing heavy before it is used, and every public name all the same."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastllama
from fastllama import ops

OPTIONAL = ("transformers", "pandas", "matplotlib", "scipy")
USED_LATER = ("torch._dynamo", "torch._inductor", "jinja2", "gguf", "sentencepiece", "tokenizers", "huggingface_hub")
COMMAND = """
from fastllama.cli import main
sys.argv = ["fastllama", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
"""


def imported(code: str, *arguments: str) -> tuple[set[str], str]:
    """The modules that a process has imported after running some code, and what it has printed."""
    code = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


@pytest.mark.parametrize("arguments", [(), *((name,) for name in ("generate", "chat", "info", "quantize", "bench"))])
def test_help_imports_no_torch_and_no_command_that_is_not_named(arguments: tuple[str, ...]) -> None:
    modules, shown = imported(COMMAND, *arguments, "--help")
    assert "Usage: fastllama" in shown
    assert not {"torch", "numpy", "rich", "pydantic", *OPTIONAL, *USED_LATER} & modules
    if arguments != ("bench",):
        assert "fastllama_benchmarks.cli" not in modules


def test_the_help_lists_the_commands_of_entry_points_and_they_list_theirs() -> None:
    _, shown = imported(COMMAND, "--help")
    assert "bench  " in shown
    assert "Measure decoding against peers" in shown
    _, shown = imported(COMMAND, "bench", "--help")
    assert {"decode", "startup", "regress"} <= set(shown.split())


def test_the_package_alone_imports_nothing() -> None:
    modules, _ = imported("import fastllama; assert fastllama.__version__")
    assert not {"torch", "numpy", *OPTIONAL, *USED_LATER} & modules


def test_the_public_names_import_nothing_that_only_some_calls_use() -> None:
    modules, _ = imported("from fastllama import *")
    assert "torch" in modules
    assert not {*OPTIONAL, *USED_LATER} & modules


def test_a_tokenizer_imports_the_library_of_its_own_file_alone() -> None:
    modules, _ = imported("from fastllama import load_tokenizer; load_tokenizer('demo')('x')")
    assert "sentencepiece" in modules  # the demo has a tokenizer.model
    assert "fastllama.tokenizer.json_backend" not in modules
    assert not {"jinja2", "gguf", *OPTIONAL} & modules


def test_every_public_name_is_the_one_of_its_module_and_type_checkers_see_the_same() -> None:
    tree = ast.parse(Path(fastllama.__file__).read_text())
    seen = [
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastllama.")
        for alias in node.names
    ]
    assert sorted(name for name, _ in seen if name != "__version__") == sorted(fastllama.__all__)
    for name, module in seen:
        assert getattr(fastllama, name) is getattr(importlib.import_module(module), name)
        assert name in dir(fastllama)


def test_modules_are_attributes_and_other_names_are_not() -> None:
    code = "import fastllama; assert fastllama.config.LlamaConfig is fastllama.LlamaConfig"
    imported(code)
    with pytest.raises(AttributeError, match="no attribute 'Llama2'"):
        fastllama.Llama2  # noqa: B018


def test_what_runs_is_a_constant_for_the_compiler_as_torch_would_mark_it() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked)
    assert vars(marked).items() <= vars(ops._index).items()
