"""``fastllama bench``: decoding speed and its parts, beside peers and the floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.console import RenderableType
from typer.core import TyperGroup

from fastllama import LlamaForCausalLM
from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress

from .kernels import kernels
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
    describe,
    keep,
    show,
)
from .startup import startup
from .sweep import sweep

TABLE_TOKENS, TABLE_ROUNDS = 64, 2  # of each timed decode of generate_table


class _DecodeByDefault(TyperGroup):
    """``fastllama bench --model x`` is ``fastllama bench decode --model x``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wants_help = bool(args) and args[0] in ctx.help_option_names
        if not wants_help and (not args or args[0] not in self.commands):
            args.insert(0, "decode")
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DecodeByDefault, help="Measure decoding beside peers and the floor (decode is the default).")


@app.command()
def decode(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    batch: Batch = 1,
    prompt_len: PromptLen = 64,
    new_tokens: NewTokens = 64,
    capacity: Capacity = None,
    rounds: Rounds = 5,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second of a greedy decode: fastllama, its peers and the floor by turns, outputs checked."""
    with errors_in_one_line(debug):
        from .. import compare, table
        from ..harness import Workload
        from ..plots import draw

        draw.ready(plot)
        names, places = chosen_peers(peers, gpt_fast, llama_bench)
        loaded = options.load(model, dtype, device, quantize, quiet)
        workload = Workload.random(loaded.model.config.vocab_size, batch, prompt_len, new_tokens, capacity)
        with progress(quiet) as say:
            comparison = compare.compare(loaded.model, workload, rounds=rounds, peers=names, places=places, say=say)
        show(table.decode_table(comparison), json_file)
        fields = describe(loaded, quantize) | comparison.to_dict()
        kept = keep("decode", fields, loaded.model.device, json_file, record)
        if plot:
            draw.contenders(kept, plot)


@app.command()
def prefill(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    batch: Batch = 1,
    prompt_len: PromptLen = 512,
    rounds: Rounds = 5,
    peers: Peers = "all",
    gpt_fast: GptFast = None,
    llama_bench: LlamaBench = None,
    json_file: options.JsonFile = None,
    record: Record = None,
    plot: Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Time to the first token of a prompt, beside peers."""
    with errors_in_one_line(debug):
        from .. import compare, table
        from ..harness import Workload
        from ..plots import draw
        from ..prefill import prefill_fields, prefill_flops

        draw.ready(plot)
        names, places = chosen_peers(peers, gpt_fast, llama_bench)
        loaded = options.load(model, dtype, device, quantize, quiet)
        workload = Workload.random(loaded.model.config.vocab_size, batch, prompt_len, 1)
        flops = prefill_flops(loaded.model, workload)
        with progress(quiet) as say:
            comparison = compare.compare(loaded.model, workload, rounds=rounds, peers=names, places=places, say=say)
        show(table.prefill_table(comparison, flops), json_file)
        fields = describe(loaded, quantize) | prefill_fields(comparison, flops)
        kept = keep("prefill", fields, loaded.model.device, json_file, record)
        if plot:
            draw.contenders(kept, plot)


for command in (startup, kernels, sweep):
    app.command()(command)


def generate_table(
    model: LlamaForCausalLM, prompt_ids: list[int], new_tokens: int, say: Callable[[str], None]
) -> tuple[RenderableType, dict[str, Any]]:
    """What ``fastllama generate --table`` shows: the prompt decoded again, compared with the eager forward."""
    from ..compare import compare
    from ..harness import Workload
    from ..table import decode_table

    workload = Workload((tuple(prompt_ids),), max(2, min(TABLE_TOKENS, new_tokens)))
    comparison = compare(model, workload, rounds=TABLE_ROUNDS, peers=("eager",), say=say)
    return decode_table(comparison), comparison.to_dict()
