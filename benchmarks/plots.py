"""Plots of records, from the frame of :mod:`.report`: decodes as bars or over a grid, operations as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import FASTLLAMA
from .report import BOUND, REFERENCES, Record, frame, origin

FORMATS: dict[str, Any] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
DASHED: dict[str, Any] = {"color": "#b3461e", "linestyle": "--"}
AXES = {
    "batch": "sequences decoded together",
    "prompt_len": "tokens of the prompt",
    "capacity": "slots of the KV cache",
}
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "equal"}


def ready(path: Path | None) -> None:
    """Raise ValueError if a plot could not be made later, before anything is measured; None asks for none."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError('--plot needs matplotlib: pip install "fastllama[bench]"') from error
    if path.suffix.lower() not in FORMATS or not path.parent.is_dir():
        raise ValueError(f"cannot plot to {path}: expected a name that ends in {', '.join(FORMATS)}, in a folder")


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot a decode's contenders, a grid of decodes, or a step's operations; equal records give equal files."""
    ready(path)
    kinds = {record["kind"] for record in records}
    if kinds not in ({"decode"}, {"kernels"}):
        raise ValueError(f"decodes or kernels can be plotted, got {', '.join(sorted(kinds)) or 'no record'}")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        figure.suptitle(f"{records[0]['model']}, {records[0]['dtype']}", x=0.01, ha="left")
        figure.supxlabel("\n".join(dict.fromkeys(map(origin, records))), x=0.01, ha="left", fontsize=7)
        axes: Any = figure.subplots()
        rows: Any = frame(records)
        if kinds == {"kernels"}:
            _operations(axes, rows, records[-1]["memory_bandwidth_gb_s"])
        else:
            rows = rows[rows["parity"] != False]  # noqa: E712  (None counts)
            (_bars if len(records) == 1 else _grid)(axes, rows)
        axes.legend()
        figure.savefig(path, dpi=150, metadata=FORMATS[path.suffix.lower()])


def _bars(axes: Any, rows: Any) -> None:
    axes.axvline(rows["tokens_per_second"].iloc[0], label=BOUND, **DASHED)
    axes.barh(rows["name"].iloc[1:], rows["tokens_per_second"].iloc[1:])
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")


def _grid(axes: Any, rows: Any) -> None:
    along = max(AXES, key=lambda name: rows[name].nunique())
    for name in dict.fromkeys(rows["name"]):
        points = rows[rows["name"] == name].groupby(along)["tokens_per_second"].median()
        axes.plot(points.index, points, marker="o", label=name, **(DASHED if name == BOUND else {}))
    axes.set_xscale("log", base=2)
    axes.set(xlabel=AXES[along], ylabel="tokens per second", ylim=(0, None))


def _operations(axes: Any, rows: Any, gb_s: float) -> None:
    rows = rows[(rows["calls_per_step"] > 0) & ~rows["in_cache"].astype(bool)].dropna(subset=["us"])
    for at, name in enumerate((FASTLLAMA, *REFERENCES)):
        speeds = rows["bandwidth_gb_s"] / (1.0 if name == FASTLLAMA else rows[name].astype(float))
        axes.barh([row + 0.25 * (at - 1) for row in range(len(rows))], speeds, 0.23, label=name)
    axes.axvline(gb_s, label=BOUND, **DASHED)
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['shape']}" for row in rows.to_dict("records")])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
