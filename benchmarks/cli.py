"""``fastllama bench``: decoding speed, start-up, operations, reports, the gate and the GPU suite."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, stdout, write

from .gpu_suite import gpu
from .keeper import Keeper
from .records import read_all, weight_fields
from .regress.cli import regress

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from rich.console import RenderableType

    from fastllama import LlamaForCausalLM

TABLE_TOKENS, TABLE_ROUNDS = 64, 2  # of each timed decode of generate --table

PromptLen = Annotated[str, typer.Option(help="Tokens of each prompt, which is random, with commas.", metavar="LIST")]
Capacity = Annotated[str, typer.Option(help="KV cache slots, with commas.", show_default="enough", metavar="LIST")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")]
Peers = Annotated[
    str, typer.Option(help="all, none, or some of eager,transformers,static,gpt-fast,llama.cpp.", metavar="LIST")
]
GptFast = Annotated[Path | None, typer.Option("--gpt-fast", metavar="DIR", help="A checkout of gpt-fast.")]
LlamaBench = Annotated[Path | None, typer.Option(metavar="PATH", help="llama.cpp's program.", show_default="from PATH")]
Schemes = Annotated[str, typer.Option(help="Some of stored, none, int8 and int4, with commas.", metavar="LIST")]
Costs = Annotated[str, typer.Option(help="Some of stored, int8, int4, int8-kv, ./FOLDER, with commas.", metavar="LIST")]
Speculate = Annotated[
    str, typer.Option(help="Drafts in place of peers, on code, story, or shares like 0.7, with commas.", metavar="LIST")
]
Record = Annotated[Path | None, typer.Option(metavar="FILE", help="File of JSON lines to append the record to.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Plot to write: .png, .svg or .pdf.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Files of records.", show_default="the committed ones")]
Kind = Annotated[
    str | None,
    typer.Option(help="decode, speculation, quality, startup, kernels, launches or prefill.", show_default="all"),
]


class _DecodeByDefault(TyperGroup):
    """``fastllama bench --model x`` is ``fastllama bench decode --model x``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
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
    batch: Annotated[str, typer.Option(help="Sequences decoded together, with commas.", metavar="LIST")] = "1",
    prompt_len: PromptLen = "64",
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each decode.")] = 64,
    capacity: Capacity = "",
    rounds: Rounds = 5,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    quantize: Schemes = "stored",
    kv_cache_dtype: options.KVCacheDtype = None,
    speculate: Speculate = "",
    assistant_model: options.AssistantModel = None,
    launches: Annotated[bool, typer.Option("--launches", help="Record a step's launches and host time, too.")] = False,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second of greedy decodes: fastllama, peers and the bound interleaved, outputs checked."""
    with errors_in_one_line(debug):
        from fastllama import LlamaForCausalLM

        asked = peers_of(peers, gpt_fast, llama_bench) | {"rounds": rounds}
        texts = texts_of(speculate)
        sizes = {"batch": numbers(batch), "prompt_len": numbers(prompt_len), "new_tokens": [new_tokens]}
        sizes |= {"capacity": numbers(capacity) or [None]}
        points = [dict(zip(sizes, each, strict=True)) for each in itertools.product(*sizes.values())]
        schemes = quantize.split(",")
        keep = Keeper(options.pick_device(device), json_file, record, plot, quiet, len(points) * len(schemes) > 1)
        for scheme in schemes:
            how: dict[str, Any] = {"quantize": None if scheme == "stored" else scheme, "kv_cache_dtype": kv_cache_dtype}
            loaded = LlamaForCausalLM.from_pretrained(model, dtype, keep.device, progress=not quiet, **how)
            keep.common = weight_fields(model, loaded, how["quantize"])
            if texts:
                measure_drafts(model, loaded, texts, assistant_model, points, keep, rounds)
                continue
            measure_points(loaded, points, launches, keep, **asked)
        keep.finish()


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
        asked = peers_of(peers, gpt_fast, llama_bench)
        from .startup import measure

        keep = Keeper(options.pick_device(device), json_file, record, quiet=quiet)
        sizes = {"prompt_len": prompt_len, "rounds": rounds, "cold_rounds": cold_rounds}
        keep.measure("startup", measure, model, dtype=dtype, device=keep.device, **sizes, **asked)
        keep.finish()


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
        from .kernels.measure import measure_kernels
        from .kernels.ops import Shapes

        keep = Keeper(options.pick_device(device), json_file, record, plot, quiet)
        shapes = Shapes.of(model, dtype, keep.device, batch=batch, live=live, capacity=capacity)
        keep.measure("kernels", measure_kernels, shapes, rounds, only=only.split(",") if only else None)
        keep.finish()


@app.command()
def quality(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    schemes: Costs = "int8,int4,int8-kv",
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
        from .quality import measure

        keep = Keeper(options.pick_device(device), json_file, record, quiet=quiet)
        keep.measure("quality", measure, model, dtype, keep.device, schemes.split(","), text, tokens, window)
        keep.finish()


@app.command()
def report(
    files: Files = None,
    kind: Kind = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown in place of a terminal's tables.")] = False,
    plot: Plot = None,
    readme: Annotated[bool, typer.Option("--readme", help="Fill README.md's figures from committed records.")] = False,
    check: Annotated[bool, typer.Option("--check", help="With --readme: exit with 1 where it is out of date.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show, plot or publish records."""
    with errors_in_one_line(debug):
        from . import plots
        from . import report as reports
        from .readme import main as fill_readme

        if readme:
            return fill_readme(check)
        records = [each for each in read_all(files) if kind in (None, each["kind"])]
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


