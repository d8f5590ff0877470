"""What the drawings share: colours, title, caption, the floor's line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

OURS_COLOR, FLOOR_COLOR = "#0b6e8f", "#b3461e"
PEER_COLORS = ("#8c959f", "#5f6a75", "#b6a6ca", "#7a9a6b", "#c9a15a")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "fastllama",  # equal records give equal files
}


@contextmanager
def style() -> Iterator[None]:
    """Draw so while open; to be open when a figure is made and when it is written."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches; pyplot, which has a state, is left alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def head(figure: Figure, what: str, record: Record, size: str) -> None:
    """The title: what is drawn, of which model, in which precision, on which machine; below it the size."""
    title = f"{what}: {record['model']}, {record['dtype']}, on {labels.machine(record)}"
    figure.suptitle(f"{title}\n{size}" if size else title, x=0.01, ha="left", fontsize=10.5)


def caption(figure: Figure, records: Sequence[Record], remark: str) -> None:
    """Below the figure, in small: a remark, and from which commit, day and torch the records are."""
    origins = dict.fromkeys(
        f"{labels.revision(record)}, {labels.day(record)}, {labels.software(record)}" for record in records
    )
    text = "\n".join(filter(None, [remark, *origins]))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="#57606a")


def floor_line(axes: Axes, value: float, text: str) -> None:
    """A vertical line that the bars cannot pass, with its name above."""
    axes.axvline(value, color=FLOOR_COLOR, linestyle="--", linewidth=1.2)
    axes.annotate(
        text,
        (value, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        color=FLOOR_COLOR,
    )


def peer_color(number: int) -> str:
    """Of the so-many-th contender that is not fastllama."""
    return PEER_COLORS[number % len(PEER_COLORS)]


def number_text(value: float) -> str:
    """Three digits, or all there are before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
