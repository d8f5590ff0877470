"""The latency gate: is one revision slower than another, on this machine, now?

    python -m benchmarks.regress --base main --head .

Each round starts two fresh processes of the base and two of the head, which take turns at the same decodes. What two
processes of equal code differ by is the machine's noise; what the head differs by beyond that, in every round, is the
revision's doing. ``docs/benchmarks.md`` tells how to read the report.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``fastllama-regress`` command."""
    from .cli import main as command  # not at the top: the workers import this package too, and need none of it

    command()
