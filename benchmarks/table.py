"""The tables of ``fastllama bench decode`` and ``prefill``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .figures import Figures

DECODE_COLUMNS = ("", "TTFT ms", "TPOT ms (p20-p80)", "tok/s", "GB/s", "MBU", "start s", "ours is")
PREFILL_COLUMNS = ("", "TTFT ms (p20-p80)", "prompt tok/s", "TFLOP/s", "start s", "ours is")


def decode_table(comparison: Comparison) -> Group:
    """The floor, a row for each contender, then what the figures are worth."""
    table = empty_table(DECODE_COLUMNS)
    floor_ms, batch = comparison.floor_ms, comparison.workload.batch
    bandwidth = f"{comparison.bandwidth.bytes_per_second / 1e9:.1f}"
    floor = ("floor", "", f"{floor_ms:.3g}", f"{1e3 * batch / floor_ms:.1f}", bandwidth, "100 %", "", "")
    table.add_row(*floor, style="dim")
    for figures in comparison.figures:
        table.add_row(*_decode_cells(comparison, figures))
    lines = [
        f"floor: {comparison.bytes_per_step / 1e6:.1f} MB of weights and live cache a step, at the memory bandwidth of "
        f"this run ({comparison.bandwidth.method}); MBU: percent of it",
        "start: the first run in this process, with what compilation the caches on disk left to do",
        *(["MBU above 100 %: the weights fit the processor's cache"] * any(f.mbu > 1 for f in comparison.figures)),
        *_remarks(comparison),
    ]
    return with_remarks(table, lines)


def prefill_table(comparison: Comparison, flops: float) -> Group:
    """A row for each contender; ``flops`` are the floating-point operations of the prompts' matrix products."""
    table = empty_table(PREFILL_COLUMNS)
    tokens = comparison.workload.batch * comparison.workload.prompt_len
    ours = comparison.figures[0].ttft_ms.p50
    for figures in comparison.figures:
        ms = figures.ttft_ms
        table.add_row(
            figures.name,
            f"{ms.p50:.3g} ({ms.p20:.3g}-{ms.p80:.3g})",
            f"{1e3 * tokens / ms.p50:.1f}",
            f"{flops / ms.p50 / 1e9:.3g}",
            f"{figures.first_run_s:.1f}",
            "" if figures is comparison.figures[0] else f"{ms.p50 / ours:.2f} x",
        )
    return with_remarks(table, _remarks(comparison))


def _decode_cells(comparison: Comparison, figures: Figures) -> tuple[str, ...]:
    ratio = None if figures is comparison.figures[0] else comparison.ratio(figures)
    tpot = figures.tpot_ms
    return (
        figures.name,
        f"{figures.ttft_ms.p50:.3g}",
        f"{tpot.p50:.3g} ({tpot.p20:.3g}-{tpot.p80:.3g})" if tpot else "",
        f"{figures.tokens_per_second:.1f}",
        f"{figures.bandwidth_gb_s:.1f}",
        f"{100 * figures.mbu:.1f} %",
        f"{figures.first_run_s:.1f}",
        f"{ratio:.2f} x" if ratio else "",
    )


def _remarks(comparison: Comparison) -> list[str]:
    parity, after = comparison.parity, comparison.after_warmup
    peak = comparison.peak_memory_bytes
    outcome = "passed" if parity.passed else f"FAILED: {parity.note}"
    return [
        f"parity {outcome}: {parity.best} of {parity.tokens} tokens have the best float32 logit, the others lie at "
        f"most {parity.worst_gap:.2g} below it (allowed: {parity.bound:.2g})",
        f"after warm-up: {after.graphs} compilations, {after.recordings} graph recordings; peak memory "
        f"{'unknown' if peak is None else decimal(peak)}",
        *(line for figures in comparison.figures[1:] for line in _peer_remarks(comparison, figures)),
        *(f"{name} not run: {why}" for name, why in comparison.missing.items()),
    ]


def _peer_remarks(comparison: Comparison, figures: Figures) -> list[str]:
    if figures.parity is None:
        return [f"{figures.name} does not tell its tokens: not checked"]
    if not figures.parity.passed:
        return [f"{figures.name} FAILED parity: {figures.parity.note}"]
    total = comparison.workload.new_tokens
    if figures.same_tokens is not None and figures.same_tokens < total:
        return [f"{figures.name} gave other tokens from token {figures.same_tokens + 1} of {total} on, within rounding"]
    return []


def empty_table(columns: Sequence[str]) -> Table:
    """A table of right-aligned columns; the one without a name holds names and is left-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    return table


def with_remarks(table: Table, lines: Sequence[str]) -> Group:
    """A table and what there is to say on it."""
    return Group(table, *(Text(line, style="dim") for line in lines))
