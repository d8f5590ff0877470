"""Drawings of records, with matplotlib, in files: contenders beside the floor, sweeps, kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .style import Record, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Endings that are drawn, and what is left out of the files so that equal records give equal ones.
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
DPI = 160


class PlotError(ValueError):
    """A drawing cannot be made; the message is one line."""


def ready(path: Path | None) -> None:
    """See to it that a drawing can be made later, before anything is measured; None asks for none.

    Raises:
        PlotError: matplotlib is missing, the file's ending is none that is drawn, or its folder is not there.
    """
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


def contenders(record: Record, path: Path) -> None:
    """Draw a decode record (tokens per second, the floor as a line) or a prefill record (time to the first token)."""
    from .contenders import contenders_figure

    _save(lambda: contenders_figure(record), path)


def sweep(records: Sequence[Record], path: Path) -> None:
    """Draw the points of a sweep, at least one."""
    from .sweep import sweep_figure

    _save(lambda: sweep_figure(records), path)


def kernels(record: Record, path: Path) -> None:
    """Draw a kernels record."""
    from .kernels import kernels_figure

    _save(lambda: kernels_figure(record), path)


def _save(draw: Callable[[], Figure], path: Path) -> None:
    ready(path)
    with style():
        draw().savefig(path, dpi=DPI, metadata=FORMATS[path.suffix.lower()])
