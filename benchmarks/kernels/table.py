"""The table of ``fastllama bench kernels``."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group

from ..ours import OURS
from ..table import empty_table, with_remarks
from .cycles import WORKING_SET
from .measure import INDUCTOR, KernelFigures, KernelReport
from .ops import PLAIN, TORCH

COLUMNS = ("", "calls", "MB", "us (p20-p80)", "GB/s", "MBU", TORCH, PLAIN)


def kernels_table(report: KernelReport) -> Group:
    """A row for each operation, then the step that they make up and what the figures are worth."""
    table = empty_table(COLUMNS)
    for kernel in report.kernels:
        table.add_row(*_cells(kernel, report.bandwidth.bytes_per_second))
    return with_remarks(table, list(_remarks(report)))


def _cells(kernel: KernelFigures, bytes_per_second: float) -> tuple[str, ...]:
    what = (kernel.info.label, str(kernel.info.calls), f"{kernel.info.nbytes / 1e6:.3g}")
    if not kernel.us:
        return (*what, "WRONG", "", "", "", "")
    us, achieved = kernel.us[OURS], kernel.bytes_per_second()
    return (
        *what,
        f"{_digits(us.p50)} ({_digits(us.p20)}-{_digits(us.p80)})",
        f"{achieved / 1e9:.1f}",
        "cache" if kernel.info.in_cache else f"{100 * achieved / bytes_per_second:.0f} %",
        *(f"{kernel.ratio(name):.2f} x" if name in kernel.us else "" for name in (TORCH, PLAIN)),
    )


def _remarks(report: KernelReport) -> Iterator[str]:
    gb_s = report.bandwidth.bytes_per_second / 1e9
    yield (
        f"MB: what a call reads; MBU: percent of the memory bandwidth of this run, {gb_s:.1f} GB/s "
        f"({report.bandwidth.method}); {TORCH}, {PLAIN}: their time over ours"
    )
    compiled = [kernel.info.label for kernel in report.kernels if kernel.implementation == INDUCTOR]
    yield f"torch operators fused by Inductor: {'; '.join(compiled)}" if compiled else "all are kernels of fastllama"
    step, torch_step, floor = report.step_us(), report.step_us(TORCH), report.floor_us
    if step is not None and torch_step is not None:
        yield (
            f"a greedy step of these calls alone: {step / 1e3:.3g} ms, of torch's {torch_step / 1e3:.3g} ms; floor: "
            f"{floor / 1e3:.3g} ms, {100 * floor / step:.0f} % of the first"
        )
        yield "outputs are as near to float64 as torch's: within twice its error or one rounding"
    for kernel in report.kernels:
        label, check = kernel.info.label, kernel.check
        if not check.passed:
            yield f"{label} is WRONG by {check.error:.3g}, allowed are {check.bound:.3g}: not timed"
        elif not kernel.info.in_cache and kernel.working_set < WORKING_SET:
            yield f"{label}: copies of {kernel.working_set / 1e6:.0f} MB in all, which a cache may hold"


def _digits(us: float) -> str:
    """Three digits, or all there are before the point."""
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"
