"""``fastllama generate``: continue a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stderr, stdout, write
from fastllama.cli.reply import Reply, stream_reply

if TYPE_CHECKING:
    from fastllama_benchmarks.compare import Comparison  # pyright: ignore[reportMissingImports] (as in cli)

TABLE_TOKENS, TABLE_ROUNDS = 64, 2  # of each timed decode of --table


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    max_new_tokens: options.MaxNewTokens = None,
    sample: options.Sample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of streamed text.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Then time it beside the eager forward.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt, streaming the text to stdout."""
    with errors_in_one_line(debug):
        sampling = options.sampling_arguments(sample, temperature, top_k, top_p, min_p, seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        loaded = options.load(model, dtype, device, quantize, quiet)
        prompt_ids = list(loaded.tokenizer(text).input_ids)
        budget = loaded.budget(len(prompt_ids), max_new_tokens)
        show = _discard if as_json else _echo_after(text)
        reply = stream_reply(loaded, prompt_ids, show, quiet=quiet, max_new_tokens=budget, **sampling)
        if not as_json:
            write("\n")
        if not quiet:
            stderr().print(reply.speed(), style="dim")
        comparison = _compare(loaded, prompt_ids, budget, quiet) if table else None
        if as_json:
            write(json.dumps(_record(loaded, text, reply, comparison), ensure_ascii=False) + "\n")
        elif comparison:
            from fastllama_benchmarks.table import decode_table  # pyright: ignore[reportMissingImports]

            stdout().print(decode_table(comparison))


def _discard(_: str) -> None:
    """Show nothing."""


def _echo_after(prompt: str) -> Callable[[str], None]:
    """Write pieces of text to stdout; a person at a terminal sees the prompt ahead of the first."""
    pending = sys.stdout.isatty()

    def echo(piece: str) -> None:
        nonlocal pending
        if pending:
            stdout().print(prompt, style="dim", end="", markup=False, soft_wrap=True)
            pending = False
        write(piece)

    return echo


def _compare(loaded: options.Loaded, prompt_ids: list[int], budget: int, quiet: bool) -> Comparison:
    from fastllama_benchmarks.compare import compare  # pyright: ignore[reportMissingImports]
    from fastllama_benchmarks.harness import Workload  # pyright: ignore[reportMissingImports]

    workload = Workload((tuple(prompt_ids),), max(2, min(TABLE_TOKENS, budget)))
    with progress(quiet) as say:
        return compare(loaded.model, workload, rounds=TABLE_ROUNDS, peers=("eager",), say=say)


def _record(loaded: options.Loaded, prompt: str, reply: Reply, comparison: Comparison | None) -> dict[str, Any]:
    record = loaded.describe() | {
        "prompt": prompt,
        "text": reply.text,
        "prompt_ids": list(reply.prompt_ids),
        "ids": list(reply.decode.tokens),
        "timing": reply.timing(),
    }
    return record | ({"comparison": comparison.to_dict()} if comparison else {})
