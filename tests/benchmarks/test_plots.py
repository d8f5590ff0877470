"""What the drawings show, read back from their axes; and what is refused before anything is measured."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama_benchmarks.plots import draw
from fastllama_benchmarks.plots.contenders import contenders_figure
from fastllama_benchmarks.plots.draw import PlotError, ready
from fastllama_benchmarks.plots.kernels import kernels_figure
from fastllama_benchmarks.plots.sweep import sweep_figure
from fastllama_benchmarks.records import read

pytest.importorskip("matplotlib")

RECORDS = read(Path(__file__).parent / "data" / "records.jsonl")
DECODE = next(record for record in RECORDS if len(record["peers"]) == 5)
PREFILL = next(record for record in RECORDS if record["kind"] == "prefill")
SWEEP = [record for record in RECORDS if record.get("sweep") in ("batch", "precision")]
KERNELS = next(record for record in RECORDS if record["kind"] == "kernels")


def widths(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def texts(figure: Any) -> str:
    """Everything that is written on a figure."""
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


# ---- contenders ----------------------------------------------------------------------------------------------------


def test_a_decode_is_a_bar_for_each_contender_and_the_floor() -> None:
    figure = contenders_figure(DECODE)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["fastllama", "eager forward", "transformers", "transformers static+compile", "llama.cpp"]
    assert widths(axes) == [2662, 500, 389, 612, 1800]
    (floor,) = axes.get_lines()
    assert floor.get_xdata()[0] == pytest.approx(1e3 / DECODE["floor_ms"])
    written = texts(figure)
    for words in ("demo", "bfloat16", "Example CPU, 2 threads", "commit 012345678", "2026-01-03", "torch 2.13.0"):
        assert words in written
    assert "not run: gpt-fast" in written
    assert "fastllama 6.84 x" in written
    assert "not checked" in written


def test_a_peer_with_wrong_outputs_is_marked() -> None:
    record = next(r for r in RECORDS if r["peers"].get("gpt-fast", {}).get("parity") is False)
    assert "WRONG OUTPUT" in texts(contenders_figure(record))


def test_a_prefill_is_drawn_in_milliseconds_without_a_floor() -> None:
    (axes,) = contenders_figure(PREFILL).axes
    assert widths(axes) == [1850, 1900]
    assert axes.get_lines() == []
    assert axes.get_xlabel() == "ms to the first token"


# ---- sweep ---------------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_column_for_each_axis_with_speed_floor_and_mbu() -> None:
    figure = sweep_figure(SWEEP[::-1])
    speed, bars, mbu, percents = figure.axes
    drawn = lines(speed)
    assert drawn["fastllama"] == ([1, 2, 4, 8], [16, 31, 60, 100])
    assert drawn["floor"][1] == pytest.approx([26, 52, 104, 208])
    assert drawn["transformers"][1][:2] == pytest.approx([9.6, 18.6])
    assert math.isnan(drawn["transformers"][1][2])  # its tokens were wrong there
    assert speed.get_yscale() == "log"
    assert mbu.get_xscale() == "log"
    assert mbu.get_lines()[0].get_ydata() == pytest.approx([100 * r["mbu"] for r in SWEEP if r["sweep"] == "batch"])
    assert [label.get_text() for label in percents.get_xticklabels()] == ["float32", "bfloat16", "float16"]
    ours = [patch.get_height() for patch in bars.patches][:3]
    assert ours == [8, 16, 15]
    assert mbu.get_xlabel() == "sequences decoded together"
    assert percents.get_xlabel() == "precision"


def test_the_gap_to_the_floor_is_filled() -> None:
    (speed, _) = sweep_figure([record for record in SWEEP if record["sweep"] == "batch"]).axes
    (gap,) = speed.collections
    low, high = gap.get_datalim(speed.transData).intervaly
    assert (low, high) == pytest.approx((16, 208))


# ---- kernels -------------------------------------------------------------------------------------------------------


def test_kernels_are_drawn_beside_the_bandwidth_of_the_memory() -> None:
    figure = kernels_figure(KERNELS)
    speed, part = figure.axes
    rows = [label.get_text().splitlines()[0] for label in speed.get_yticklabels()]
    assert rows == ["norm, q/k/v", "rotary, attention", "sample, greedy"]  # those of a greedy step
    expected = [262144 / us / 1e3 for us in (13, 31, 40, 217, 26)]  # ours, torch's, F.linear's; not of the cache
    assert widths(speed) == pytest.approx(expected)
    assert widths(part)[:3] == pytest.approx([6 * 13 / 1e3, 6 * 31 / 1e3, 6 / 1e3])
    assert speed.get_lines()[0].get_xdata()[0] == 40
    assert "these calls alone: 0.27 ms" in texts(figure)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_records_give_equal_files(tmp_path: Path, suffix) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        draw.kernels(KERNELS, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_each_drawing_is_written(tmp_path: Path) -> None:
    draw.contenders(DECODE, tmp_path / "d.png")
    draw.sweep(SWEEP, tmp_path / "s.png")
    assert all(file.stat().st_size > 10_000 for file in tmp_path.iterdir())


def test_drawing_leaves_no_state_behind() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    kernels_figure(KERNELS)
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_missing_matplotlib_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r'pip install "fastllama\[bench\]"'):
        ready(tmp_path / "a.png")
    ready(None)


@pytest.mark.parametrize(("name", "words"), [("a.gif", ".png, .svg, .pdf"), ("nowhere/a.png", "no folder")])
def test_files_that_cannot_be_written_are_refused(tmp_path: Path, name, words) -> None:
    with pytest.raises(PlotError, match=words):
        ready(tmp_path / name)
