"""The pytest-benchmark suite runs, and checks what it times."""

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "test_latency.py"


@pytest.mark.slow
def test_every_benchmark_of_the_suite_passes_its_check_of_outputs() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", str(SUITE)]
    done = subprocess.run(command, cwd=SUITE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
