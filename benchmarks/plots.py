"""Drawings of records, from the frame of :mod:`.report`: decodes as bars or over a grid, operations as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .contenders import FASTLLAMA
from .report import BOUND, Record, frame, origin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: dict[str, Any] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
DPI = 150
COLORS = ("#0b6e8f", "#8c959f", "#5f6a75", "#b6a6ca", "#7a9a6b", "#c9a15a")
BOUND_COLOR = "#b3461e"
AXES = {"batch": "sequences decoded together", "prompt_len": "tokens of the prompt", "capacity": "slots of the KV cache"}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "fastllama",  # equal records give equal files
}


class PlotError(ValueError):
    """A drawing cannot be made; the message is one line."""


def ready(path: Path | None) -> None:
    """See to it that a drawing can be made later, before anything is measured; None asks for none."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError('--plot needs matplotlib: pip install "fastllama[bench]"') from error
    if path.suffix.lower() not in FORMATS:
        raise PlotError(f"cannot draw {path.name}: expected a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise PlotError(f"cannot draw {path}: there is no folder {path.parent}")


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw records of one kind: a decode's contenders, a grid of decodes, or a step's operations."""
    ready(path)
    kinds = {record["kind"] for record in records}
    if kinds not in ({"decode"}, {"kernels"}):
        raise PlotError(f"decodes or kernels can be drawn, got {', '.join(sorted(kinds)) or 'no record'}")
    found = frame(records)
    with _figure(records) as figure:
        if kinds == {"kernels"}:
            _operations(figure, found, records[-1])
        elif len(records) == 1:
            _contenders(figure, found)
        else:
            _grid(figure, found)
        figure.savefig(path, dpi=DPI, metadata=FORMATS[path.suffix.lower()])


@contextmanager
def _figure(records: Sequence[Record]) -> Iterator[Figure]:
    """A figure of its own with title and caption; pyplot, which has a state, is left alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        figure.suptitle(f"{records[0]['model']}, {records[0]['dtype']}", x=0.01, ha="left", fontsize=10.5)
        origins = "\n".join(dict.fromkeys(map(origin, records)))
        figure.supxlabel(origins, x=0.01, ha="left", fontsize=7.5, color="#57606a")
        yield figure


def _contenders(figure: Figure, found: pd.DataFrame) -> None:
    """A bar of tokens per second for each contender with right tokens, and the bound as a line."""
    axes = figure.subplots()
    rows = _counted(found)
    bars = rows[rows["name"] != BOUND]
    axes.barh(bars["name"], bars["tokens_per_second"], color=COLORS[0])
    _bound_line(axes, float(rows.loc[rows["name"] == BOUND, "tokens_per_second"].iloc[0]))
    axes.set_xlabel("tokens per second")
    axes.invert_yaxis()


def _grid(figure: Figure, found: pd.DataFrame) -> None:
    """Tokens per second of each contender over what varies most, the bound dashed."""
    axes = figure.subplots()
    rows = _counted(found)
    along = max(AXES, key=lambda name: rows[name].nunique())
    names = [name for name in dict.fromkeys(rows["name"]) if name != BOUND]
    for name in [*names, BOUND]:
        points = rows[rows["name"] == name].groupby(along)["tokens_per_second"].median()
        look = {"color": BOUND_COLOR, "linestyle": "--"} if name == BOUND else {"color": _color(names, name)}
        axes.plot(points.index, points, marker="o", markersize=4, label=name, **look)
    axes.set_xscale("log", base=2)
    ticks = sorted(rows[along].unique())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(AXES[along])
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0)
    axes.legend()


def _operations(figure: Figure, found: pd.DataFrame, record: Record) -> None:
    """GB/s of each operation of a greedy step that reads from memory, fastllama's and torch's."""
    axes = figure.subplots()
    rows = found[(found["calls_per_step"] > 0) & ~found["in_cache"].astype(bool)].dropna(subset=["us"])
    for at, name in enumerate((FASTLLAMA, "torch", "F.linear")):
        speeds = rows["bandwidth_gb_s"] / (1.0 if name == FASTLLAMA else rows[name].astype(float))
        axes.barh([row + 0.25 * (at - 1) for row in range(len(rows))], speeds, 0.23, color=COLORS[at], label=name)
    axes.set_yticks(range(len(rows)), [f"{row.label}\n{row.op_shape}" for row in rows.itertuples()])
    _bound_line(axes, record["memory_bandwidth_gb_s"])
    axes.set_xlabel("GB/s")
    axes.invert_yaxis()
    axes.legend()


def _counted(found: pd.DataFrame) -> pd.DataFrame:
    """The contenders that ran and whose tokens are not wrong."""
    return found[found["tokens_per_second"].notna() & (found["parity"] != False)]  # noqa: E712  (None counts)


def _bound_line(axes: Axes, value: float) -> None:
    axes.axvline(value, color=BOUND_COLOR, linestyle="--", linewidth=1.2)
    axes.annotate(f"{BOUND} {value:.3g}", (value, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[names.index(name) % len(COLORS)]
