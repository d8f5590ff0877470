"""``python -m benchmarks.regress``."""

from .cli import NAME, app

if __name__ == "__main__":
    app(prog_name=NAME)
