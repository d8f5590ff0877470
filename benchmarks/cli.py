"""``fastllama bench``: decoding speed, start-up, operations, reports, the gate and the GPU suite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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

TABLE_TOKENS, TABLE_ROUNDS = 64, 2  # of each timed decode of generate --table

Batch = Annotated[str, typer.Option(help="Sequences decoded together, with commas.", metavar="LIST")]
PromptLen = Annotated[str, typer.Option(help="Tokens of each prompt, which is random, with commas.", metavar="LIST")]
Capacity = Annotated[str, typer.Option(help="KV cache slots, with commas.", show_default="enough", metavar="LIST")]
NewTokens = Annotated[int, typer.Option(min=2, help="New tokens of each decode.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")]
Peers = Annotated[
    str, typer.Option(help="all, none, or some of eager,transformers,static,gpt-fast,llama.cpp.", metavar="LIST")
]
GptFast = Annotated[Path | None, typer.Option("--gpt-fast", metavar="DIR", help="A checkout of gpt-fast.")]
LlamaBench = Annotated[Path | None, typer.Option(metavar="PATH", help="llama.cpp's program.", show_default="from PATH")]
Schemes = Annotated[str, typer.Option(help="Some of stored, none, int8 and int4, with commas.", metavar="LIST")]
Launches = Annotated[bool, typer.Option("--launches", help="Record what a step launches and the host's time, too.")]
Record = Annotated[Path | None, typer.Option(metavar="FILE", help="File of JSON lines to append the record to.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Plot to write: .png, .svg or .pdf.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Files of records.", show_default="the committed ones")]
Kind = Annotated[
    str | None, typer.Option(help="decode, quality, startup, kernels, launches or prefill.", show_default="all")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Markdown in place of tables for a terminal.")]
Readme = Annotated[bool, typer.Option("--readme", help="Fill README.md's figures from the committed records.")]
Check = Annotated[bool, typer.Option("--check", help="With --readme: exit with 1 where it is out of date.")]


class _DecodeByDefault(TyperGroup):
    """``fastllama bench --model x`` is ``fastllama bench decode --model x``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wants_help = bool(args) and args[0] in ctx.help_option_names
        if not wants_help and (not args or args[0] not in self.commands):
            args.insert(0, "decode")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DecodeByDefault,
    help="Measure decoding against peers and the bound; decode is the default.",
    rich_markup_mode=None,
)


