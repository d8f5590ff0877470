"""``fastllama bench kernels``: each operation of a decode step beside what it replaces and the memory's bandwidth."""

from __future__ import annotations

from typing import Annotated

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress

from .shared import Batch, Plot, Record, Rounds, keep, show

Live = Annotated[int, typer.Option(min=1, help="Tokens that each row attends.")]
Slots = Annotated[int | None, typer.Option("--capacity", min=1, help="Slots of the KV cache; else as many as live.")]


def kernels(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch: Batch = 1,
    live: Live = 512,
    capacity: Slots = None,
    rounds: Rounds = 5,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Microseconds and GB/s of each operation of a decode step, beside torch's operators. Loads no weights."""
    with errors_in_one_line(debug):
        from ..kernels.measure import measure_kernels
        from ..kernels.step import Shapes
        from ..kernels.table import kernels_table
        from ..plots import draw

        draw.ready(plot)
        where = options.pick_device(device)
        shapes = Shapes.of(model, dtype, where, batch=batch, live=live, capacity=capacity)
        with progress(quiet) as say:
            report = measure_kernels(shapes, rounds, say)
        show(kernels_table(report), json_file)
        kept = keep("kernels", report.to_dict(), shapes.device, json_file, record)
        if plot:
            draw.kernels(kept, plot)
