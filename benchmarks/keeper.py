"""What becomes of the records of a ``fastllama bench``: shown, appended to a file, written as JSON, plotted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllama.cli.console import progress, stderr, stdout, write_json

from .records import append, new_record


@dataclass
class Keeper:
    """Shows each record as it comes and appends it to the file at once, so that an interruption loses nothing."""

    device: str
    json_file: str | None
    record_file: Path | None
    plot_file: Path | None = None
    quiet: bool = False
    is_grid: bool = False
    common: dict[str, Any] = field(default_factory=dict)  # fields of each record
    records: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)  # points of a grid, and why

    def __post_init__(self) -> None:
        from . import plots

        plots.ready(self.plot_file)
        self._console = stderr() if self.json_file == "-" else stdout()

    def measure(self, kind: str, function: Callable[..., dict[str, Any]], *arguments: Any, **named: Any) -> None:
        """Show the progress of a measurement and make a record of what it returns."""
        with progress(self.quiet) as say:
            fields = function(*arguments, say=say, **named)
        self.add(kind, fields)

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        """Make a record, show it, keep it; RecordError if the outputs failed the parity gate."""
        from .environment import environment
        from .report import console

        record = new_record(kind, self.common | fields, environment(self.device))
        self._console.print(console(record))
        append(record, self.record_file)
        self.records.append(record)

    @contextmanager
    def point(self, title: str, sizes: dict[str, Any]) -> Iterator[None]:
        """Measure a point in it: a failure does not end a grid, but does end a single decode."""
        from .workload import reason

        if self.is_grid:
            self._console.print(title, markup=False)
        try:
            yield
        except Exception as error:
            if not self.is_grid:
                raise
            stderr().print(f"{title} failed: {reason(error)}", markup=False)
            self.failed.append(sizes | {"reason": reason(error)})

    def finish(self) -> None:
        """Write what JSON file and plot were asked for; of a grid, all its points and those that failed."""
        from . import plots

        if self.json_file and (self.is_grid or self.records):
            grid = {"points": self.records, "failed": self.failed}
            write_json(grid if self.is_grid else self.records[0], self.json_file)
        if self.plot_file and self.records:
            plots.plot([each for each in self.records if each["kind"] != "launches"], self.plot_file)
        wrong = [each["reason"] for each in self.failed if not self.records or "parity gate" in each["reason"]]
        if wrong:
            raise ValueError(f"{len(self.failed)} points failed; the first with: {wrong[0]}")
