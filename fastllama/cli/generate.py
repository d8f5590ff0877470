"""``fastllama generate``: continue a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stderr, stdout, write
from fastllama.cli.reply import Reply, stream_reply

TABLES = "fastllama.tables"  # the entry points behind --table; fastllama_benchmarks provides the one named decode


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - for stdin.")],
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    kv_cache_dtype: options.KVCacheDtype = None,
    max_new_tokens: options.MaxNewTokens = None,
    sample: options.Sample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    speculate: options.Speculate = False,
    assistant_model: options.AssistantModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of streamed text.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="A table of timings, compared with the eager forward.")
    ] = False,
    strict: options.Strict = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt; the new text streams to stdout."""
    with errors_in_one_line(debug):
        sampling = options.sampling_arguments(sample, temperature, top_k, top_p, min_p, seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        loaded = options.load(model, dtype, device, quiet, strict, quantize, kv_cache_dtype)
        sampling |= options.draft_arguments(speculate, assistant_model, loaded, quiet)
        prompt_ids = list(loaded.tokenizer(text).input_ids)
        budget = loaded.budget(len(prompt_ids), max_new_tokens)
        show = _discard if as_json else _echo_after(text)
        reply = stream_reply(loaded, prompt_ids, show, quiet=quiet, max_new_tokens=budget, **sampling)
        if not as_json:
            write("\n")
        if not quiet:
            stderr().print(reply.speed(), style="dim")
        shown, comparison = _table(loaded, prompt_ids, budget, quiet) if table else (None, None)
        if as_json:
            write(json.dumps(_record(loaded, text, reply, comparison), ensure_ascii=False) + "\n")
        elif shown:
            stdout().print(shown)
            if reply.drafts:
                stdout().print(reply.drafts, style="dim")


def _discard(_: str) -> None:
    """Show nothing."""


def _echo_after(prompt: str) -> Callable[[str], None]:
    """Write pieces of text to stdout; on a terminal, the prompt comes before the first."""
    pending = sys.stdout.isatty()

    def echo(piece: str) -> None:
        nonlocal pending
        if pending:
            stdout().print(prompt, style="dim", end="", markup=False, soft_wrap=True)
            pending = False
        write(piece)

    return echo


def _table(loaded: options.Loaded, prompt_ids: list[int], budget: int, quiet: bool) -> tuple[Any, dict[str, Any]]:
    """The table of ``--table``, to print and as a record."""
    from importlib.metadata import entry_points

    found = entry_points(group=TABLES, name="decode")
    if not found:
        raise ImportError(
            "--table needs fastllama's benchmarks, which are not installed: pip install 'fastllama[bench]'"
        )
    (entry_point,) = found
    with progress(quiet) as say:
        return entry_point.load()(loaded.model, prompt_ids, budget, say)


def _record(loaded: options.Loaded, prompt: str, reply: Reply, comparison: dict[str, Any] | None) -> dict[str, Any]:
    record = loaded.describe() | {
        "prompt": prompt,
        "text": reply.text,
        "prompt_ids": list(reply.prompt_ids),
        "ids": list(reply.decode.tokens),
        "timing": reply.timing(),
    }
    return record | ({"comparison": comparison} if comparison else {})
