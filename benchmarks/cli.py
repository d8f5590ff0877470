"""``fastllama bench``: decoding speed, start-up, operations, reports, the gate and the GPU suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stderr, stdout, write, write_json

from .gpu_suite import gpu
from .regress.cli import regress

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from rich.console import RenderableType

    from fastllama import LlamaForCausalLM

    from .decode import Point

TABLE_TOKENS, TABLE_ROUNDS = 64, 2  # of each timed decode of generate --table

Batch = Annotated[str, typer.Option(help="Sequences decoded together, with commas.", metavar="LIST")]
PromptLen = Annotated[str, typer.Option(help="Tokens of each prompt, which is random, with commas.", metavar="LIST")]
Capacity = Annotated[
    str | None, typer.Option(help="Slots of the KV cache, with commas. [default: what is needed]", metavar="LIST")
]
NewTokens = Annotated[int, typer.Option(min=2, help="New tokens of each decode.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")]
Peers = Annotated[
    str, typer.Option(help="all, none, or some of eager,transformers,static,gpt-fast,llama.cpp.", metavar="LIST")
]
GptFast = Annotated[Path | None, typer.Option("--gpt-fast", metavar="DIR", help="A checkout of gpt-fast.")]
LlamaBench = Annotated[
    Path | None, typer.Option("--llama-bench", metavar="PATH", help="llama.cpp's program. [default: from PATH]")
]
Record = Annotated[Path | None, typer.Option(metavar="FILE", help="File of JSON lines to append the record to.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Drawing to write: .png, .svg or .pdf.")]


class _DecodeByDefault(TyperGroup):
    """``fastllama bench --model x`` is ``fastllama bench decode --model x``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wants_help = bool(args) and args[0] in ctx.help_option_names
        if not wants_help and (not args or args[0] not in self.commands):
            args.insert(0, "decode")
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DecodeByDefault, help="Measure decoding against peers and the bound. [default: decode]")


