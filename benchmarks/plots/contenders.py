"""The drawing of a decode or prefill record: a bar for each contender, and the floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..ours import OURS
from .style import OURS_COLOR, Record, caption, floor_line, head, new_figure, number_text, peer_color, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def contenders_figure(record: Record) -> Figure:
    """Tokens per second of a decode record beside the floor, or milliseconds to the first token of a prefill record."""
    entries = {OURS: record, **{name: peer for name, peer in record["peers"].items() if "unavailable" not in peer}}
    missing = [name for name, peer in record["peers"].items() if "unavailable" in peer]
    is_prefill = record["kind"] == "prefill"
    size = f"batch {record['batch']}, prompt of {record['prompt_len']} tokens"
    with style():
        figure = new_figure(7.2, 1.7 + 0.36 * len(entries))
        axes = figure.subplots()
        if is_prefill:
            _bars(axes, entries, "ttft_ms")
            axes.set_xlabel("ms to the first token")
            head(figure, "Prefill", record, size)
        else:
            _bars(axes, entries, "tokens_per_second")
            _floor(axes, 1e3 * record["batch"] / record["floor_ms"])
            axes.set_xlabel("tokens per second")
            head(figure, "Decoding", record, f"{size}, {record['new_tokens']} new ones")
        caption(figure, [record], f"not run: {', '.join(missing)}" if missing else "")
    return figure


def _bars(axes: Axes, entries: Mapping[str, Record], field: str) -> None:
    values = [entry[field] for entry in entries.values()]
    colors = [OURS_COLOR, *(peer_color(number) for number in range(len(values) - 1))]
    bars = axes.barh(range(len(values)), values, color=colors, height=0.62)
    axes.bar_label(bars, [_bar_label(name, entry, field) for name, entry in entries.items()], padding=4)
    axes.set_yticks(range(len(values)), list(entries))
    axes.set_xlim(0, 1.3 * max(values))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _floor(axes: Axes, tokens_per_second: float) -> None:
    floor_line(axes, tokens_per_second, f"floor {number_text(tokens_per_second)}")
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.1 * tokens_per_second))


def _bar_label(name: str, entry: Record, field: str) -> str:
    text = number_text(entry[field])
    if name == OURS:
        return text
    ratio = f"{text}  (fastllama {entry['ratio']:.2f} x)" if entry.get("ratio") else text
    return {True: ratio, None: f"{ratio}, not checked"}.get(entry["parity"], f"{ratio}, WRONG OUTPUT")
