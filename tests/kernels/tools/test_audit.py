"""The machine code of the Triton kernels, compiled for chips that are not here; in processes that do not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastllama_kernels.__main__ import main
from fastllama_kernels.tools.audit import CHIPS, Finding, programs_per_multiprocessor, width

GOOD = Finding(
    name="x", arch=90, registers=64, spills=0, shared_bytes=1024, programs=8, widest_load=16, widest_store=16,
    narrowest_weight_load=16, matrix_instructions=0, pdl_instructions=2, is_dependent=True, wants_pdl=True,
    writes_early=False, reads_early=False, weights_are_late=False,
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastllama_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_shipped_kernel_is_free_of_faults(arch) -> None:
    done = run("audit", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    *kernels, verdict = done.stdout.splitlines()[1:]
    assert verdict == "no faults"
    parts = ("q/k/v", "attention", "output", "gate/up", "rms_norm", "silu_mul", "rotary_write", "race", "settle")
    for part in (*parts, "ban_ngrams"):
        assert any(part in line for line in kernels), part


def test_an_unknown_chip_is_refused_in_one_line() -> None:
    done = run("audit", "--arch", "sm_70")
    assert done.returncode == 2
    assert "sm_70" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"spills": 3}, ["spills (3)"]),
        ({"shared_bytes": 1 << 20}, ["1048576 bytes of shared memory, the chip has fewer"]),
        ({"narrowest_weight_load": 8}, ["weights are loaded 8 bytes at a time"]),
        ({"narrowest_weight_load": 0}, ["weights are loaded 0 bytes at a time"]),
        ({"narrowest_weight_load": None}, []),
        ({"pdl_instructions": 1}, ["no programmatic dependent launch"]),
        ({"is_dependent": False}, ["no programmatic dependent launch"]),
        ({"pdl_instructions": 0, "is_dependent": False, "wants_pdl": False}, []),
        ({"writes_early": True}, ["memory is touched before the kernel waits for the one before it"]),
        ({"reads_early": True}, ["memory is touched before the kernel waits for the one before it"]),
        ({"weights_are_late": True}, ["no weights are on their way when the kernel waits"]),
    ],
    ids=str,
)
def test_what_must_not_be_is_a_fault(changed, said) -> None:
    assert replace(GOOD, **changed).faults == said


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (3, 1)])
def test_a_fault_makes_the_command_fail(monkeypatch, capsys, spills, code) -> None:
    monkeypatch.setattr("fastllama_kernels.tools.audit.audit", lambda archs, workers: [replace(GOOD, spills=spills)])
    assert main(["audit", "--arch", "sm_90"]) == code
    assert ("fault: spills (3)" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("instruction", "nbytes"),
    [
        ("ld.global.L1::evict_first.v4.b32", 16),
        ("ld.global.v2.b64", 16),
        ("ld.global.b16", 2),
        ("st.global.v4.b32", 16),
        ("ld.global.b32", 4),
        ("ld.global.f32", 4),
    ],
)
def test_widths_are_read_from_instructions(instruction, nbytes) -> None:
    assert width(instruction) == nbytes


def test_how_many_programs_fit_is_the_tightest_of_the_limits() -> None:
    assert programs_per_multiprocessor(CHIPS[90], registers=32, warps=4, shared_bytes=0) == 16
    assert programs_per_multiprocessor(CHIPS[90], registers=129, warps=4, shared_bytes=0) == 3
    assert programs_per_multiprocessor(CHIPS[90], registers=32, warps=4, shared_bytes=100 << 10) == 2
    assert programs_per_multiprocessor(CHIPS[90], registers=32, warps=1, shared_bytes=0) == 32
