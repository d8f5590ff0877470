"""``fastllama bench sweep``: decoding speed along batch, live length, cache capacity and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stderr, stdout, write_json

from .shared import (
    Batch,
    Capacity,
    GptFast,
    LlamaBench,
    NewTokens,
    Peers,
    Plot,
    PromptLen,
    Record,
    Rounds,
    chosen_peers,
    keep,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..sweep import Outcome, Sweep

HEADINGS = ("axis", "value", "tok/s", "floor tok/s", "TPOT ms (p20-p80)", "MBU", "  ours is")
WIDTHS = (10, 9, 10, 12, 23, 8, 0)

Axis = Annotated[str, typer.Option(help="all, or some of batch,live,capacity,precision.", metavar="LIST")]
Values = Annotated[str | None, typer.Option(help="Of the one axis, in place of its own: 1,4,16.", metavar="LIST")]
Capacities = Annotated[str | None, typer.Option(help="Values of the axis capacity.", metavar="LIST")]
MaxLive = Annotated[int | None, typer.Option(min=1, help="Longest live length; else 32768, on a CPU 2048.")]


def sweep(
    model: options.Model = "demo",
    axis: Axis = "all",
    values: Values = None,
    capacities: Capacities = None,
    max_live: MaxLive = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    batch: Batch = 1,
    prompt_len: PromptLen = 64,
    new_tokens: NewTokens = 64,
    capacity: Capacity = None,
    rounds: Rounds = 5,
    peers: Peers = "none",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second and MBU along batch, live length, capacity and precision; each point is recorded at once."""
    with errors_in_one_line(debug):
        from ..plots import draw
        from ..sweep import MAX_LIVE, Setting, Sweep, plan

        axes, chosen = chosen_values(axis, values, capacities)
        names, places = chosen_peers(peers, gpt_fast, llama_bench)
        draw.ready(plot)
        where = options.pick_device(device)

        def load(dtype: str | None, quantize: str | None) -> Any:
            return options.load(model, dtype, where, quantize, quiet).model

        base = Setting(dtype, quantize, batch, prompt_len, new_tokens, capacity)
        sweeper = Sweep(model, base, load, rounds=rounds, peers=names, places=places)
        longest = max_live or MAX_LIVE.get(sweeper.device.type, MAX_LIVE["cpu"])
        console = stderr() if json_file == "-" else stdout()
        points = plan(axes, chosen, sweeper.base, sweeper.config, longest)
        kept, failed = measure_all(sweeper, points, console, record, quiet)
        if json_file:
            write_json({"points": kept, "failed": [described(outcome) for outcome in failed]}, json_file)
        if plot and kept:
            draw.sweep(kept, plot)
        end(kept, failed)


def chosen_values(axis: str, values: str | None, capacities: str | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The axes that were asked for, and the values given for them."""
    from ..sweep import CAPACITY, parse_axes, parse_values

    try:
        axes = parse_axes(axis)
        if values is not None and len(axes) != 1:
            raise ValueError(f"--values belongs to one axis: name it with --axis, which gives {', '.join(axes)}")
        if capacities is not None and CAPACITY not in axes:
            raise ValueError(f"--capacities belongs to the axis capacity; --axis gives {', '.join(axes)}")
        found = {} if values is None else {axes[0]: parse_values(axes[0], values)}
        return axes, found if capacities is None else found | {CAPACITY: parse_values(CAPACITY, capacities)}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def measure_all(
    sweeper: Sweep, points: Any, console: Console, record: Record, quiet: bool
) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Measure the points one by one: each is a line on the console and a record in the file before the next begins."""
    kept, failed = [], []
    console.print(_line(HEADINGS), style="dim", markup=False, soft_wrap=True)
    for number, point in enumerate(points, start=1):
        with progress(quiet) as say:
            outcome = sweeper.measure(
                point, lambda text, at=number, p=point: say(f"point {at} of {len(points)}, {p.axis} {p.value}: {text}")
            )
        if outcome.fields is None:
            failed.append(outcome)
        else:
            kept.append(keep("decode", outcome.fields, sweeper.device, None, record))
        console.print(_line(_cells(outcome)), markup=False, soft_wrap=True)
    return kept, failed


def described(outcome: Outcome) -> dict[str, Any]:
    """A failed point, for the JSON."""
    return {"sweep": outcome.point.axis, "sweep_value": outcome.point.value, "reason": outcome.failure}


def end(kept: list[dict[str, Any]], failed: list[Outcome]) -> None:
    """Raise RecordError if outputs were wrong or nothing at all was measured."""
    from ..records import RecordError

    if wrong := [f"{outcome.point.axis} {outcome.point.value}" for outcome in failed if outcome.is_wrong]:
        raise RecordError(f"the outputs failed the parity gate at {', '.join(wrong)}: no figures are recorded there")
    if not kept:
        raise RecordError(f"no point could be measured; the first failed with: {failed[0].failure}")


def _cells(outcome: Outcome) -> tuple[str, ...]:
    name, value, comparison = outcome.point.axis, str(outcome.point.value), outcome.comparison
    if comparison is None:
        return name, value, f"  failed: {outcome.failure}"
    ours, *others = comparison.figures
    assert ours.tpot_ms is not None
    peers = [f"{ratio:.2f} x {peer.name}" for peer in others if (ratio := comparison.ratio(peer))]
    return (
        name,
        value,
        f"{ours.tokens_per_second:.1f}",
        f"{1e3 * comparison.workload.batch / comparison.floor_ms:.1f}",
        f"{ours.tpot_ms.p50:.3g} ({ours.tpot_ms.p20:.3g}-{ours.tpot_ms.p80:.3g})",
        f"{100 * ours.mbu:.1f} %",
        "  " + "; ".join([*peers, *(f"{name} not run: {why}" for name, why in comparison.missing.items())]),
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=False))
    return "".join([first.strip().ljust(WIDTHS[0]), *rest]).rstrip()
