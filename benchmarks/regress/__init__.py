"""The latency gate: is one revision slower than another, on this machine, now? ``docs/measuring.md`` explains it."""

MIN_ROUNDS = 3  # below, an interval says little
ROUNDS_TO_FAIL = 5  # nobody should be stopped by less
