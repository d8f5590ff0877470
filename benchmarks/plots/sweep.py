"""The drawing of a sweep: a column for each axis, tokens per second beside the floor above, MBU below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ours import OURS
from ..sweep import AXES, BATCH, CAPACITY, DTYPES, LIVE, PRECISION, QUANTIZATIONS
from .style import FLOOR_COLOR, OURS_COLOR, Record, caption, head, new_figure, peer_color, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = "floor"
GAP_COLOR = "#f3e3da"
AXIS_LABELS = {
    BATCH: "sequences decoded together",
    LIVE: "live tokens in each row",
    CAPACITY: "slots of the KV cache",
    PRECISION: "precision",
}
LOG_SPAN = 8  # largest over smallest value from which an axis is logarithmic


def sweep_figure(records: Sequence[Record]) -> Figure:
    """A column for each axis that the records have, at least one record."""
    axes_names = [axis for axis in AXES if any(record["sweep"] == axis for record in records)]
    colors = _colors(records)
    with style():
        figure = new_figure(max(4.1 * len(axes_names), 6.2), 5.6)
        grid = figure.subplots(2, len(axes_names), squeeze=False, sharex="col", height_ratios=(3, 2))
        for column, axis in enumerate(axes_names):
            points = [record for record in records if record["sweep"] == axis]
            _column(grid[0, column], grid[1, column], axis, points, colors)
        grid[0, 0].set_ylabel("tokens per second")
        grid[1, 0].set_ylabel("MBU, %")
        handles = {
            name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", handlelength=1.4)
        head(figure, "Decoding", records[0], "")
        remark = "floor: weights and live cache of a step at the memory bandwidth of the same run"
        absent = dict.fromkeys(name for record in records for name in record["peers"] if name not in colors)
        caption(figure, records, remark + (f"; not drawn, not run or wrong: {', '.join(absent)}" if absent else ""))
    return figure


def _column(speed: Axes, mbu: Axes, axis: str, points: list[Record], colors: Mapping[str, str]) -> None:
    if axis == PRECISION:
        points = sorted(points, key=lambda record: _rank(record["sweep_value"]))
        xs = list(range(len(points)))
        _speed_bars(speed, xs, points, colors)
    else:
        points = sorted(points, key=lambda record: record["sweep_value"])
        xs = [record["sweep_value"] for record in points]
        _speed_curves(speed, xs, points, colors)
        mbu.set_xscale("log", base=2)
        mbu.minorticks_off()
    _mbu_panel(mbu, xs, points)
    mbu.set_xticks(xs, [_tick(record["sweep_value"]) for record in points])
    mbu.set_xlabel(AXIS_LABELS[axis])
    speed.set_title(_fixed(axis, points[0]))


def _speed_curves(axes: Axes, xs: Sequence[float], points: Sequence[Record], colors: Mapping[str, str]) -> None:
    ours, floors = _speeds(points, OURS), [_floor(record) for record in points]
    axes.fill_between(xs, ours, floors, color=GAP_COLOR, linewidth=0)
    axes.plot(xs, floors, color=FLOOR_COLOR, linestyle="--", label=FLOOR)
    axes.plot(xs, ours, color=OURS_COLOR, marker="o", markersize=4, label=OURS)
    shown = [*ours, *floors]
    for name, color in colors.items():
        theirs = _speeds(points, name)
        axes.plot(xs, theirs, color=color, marker=".", linewidth=1, label=name)
        shown += [value for value in theirs if not math.isnan(value)]
    if max(shown) > LOG_SPAN * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(0, 1.12 * max(shown))


def _speed_bars(axes: Axes, xs: Sequence[float], points: Sequence[Record], colors: Mapping[str, str]) -> None:
    series = {OURS: OURS_COLOR, **colors}
    width = 0.8 / len(series)
    for number, (name, color) in enumerate(series.items()):
        at = [x + (number - (len(series) - 1) / 2) * width for x in xs]
        axes.bar(at, _speeds(points, name), width=0.92 * width, color=color, label=name)
    for x, record in zip(xs, points, strict=True):
        label = FLOOR if x == 0 else ""
        axes.hlines(_floor(record), x - 0.45, x + 0.45, color=FLOOR_COLOR, linestyle="--", label=label)
    axes.set_ylim(0)
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)


def _mbu_panel(axes: Axes, xs: Sequence[float], points: Sequence[Record]) -> None:
    percents = [100 * record["mbu"] for record in points]
    if points[0]["sweep"] == PRECISION:
        axes.bar(xs, percents, width=0.5, color=OURS_COLOR)
        axes.grid(axis="x", visible=False)
    else:
        axes.plot(xs, percents, color=OURS_COLOR, marker="o", markersize=4)
    for x, percent in zip(xs, percents, strict=True):
        axes.annotate(f"{percent:.0f}", (x, percent), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(100, color=FLOOR_COLOR, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.18 * max(100, *percents))


def _colors(records: Sequence[Record]) -> dict[str, str]:
    """A colour for each peer that counts at some point."""
    names = dict.fromkeys(name for record in records for name, peer in record["peers"].items() if _counts(peer))
    return {name: peer_color(number) for number, name in enumerate(names)}


def _speeds(points: Sequence[Record], name: str) -> list[float]:
    """Tokens per second at each point; NaN where a peer did not run, or gave wrong tokens."""
    entries = points if name == OURS else [record["peers"].get(name, {}) for record in points]
    return [entry["tokens_per_second"] if _counts(entry) else math.nan for entry in entries]


def _counts(peer: Record) -> bool:
    return "tokens_per_second" in peer and peer["parity"] is not False


def _rank(precision: str) -> int:
    known = (*DTYPES, *QUANTIZATIONS)
    return known.index(precision) if precision in known else len(known)


def _fixed(axis: str, record: Record) -> str:
    """What stays the same along an axis."""
    live = record["prompt_len"] + record["new_tokens"] // 2
    parts = {BATCH: f"batch {record['batch']}", LIVE: f"{live} live", PRECISION: record["dtype"]}
    return ", ".join(text for name, text in parts.items() if name != axis)


def _floor(record: Record) -> float:
    return 1e3 * record["batch"] / record["floor_ms"]


def _tick(value: Any) -> str:
    """2048 → 2k; names and small numbers as they are."""
    if isinstance(value, str):
        return value
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
