"""Starts the worker of this very package by path, in an interpreter that may see another package of the same name.

    PYTHONPATH=TREE:TREE/kernels python start.py --tree TREE --model demo ...

A worktree holds a ``benchmarks`` folder of its own revision, and that revision's must not be the one that measures. So
this file loads the package it lies in under a name that nothing else has, whatever ``sys.path`` says.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

RUNNER = "fastllama_regress_runner"


def main() -> None:
    """Import the worker and hand over to it."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]  # its files are no top level
    package = here.parent
    spec = importlib.util.spec_from_file_location(
        RUNNER, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[RUNNER] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module(f"{RUNNER}.regress.worker").main()


if __name__ == "__main__":
    main()