def measure_points(
    loaded: LlamaForCausalLM, points: list[dict[str, Any]], launches: bool, keep: Keeper, **asked: Any
) -> None:
    """Measure points, each from a released engine, for a cache that has grown stays grown."""
    from .decode import compare, workload_of
    from .launches import measure_launches

    scheme = {"quantize": keep.common["quantize"]}
    for point in points:
        title = ", ".join(f"{name} {value}" for name, value in (scheme | point).items() if value)
        with keep.point(title, point):
            workload = workload_of(loaded, **point)
            loaded.release()
            keep.measure("decode", compare, loaded, workload, **asked)
            if launches:
                keep.add("launches", {"parity": True} | measure_launches(loaded, workload))


def texts_of(text: str) -> list[str]:
    """The texts of a list like ``code,0.7``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    shares = re.compile(r"(0?\.\d+|0|1)$")
    if unknown := [name for name in names if name not in ("code", "story") and not shares.match(name)]:
        what = f"{', '.join(unknown)}: expected code, story, or a share from 0 to 1"
        raise typer.BadParameter(what, param_hint="--speculate")
    return names


def measure_drafts(
    name: str,
    loaded: LlamaForCausalLM,
    texts: list[str],
    assistant_model: str | None,
    points: list[dict[str, Any]],
    keep: Keeper,
    rounds: int,
) -> None:
    """Measure points with drafts and without."""
    from fastllama import LlamaForCausalLM, load_tokenizer

    from .speculation import measure

    tokenizer = load_tokenizer(name) if {"code", "story"} & {*texts} else None
    dtype, device = str(loaded.dtype).removeprefix("torch."), keep.device
    second = assistant_model and LlamaForCausalLM.from_pretrained(assistant_model, dtype, device)
    for point in points:
        sizes = {key: point[key] for key in ("batch", "prompt_len", "new_tokens")}
        with keep.point(f"speculation, {sizes}", point):
            loaded.release()
            keep.measure(
                "speculation", measure, loaded, tokenizer, texts, **sizes, rounds=rounds, assistant=second or None
            )


if __name__ == "__main__":
    app(prog_name="fastllama bench")
