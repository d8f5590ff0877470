"""``python -m fastllama_kernels``: the kernels' machine code, a model of the step, and the table of tile sizes.

audit: registers, spills, load widths and the like of every kernel; exits with 1 where something must not be.
plan: bytes, bound and predicted time of a decode step, kernel by kernel.
tune: measures tile sizes on the GPU that is here and writes the table that every launch reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.tools import audit, plan, step, tune

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllama_kernels",
        description="The kernels' machine code, a model of the step, and the table of tile sizes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_audit(commands.add_parser("audit", help="machine code of every kernel"))
    _add_plan(commands.add_parser("plan", help="bytes, bound and predicted time of a step"))
    _add_tune(commands.add_parser("tune", help="measurement of tile sizes on the GPU of this machine"))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        parser.error(str(error))


def _add_audit(parser: argparse.ArgumentParser) -> None:
    default, known = ["sm_80", "sm_90", "sm_100"], [f"sm_{arch}" for arch in audit.CHIPS]
    said = f"compute capabilities [default: {' '.join(default)}]"
    parser.add_argument("--arch", nargs="+", default=default, choices=known, help=said)
    parser.add_argument("--workers", type=_positive, default=2, help="processes that compile [default: 2]")
    parser.set_defaults(run=_audit)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    shapes, gpus, dtypes = list(step.SHAPES), list(plan.GPUS), list(DTYPES)
    said = "sizes of the model [default: llama-3.2-1b]"
    parser.add_argument("--shape", default="llama-3.2-1b", choices=shapes, help=said)
    parser.add_argument("--gpu", default="h200", choices=gpus, help="the GPU [default: h200]")
    said = "dtype of weights and cache [default: bfloat16]"
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help=said)
    parser.add_argument("--batch", type=_positive, default=1, help=f"rows, at most {gemv.MAX_ROWS} [default: 1]")
    parser.add_argument("--live", type=_positive, default=512, help="tokens of each row in the cache [default: 512]")
    parser.set_defaults(run=_plan)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    shapes = list(step.SHAPES)
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes, help="sizes of models [default: all]")
    said = "file of the table [default: the one of this package]"
    parser.add_argument("--out", type=Path, default=tune.FILE, help=said)
    parser.set_defaults(run=_tune)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _audit(options: argparse.Namespace) -> int:
    faults = 0
    header = ("regs", "spills", "shared", "per SM", "load", "store", "weights", "mma", "pdl")
    print(_line("arch", header, "kernel"))
    for found in audit.audit([int(arch.removeprefix("sm_")) for arch in options.arch], options.workers):
        weights = "" if found.narrowest_weight_load is None else found.narrowest_weight_load
        cells = (
            found.registers, found.spills, found.shared_bytes, found.programs, found.widest_load, found.widest_store,
            weights, found.matrix_instructions, found.pdl_instructions,
        )  # fmt: skip
        print(_line(f"sm_{found.arch}", cells, found.name), flush=True)
        for fault in found.faults:
            faults += 1
            print(f"  fault: {fault}", flush=True)
    print(f"{faults} faults" if faults else "no faults")
    return 1 if faults else 0


def _plan(options: argparse.Namespace) -> int:
    gpu = plan.GPUS[options.gpu]
    source = "measured copy" if gpu.is_measured else "nine tenths of the data sheet"
    print(f"{options.shape}, {options.dtype}, batch {options.batch}, {options.live} live tokens")
    print(f"{options.gpu}: {gpu.bandwidth / 1e12:.2f} TB/s ({source})")
    print(_line("", ("launches", "MB", "bound us", "model us"), ""))
    for row in plan.rows(step.SHAPES[options.shape], gpu, DTYPES[options.dtype], options.batch, options.live):
        cells = (row.launches, f"{row.nbytes / 1e6:.1f}", f"{row.bound * 1e6:.1f}", f"{row.predicted * 1e6:.1f}")
        print(_line("", cells, row.name))
    return 0


def _tune(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and torch sees none; audit and plan work without one")
    for line in tune.tune(options.shapes, torch.device("cuda", torch.cuda.current_device()), options.out):
        print(line, flush=True)
    return 0


def _line(first: str, cells: Sequence[object], last: str) -> str:
    return f"{first:8}{''.join(f'{cell!s:>9}' for cell in cells)}  {last}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