@app.command()
def decode(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch: Batch = "1",
    prompt_len: PromptLen = "64",
    new_tokens: NewTokens = 64,
    capacity: Capacity = "",
    rounds: Rounds = 5,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    quantize: Schemes = "stored",
    launches: Launches = False,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second of greedy decodes: fastllama, peers and the bound interleaved, outputs checked."""
    with errors_in_one_line(debug):
        asked = peers_of(peers, gpt_fast, llama_bench) | {"rounds": rounds}
        batches, prompts, slots = map(numbers, (batch, prompt_len, capacity))
        from . import plots

        plots.ready(plot)
        points = [(*each, new_tokens) for each in itertools.product(batches, prompts, slots or [None])]
        keep, failed, schemes = Keeper(options.pick_device(device), json_file, record), [], quantize.split(",")
        for scheme in schemes:
            loaded, described = load(model, dtype, device, quiet, None if scheme == "stored" else scheme)
            several = len(points) * len(schemes) > 1
            failed += measure_points(loaded, points, asked, described, keep, launches, quiet, several)
        keep.write_json(failed if several else None)
        if plot and keep.records:
            plots.plot([each for each in keep.records if each["kind"] == "decode"], plot)
        wrong = [each["reason"] for each in failed if not keep.records or "parity gate" in each["reason"]]
        if wrong:
            raise ValueError(f"{len(failed)} points failed; the first with: {wrong[0]}")


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
        asked = peers_of(peers, gpt_fast, llama_bench) | {"dtype": dtype, "device": options.pick_device(device)}
        from .startup import measure

        sizes = {"prompt_len": prompt_len, "rounds": rounds, "cold_rounds": cold_rounds}
        with progress(quiet) as say:
            fields = measure(model, say=say, **sizes, **asked)
        keep = Keeper(asked["device"], json_file, record)
        keep.add("startup", fields)
        keep.write_json()


@app.command()
def kernels(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    live: Annotated[int, typer.Option(min=1, help="Tokens that each row attends.")] = 512,
    capacity: Annotated[int | None, typer.Option(min=1, help="Slots of the KV cache.", show_default="--live")] = None,
    only: Annotated[str, typer.Option(help="Names of operations, with commas.", show_default="all")] = "",
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
            fields = measure_kernels(shapes, rounds, say, only.split(",") if only else None)
        keep = Keeper(shapes.device, json_file, record)
        keep.add("kernels", fields)
        keep.write_json()
        if plot:
            plots.plot(keep.records, plot)


@app.command()
def quality(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    schemes: Schemes = "int8,int4",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to read.", show_default="Python's")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of it.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read at once.")] = 512,
    json_file: options.JsonFile = None,
    record: Record = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What quantization costs: perplexity, divergence and agreement with the weights as they are, over a text."""
    with errors_in_one_line(debug):
        from .quality import held_out_text, measure

        content = text.read_text(encoding="utf-8") if text else held_out_text(docstrings=model != "demo")
        where, sizes = options.pick_device(device), (tokens, window)
        with progress(quiet) as say:
            fields = measure(model, dtype, where, [*filter("none".__ne__, schemes.split(","))], content, *sizes, say)
        keep = Keeper(where, json_file, record)
        keep.add("quality", fields | {"text": text.name if text else "the standard library"})
        keep.write_json()


@app.command()
def report(
    files: Files = None,
    kind: Kind = None,
    as_markdown: Markdown = False,
    plot: Plot = None,
    readme: Readme = False,
    check: Check = False,
    debug: options.Debug = False,
) -> None:
    """Show, plot or publish records."""
    with errors_in_one_line(debug):
        from . import plots
        from . import report as reports
        from .readme import main as fill_readme
        from .records import RECORDS, read

        if readme:
            return fill_readme(check)
        paths = files or sorted(RECORDS.glob("*.jsonl"))
        records = [each for path in paths for each in read(path) if kind in (None, each["kind"])]
        for each in records:
            title = f"{each['kind']}, {reports.point(each)}, {reports.origin(each)}: `{reports.command(each)}`"
            if as_markdown and each["kind"] in reports.COLUMNS:
                write(f"{title}\n\n{reports.markdown(reports.cells(each))}\n\n")
            else:
                stdout().print(f"\n{title}", markup=False)
                stdout().print(reports.console(each))
        return plots.plot(records, plot) if plot else None


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


def peers_of(text: str, gpt_fast: Path | None, llama_bench: Path | None) -> dict[str, Any]:
    """The names that ``--peers`` gives, and where those are that are no Python packages."""
    from .contenders import parse

    try:
        names = parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--peers") from error
    places = {"gpt_fast": gpt_fast, "llama_bench": llama_bench}
    return {"peers": names, "places": {name: path and str(path) for name, path in places.items()}}


def numbers(text: str) -> list[int]:
    """The numbers of a list like ``1,4``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal() or part == "0"]:
        raise typer.BadParameter(f"{', '.join(wrong)}: expected whole numbers from 1 on, with commas")
    return list(dict.fromkeys(map(int, parts)))


def load(
    model: str, dtype: str | None, device: str | None, quiet: bool, quantize: str | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model, and the fields of a record that describe it."""
    from fastllama import LlamaForCausalLM

    where = options.pick_device(device)
    loaded = LlamaForCausalLM.from_pretrained(model, dtype, where, quantize, progress=not quiet)
    weights = {"dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device)}
    weights |= {"quantize": None if quantize == "none" else quantize}
    return loaded, {"model": model, **weights, "config": loaded.config.to_dict()}


class Keeper:
    """Shows each record as it comes and appends it to the file at once, so that an interruption loses nothing."""

    def __init__(self, device: Any, json_file: str | None, record_file: Path | None) -> None:
        self._device, self._json, self._file = device, json_file, record_file
        self._console = stderr() if json_file == "-" else stdout()
        self.records: list[dict[str, Any]] = []

    def add(self, kind: str, fields: dict[str, Any], title: str = "") -> None:
        """Make a record, show it, keep it; RecordError if the outputs failed the parity gate."""
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
        if self._json and (failed is not None or self.records):
            write_json(self.records[0] if failed is None else {"points": self.records, "failed": failed}, self._json)


def measure_points(
    model: LlamaForCausalLM,
    points: Sequence[tuple[int, int, int | None, int]],
    asked: dict[str, Any],
    described: dict[str, Any],
    keep: Keeper,
    launches: bool,
    quiet: bool,
    several: bool,
) -> Iterator[dict[str, Any]]:
    """Measure points, each from a released engine, for a cache that has grown stays grown; yields those that fail.

    A failure does not end a grid, but does end a single decode.
    """
    from .decode import compare, workload_of
    from .launches import measure_launches
    from .workload import reason

    for batch, prompt_len, slots, new_tokens in points:
        title = ", ".join(filter(None, (described["quantize"], f"batch {batch}", f"prompt of {prompt_len}")))
        title += f", {slots} slots" * bool(slots)
        try:
            workload = workload_of(model, batch, prompt_len, new_tokens, slots)
            model.release()
            with progress(quiet) as say:
                fields = compare(model, workload, say=say, **asked)
            keep.add("decode", described | fields, title if several else "")
            if launches:
                keep.add("launches", described | {"parity": True} | measure_launches(model, workload))
        except Exception as error:
            if not several:
                raise
            stderr().print(f"{title} failed: {reason(error)}", markup=False)
            sizes = {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens, "capacity": slots}
            yield sizes | {"reason": reason(error)}


if __name__ == "__main__":
    app(prog_name="fastllama bench")
