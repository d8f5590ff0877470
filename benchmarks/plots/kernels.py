"""The drawing of a kernels record: GB/s of each operation beside the memory's bandwidth, and its part of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..ours import OURS
from .style import (
    FLOOR_COLOR,
    OURS_COLOR,
    Record,
    caption,
    floor_line,
    head,
    new_figure,
    number_text,
    peer_color,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPACING, THICKNESS = 0.25, 0.23  # of the bars of one operation


def kernels_figure(record: Record) -> Figure:
    """A row for each operation of a greedy step, with a bar for fastllama and each reference."""
    entries = [entry for entry in record["kernels"] if entry["calls_per_step"]]
    contenders = [OURS, *dict.fromkeys(name for entry in entries for name in entry["references"])]
    with style():
        figure = new_figure(9.6, 1.9 + 0.56 * len(entries))
        speed, part = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for number, name in enumerate(contenders):
            bars = {"height": THICKNESS, "color": peer_color(number - 1) if number else OURS_COLOR}
            rows = list(_rows(entries, name, (number - (len(contenders) - 1) / 2) * SPACING))
            streams = [(y, found["bandwidth_gb_s"]) for y, entry, found in rows if not entry["in_cache"]]
            speed.barh([y for y, _ in streams], [gb_s for _, gb_s in streams], label=name, **bars)
            part.barh([y for y, *_ in rows], [_step_ms(entry, found) for _, entry, found in rows], **bars)
        _floors(speed, part, entries, record["memory_bandwidth_gb_s"])
        _label(speed, part, entries)
        figure.legend(loc="outside right upper", handlelength=1.4)
        head(figure, "Operations of a decode step", record, f"batch {record['batch']}, {record['live']} live tokens")
        step, floor = record["step_us"] / 1e3, record["floor_us"] / 1e3
        caption(figure, [record], f"these calls alone: {step:.3g} ms a step; the floor: {floor:.3g} ms")
    return figure


def _rows(entries: Sequence[Record], contender: str, offset: float) -> Iterator[tuple[float, Record, Any]]:
    """Where the contender's bar lies, the operation, and the contender's figures of it."""
    for row, entry in enumerate(entries):
        found = entry if contender == OURS else entry["references"].get(contender)
        if found is not None:
            yield row + offset, entry, found


def _step_ms(entry: Record, found: Record) -> float:
    return entry["calls_per_step"] * found["us"]["p50"] / 1e3


def _floors(speed: Axes, part: Axes, entries: Sequence[Record], gb_s: float) -> None:
    """The memory's bandwidth, and what each operation takes of a step at that."""
    floor_line(speed, gb_s, f"memory {number_text(gb_s)}")
    speed.set_xlim(0, 1.18 * max(gb_s, *(entry["bandwidth_gb_s"] for entry in entries if not entry["in_cache"])))
    for row, entry in enumerate(entries):
        if entry["in_cache"]:
            speed.annotate("reads from the cache", (0, row), (4, 0), textcoords="offset points", va="center")
        else:
            floor_ms = entry["calls_per_step"] * entry["bytes"] / gb_s / 1e6
            part.vlines(floor_ms, row - 0.42, row + 0.42, color=FLOOR_COLOR, linestyle="--", linewidth=1.2)


def _label(speed: Axes, part: Axes, entries: Sequence[Record]) -> None:
    speed.set_yticks(range(len(entries)), [f"{entry['label']}\n{entry['shape']}" for entry in entries])
    speed.set_xlabel("GB/s")
    speed.invert_yaxis()
    part.set_xlabel("ms of a step, all layers")
    for axes in (speed, part):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
