"""``fastllama bench startup``: from a process's start to its first token, on empty and on warm compile caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress

from .shared import GptFast, LlamaBench, Peers, PromptLen, Record, chosen_peers, keep, show

if TYPE_CHECKING:
    from rich.console import Group

    from ..startup.measure import Startup

PHASES = {"import": "import", "load": "load", "compile": "compile", "first_token": "1st token"}
TOTALS = ("to_first_token", "to_last_token")

Rounds = Annotated[int, typer.Option(min=1, help="Processes of each contender on warm caches.")]
ColdRounds = Annotated[int, typer.Option(min=1, help="Processes of each contender on empty caches.")]


def startup(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    prompt_len: PromptLen = 32,
    rounds: Rounds = 3,
    cold_rounds: ColdRounds = 1,
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
        names, places = chosen_peers(peers, gpt_fast, llama_bench)
        from ..startup.measure import measure

        with progress(quiet) as say:
            found = measure(
                model,
                dtype=dtype,
                device=options.pick_device(device),
                prompt_len=prompt_len,
                rounds=rounds,
                cold_rounds=cold_rounds,
                peers=names,
                places=places,
                say=say,
            )
        show(startup_table(found), json_file)
        keep("startup", found.to_dict(), found.device, json_file, record)


def startup_table(found: Startup) -> Group:
    """A row for each contender and state of the caches, then what the figures are worth."""
    from ..startup.measure import EMPTY, WARM
    from ..table import empty_table, with_remarks

    table = empty_table(("", *PHASES.values(), "to 1st", "to last", "ours is"))
    for starts in found.starts:
        table.add_row(starts.name)
        for caches in (EMPTY, WARM):
            phases = starts.medians(caches)
            cells = [f"{phases[name]:.2f}" if name in phases else "" for name in (*PHASES, *TOTALS)]
            ratio = "" if starts is found.starts[0] else f"{found.ratio(starts, caches):.3g} x"
            table.add_row(f"  {caches} caches", *cells, ratio)
    return with_remarks(table, _remarks(found))


def _remarks(found: Startup) -> list[str]:
    ours, *others = found.starts
    rounds, cold_rounds = (len(ours.phases[caches]) for caches in ("warm", "empty"))
    assert ours.parity is not None
    outcome = "passed" if ours.parity.passed else f"FAILED: {ours.parity.note}"
    lines = [
        f"seconds, medians of {cold_rounds} and {rounds} processes; prompt of {found.workload.prompt_len} tokens, "
        f"{found.workload.new_tokens} new ones",
        "compile: what the first call takes longer than a settled one; 1st token: of a settled call; to 1st, to last: "
        "from the process's start to the first and the last token of the first call",
        f"parity {outcome}",
    ]
    for peer in others:
        if peer.parity is None:
            lines.append(f"{peer.name} does not tell its tokens: not checked")
        elif not peer.parity.passed:
            lines.append(f"{peer.name} FAILED parity: {peer.parity.note}")
    return [*lines, *(f"{name} not started: {why}" for name, why in found.missing.items())]
