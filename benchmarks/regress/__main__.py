"""``python -m benchmarks.regress``."""

from . import main

if __name__ == "__main__":
    main()
