"""The table of ``fastllama bench`` and ``fastllama generate --table``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastllama.compare import Comparison
    from fastllama.measure import Figures

COLUMNS = ("", "first token", "per token (p20-p80)", "tokens/s", "MBU", "ours is")


def comparison_table(comparison: Comparison) -> Group:
    """A row for each contender, the floor beneath, then what the figures are worth."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for figures in comparison.figures:
        table.add_row(*_cells(comparison, figures))
    floor_ms = comparison.floor_ms
    table.add_row("floor", "", f"{floor_ms:.3g} ms", f"{1e3 / floor_ms:.1f}", "100 %", style="dim")
    return Group(table, *(Text(line, style="dim") for line in _remarks(comparison)))


def _cells(comparison: Comparison, figures: Figures) -> tuple[str, ...]:
    ours = figures is comparison.figures[0]
    return (
        figures.name,
        f"{figures.ttft_ms:.3g} ms",
        f"{figures.tpot_ms.p50:.3g} ms ({figures.tpot_ms.p20:.3g}-{figures.tpot_ms.p80:.3g})",
        f"{figures.tokens_per_second:.1f}",
        f"{100 * figures.mbu:.1f} %",
        "" if ours else f"{comparison.ratio(figures):.2f} x",
    )


def _remarks(comparison: Comparison) -> list[str]:
    bandwidth = comparison.bandwidth
    gb_per_second = bandwidth.bytes_per_second / 1e9
    lines = [
        f"floor: reading {comparison.bytes_per_step / 1e6:.1f} MB of weights and cache a token",
        f"MBU: bytes read over the memory bandwidth, {gb_per_second:.1f} GB/s ({bandwidth.method})",
    ]
    if any(figures.mbu > 1 for figures in comparison.figures):
        lines.append("MBU above 100 %: the weights fit the processor's cache")
    lines += [
        f"{figures.name} gave other tokens from token {figures.same_tokens + 1} of {figures.tokens} on"
        for figures in comparison.figures
        if figures.same_tokens < figures.tokens
    ]
    return lines + [f"{name} not run: {reason}" for name, reason in comparison.skipped.items()]
