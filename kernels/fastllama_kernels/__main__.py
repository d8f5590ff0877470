"""``python -m fastllama_kernels``: builds the C++ kernels; the Triton kernels' machine code, model and tile sizes.

build: compiles the C++ kernels into the package, so that no start has to.
audit: registers, spills, load widths and the like of every kernel; exits with 1 where something must not be.
plan: bytes, bound and predicted time of a decode step, kernel by kernel.
tune: measures tile sizes on the GPU that is here and writes the table that every launch reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m fastllama_kernels",
        description="The build of the C++ kernels; machine code, model and tile sizes of the Triton kernels.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add, said) in COMMANDS.items():
        command = commands.add_parser(name, help=said)
        if name in arguments[:1]:  # others import what this one may do without
            add(command)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        parser.error(str(error))


def _add_build(parser: argparse.ArgumentParser) -> None:
    said = "instruction sets: own, all, or names with commas [default: own, the best of this processor]"
    parser.add_argument("--levels", default="own", metavar="LIST", help=said)
    parser.set_defaults(run=_build)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    from fastllama_kernels.tools import audit

    default, known = ["sm_80", "sm_90", "sm_100"], [f"sm_{arch}" for arch in audit.CHIPS]
    said = f"compute capabilities [default: {' '.join(default)}]"
    parser.add_argument("--arch", nargs="+", default=default, choices=known, help=said)
    parser.add_argument("--workers", type=_positive, default=2, help="processes that compile [default: 2]")
    parser.set_defaults(run=_audit)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from fastllama_kernels.linear import triton as gemv
    from fastllama_kernels.tools import plan, step

    shapes, gpus, dtypes = list(step.SHAPES), list(plan.GPUS), DTYPES
    said = "sizes of the model [default: llama-3.2-1b]"
    parser.add_argument("--shape", default="llama-3.2-1b", choices=shapes, help=said)
    parser.add_argument("--gpu", default="h200", choices=gpus, help="the GPU [default: h200]")
    said = "dtype of weights and cache [default: bfloat16]"
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help=said)
    parser.add_argument("--batch", type=_positive, default=1, help=f"rows, at most {gemv.MAX_ROWS} [default: 1]")
    parser.add_argument("--live", type=_positive, default=512, help="tokens of each row in the cache [default: 512]")
    parser.set_defaults(run=_plan)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from fastllama_kernels.tools import step, tune

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


COMMANDS = {
    "build": (_add_build, "the C++ kernels, compiled into the package"),
    "audit": (_add_audit, "machine code of every kernel"),
    "plan": (_add_plan, "bytes, bound and predicted time of a step"),
    "tune": (_add_tune, "measurement of tile sizes on the GPU of this machine"),
}


def _build(options: argparse.Namespace) -> int:
    from fastllama_kernels.common import build, levels

    try:
        found = build.install(levels.named(options.levels))
    except (OSError, RuntimeError) as error:
        print(f"the C++ kernels could not be built: {error}", file=sys.stderr)
        return 1
    for level, result in found.items():
        print(f"{level.name:12}{result}", flush=True)
    return int(any(isinstance(result, str) for result in found.values()))


def _audit(options: argparse.Namespace) -> int:
    from fastllama_kernels.tools import audit

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
    import torch

    from fastllama_kernels.tools import plan, step

    gpu = plan.GPUS[options.gpu]
    source = "measured copy" if gpu.is_measured else "nine tenths of the data sheet"
    print(f"{options.shape}, {options.dtype}, batch {options.batch}, {options.live} live tokens")
    print(f"{options.gpu}: {gpu.bandwidth / 1e12:.2f} TB/s ({source})")
    print(_line("", ("launches", "MB", "bound us", "model us"), ""))
    dtype = getattr(torch, options.dtype)
    for row in plan.rows(step.SHAPES[options.shape], gpu, dtype, options.batch, options.live):
        cells = (row.launches, f"{row.nbytes / 1e6:.1f}", f"{row.bound * 1e6:.1f}", f"{row.predicted * 1e6:.1f}")
        print(_line("", cells, row.name))
    return 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    from fastllama_kernels.tools import tune

    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and torch sees none; audit and plan work without one")
    for line in tune.tune(options.shapes, torch.device("cuda", torch.cuda.current_device()), options.out):
        print(line, flush=True)
    return 0


def _line(first: str, cells: Sequence[object], last: str) -> str:
    return f"{first:8}{''.join(f'{cell!s:>9}' for cell in cells)}  {last}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