@app.command()
def decode(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch: Batch = "1",
    prompt_len: PromptLen = "64",
    new_tokens: NewTokens = 64,
    capacity: Capacity = None,
    rounds: Rounds = 5,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    launches: Annotated[
        bool, typer.Option("--launches", help="Record what a step launches and the host's time, too.")
    ] = False,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second of greedy decodes: fastllama, peers and the bound interleaved, outputs checked."""
    with errors_in_one_line(debug):
        names, lists = chosen_peers(peers), [numbers(text) for text in (batch, prompt_len, capacity or "")]
        from . import plots
        from .decode import grid

        plots.ready(plot)
        loaded, described = load(model, dtype, device, quiet)
        points = list(grid(lists[0], lists[1], lists[2] or [None], new_tokens))
        settings = {"rounds": rounds, "peers": names, "places": places(gpt_fast, llama_bench)}
        keep = Keeper(loaded.device, json_file, record)
        failed = measure_points(loaded, points, settings, described, keep, launches, quiet)
        keep.write_json(failed if len(points) > 1 else None)
        if plot and keep.records:
            plots.draw([each for each in keep.records if each["kind"] == "decode"], plot)
        end(failed, keep)


@app.command()
def startup(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, which is random.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each contender on warm caches.")] = 3,
    cold_rounds: Annotated[int, typer.Option(min=1, help="Processes of each contender on empty caches.")] = 1,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    json_file: options.JsonFile = None,
    record: Record = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Seconds from starting a process to its first token, phase by phase, with empty and with warm caches."""
    with errors_in_one_line(debug):
        names, where = chosen_peers(peers), options.pick_device(device)
        from .startup import measure

        found_places = places(gpt_fast, llama_bench)
        with progress(quiet) as say:
            fields = measure(
                model,
                dtype=dtype,
                device=where,
                prompt_len=prompt_len,
                rounds=rounds,
                cold_rounds=cold_rounds,
                peers=names,
                places=found_places,
                say=say,
            )
        keep = Keeper(where, json_file, record)
        keep.add("startup", fields)
        keep.write_json()


@app.command()
def kernels(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    live: Annotated[int, typer.Option(min=1, help="Tokens that each row attends.")] = 512,
    capacity: Annotated[int | None, typer.Option(min=1, help="Slots of the KV cache. [default: --live]")] = None,
    only: Annotated[str | None, typer.Option(help="Names of operations, with commas. [default: all]")] = None,
    rounds: Rounds = 5,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Microseconds and GB/s of each operation of a decode step, compared with torch's operators. Loads no weights."""
    with errors_in_one_line(debug):
        from . import plots
        from .kernels.measure import measure_kernels
        from .kernels.ops import Shapes

        plots.ready(plot)
        shapes = Shapes.of(model, dtype, options.pick_device(device), batch=batch, live=live, capacity=capacity)
        with progress(quiet) as say:
            fields = measure_kernels(shapes, rounds, say, only and only.split(","))
        keep = Keeper(shapes.device, json_file, record)
        keep.add("kernels", fields)
        keep.write_json()
        if plot:
            plots.draw(keep.records, plot)


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Files of records. [default: the committed ones]")] = None,
    kind: Annotated[str | None, typer.Option(help="decode, prefill, startup, kernels or launches.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown in place of tables for a terminal.")] = False,
    plot: Plot = None,
    readme: Annotated[bool, typer.Option("--readme", help="Fill README.md's figures from the committed records.")] = False,
    check: Annotated[bool, typer.Option("--check", help="With --readme: exit with 1 where it is out of date.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show, draw or publish records."""
    with errors_in_one_line(debug):
        from . import plots
        from .readme import RECORDS, ROOT
        from .readme import write as write_readme
        from .records import read
        from .report import cells, command, console, markdown, origin

        if readme:
            if problem := write_readme(ROOT / "README.md", RECORDS, check):
                raise ValueError(problem)
            return
        paths = files or sorted(RECORDS.glob("*.jsonl"))
        records = [each for path in paths for each in read(path) if kind in (None, each["kind"])]
        for each in records:
            if as_markdown and each["kind"] != "launches":
                write(f"{each['kind']}, {each['model']}, {origin(each)}: `{command(each)}`\n\n{markdown(cells(each))}\n\n")
            else:
                stdout().print(f"\n{each['kind']}, {each['model']}, {origin(each)}\n{command(each)}", markup=False)
                stdout().print(console(each))
        if plot:
            plots.draw(records, plot)


app.command("regress", context_settings={"help_option_names": ["-h", "--help"]})(regress)
app.command("gpu")(gpu)


def generate_table(
    model: LlamaForCausalLM, prompt_ids: list[int], new_tokens: int, say: Callable[[str], None]
) -> tuple[RenderableType, dict[str, Any]]:
    """The table of ``fastllama generate --table`` and its figures: the engine compared with the eager forward."""
    from .contenders import EAGER
    from .decode import compare
    from .report import console
    from .workload import Workload

    workload = Workload((tuple(prompt_ids),), max(2, min(TABLE_TOKENS, new_tokens)))
    fields = compare(model, workload, rounds=TABLE_ROUNDS, peers=(EAGER,), say=say)
    return console({"kind": "decode"} | fields), fields


# ---- what the commands share -----------------------------------------------------------------------------------------


def chosen_peers(text: str) -> tuple[str, ...]:
    """The names that ``--peers`` gives."""
    from .contenders import parse

    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--peers") from error


def places(gpt_fast: Path | None, llama_bench: Path | None) -> dict[str, str | None]:
    """Where the peers are that are no Python packages."""
    return {name: path and str(path) for name, path in (("gpt_fast", gpt_fast), ("llama_bench", llama_bench))}


def numbers(text: str) -> list[int]:
    """The numbers of a list like ``1,4``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal() or part == "0"]:
        raise typer.BadParameter(f"{', '.join(wrong)}: expected whole numbers from 1 on, with commas")
    return list(dict.fromkeys(map(int, parts)))


def load(model: str, dtype: str | None, device: str | None, quiet: bool) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model, and the fields of a record that describe it."""
    from fastllama import LlamaForCausalLM

    where = options.pick_device(device)
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=dtype, device=where, progress=not quiet)
    weights = {"dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device), "quantize": None}
    return loaded, {"model": model, **weights, "config": loaded.config.to_dict()}


class Keeper:
    """Shows each record as it comes and appends it to the file at once, so that an interruption loses nothing."""

    def __init__(self, device: Any, json_file: str | None, record_file: Path | None) -> None:
        self._device, self._json, self._file = device, json_file, record_file
        self._console = stderr() if json_file == "-" else stdout()
        self.records: list[dict[str, Any]] = []

    def add(self, kind: str, fields: dict[str, Any], title: str = "") -> None:
        """Make a record, show it, keep it."""
        from .environment import environment
        from .records import RecordError, append, new_record
        from .report import console

        record = new_record(kind, fields, environment(self._device))
        if title:
            self._console.print(title, markup=False)
        self._console.print(console(record))
        if not record["parity"]:
            raise RecordError("the outputs failed the parity gate: no figures are recorded")
        if self._file:
            append(record, self._file)
        self.records.append(record)

    def write_json(self, failed: list[dict[str, Any]] | None = None) -> None:
        """Write the record; of a grid, all its points and those that failed."""
        if self._json and failed is not None:
            write_json({"points": self.records, "failed": failed}, self._json)
        elif self._json and self.records:
            write_json(self.records[0], self._json)


def measure_points(
    model: LlamaForCausalLM,
    points: Sequence[Point],
    settings: dict[str, Any],
    described: dict[str, Any],
    keep: Keeper,
    launches: bool,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Measure the points one by one; of those that fail, why: they do not end a grid, but do end a single decode."""
    from .decode import measure_point
    from .launches import measure_launches
    from .workload import reason

    failed = []
    for number, point in enumerate(points, start=1):
        try:
            with progress(quiet) as say:
                fields = measure_point(model, point, say=say, **settings)
            keep.add("decode", described | fields, str(point) if len(points) > 1 else "")
            if launches:
                found = measure_launches(model, point.workload(model.config.vocab_size))
                keep.add("launches", described | {"parity": True} | found)
        except Exception as error:
            if len(points) == 1:
                raise
            stderr().print(f"point {number} of {len(points)}, {point}, failed: {reason(error)}", markup=False)
            sizes = {"batch": point.batch, "prompt_len": point.prompt_len, "capacity": point.capacity}
            failed.append(sizes | {"reason": reason(error)})
    return failed


def end(failed: list[dict[str, Any]], keep: Keeper) -> None:
    """Raise RecordError if outputs of a grid were wrong or nothing at all was measured."""
    from .records import RecordError

    wrong = [each for each in failed if "parity gate" in each["reason"]]
    if wrong or (failed and not keep.records):
        raise RecordError(f"{len(failed)} points failed; the first with: {(wrong or failed)[0]['reason']}")


if __name__ == "__main__":
    app(prog_name="fastllama bench")
