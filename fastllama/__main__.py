"""``python -m fastllama`` is the ``fastllama`` command."""

from __future__ import annotations

from fastllama.cli import main

if __name__ == "__main__":
    main()
