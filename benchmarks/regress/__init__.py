"""The latency gate: is one revision slower than another, on this machine, now?

    python -m benchmarks.regress --base main --head .

Each round starts two fresh processes of the base and two of the head, interleaved on the same decodes. What two
processes of equal code differ by is the machine's noise; what the head differs by beyond that, in every round, is the
revision's doing. ``docs/measuring.md`` explains the report.
"""

from __future__ import annotations

MIN_ROUNDS = 3  # below, an interval says little
ROUNDS_TO_FAIL = 5  # nobody should be stopped by less


def main() -> None:
    """Entry point of the ``fastllama-regress`` command."""
    from .cli import NAME, app

    app(prog_name=NAME)
