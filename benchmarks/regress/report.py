"""What the gate found, for people (Markdown) and for programs (a plain object for JSON)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report import markdown as markdown_table
from .gate import Result
from .revisions import KEY_LENGTH
from .rounds import BASE, HEAD, SIDES, Metric, Round
from .verdict import QUANTILE, SIGHT, Outcome, counts, estimate

SCHEMA = 1
COLUMNS = ("", "base, ms", "head, ms", "change, %", "noise, %", "limit, %", "verdict")
SPREAD = ("base, p20 / p50 / p80", "head, p20 / p50 / p80")  # further columns of the report


def headline(result: Result) -> str:
    """The outcome in one line of plain text."""
    if result.refused:
        return f"FAIL: {result.difference}"
    slower, faster, _, undecided = (
        ", ".join(name for name, verdict in result.verdicts.items() if verdict.outcome is outcome) for outcome in Outcome
    )
    if slower:
        return f"FAIL: slower: {slower}"
    parts = ["INCONCLUSIVE, not failed" if undecided else "PASS: not slower", faster and f"faster: {faster}"]
    return "; ".join(filter(None, [*parts, undecided and f"undecided: {undecided}"]))


def markdown(result: Result, machine: dict[str, Any], command: str) -> str:
    """The report."""
    parts = [f"## Latency: {headline(result)}", _revisions(result)]
    if result.verdicts:
        full = table(result)
        for side, name in zip((BASE, HEAD), SPREAD, strict=True):
            full[name] = [_spread(pooled(result.rounds, metric, side)) for metric in result.settings.metrics]
        full[""] = [metric.title for metric in result.settings.metrics]
        parts += [markdown_table(full), _explanation(result), markdown_table(_rounds(result))]
    parts += ["\n".join(f"- {line}" for line in [*_outputs(result), *result.notes])]
    parts += [_machine(result, machine), f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def table(result: Result) -> pd.DataFrame:
    """A row for each metric; a side's time is the one that is judged, the median over the rounds."""
    return pd.DataFrame([_row(metric, result) for metric in result.settings.metrics], columns=list(COLUMNS))


def show(result: Result, console: Console) -> None:
    """Print the table and the outcome."""
    if result.verdicts:
        shown = Table(*COLUMNS, box=None, pad_edge=False, header_style="")
        for row in table(result).itertuples(index=False):
            shown.add_row(*map(Text, row))
        console.print(shown)
    color = "red" if result.failed else "yellow" if result.has(Outcome.UNDECIDED) else "green"
    console.print(Text(headline(result), style=color))


def to_dict(result: Result, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw samples included, of plain values; seconds, and natural logarithms of ratios."""
    plain = {name: _plain(getattr(result, name)) for name in ("settings", "base", "head", "verdicts")}
    plain |= {name: _plain(getattr(result, name)) for name in ("difference", "timed_difference")}
    return {
        "schema": SCHEMA,
        "headline": headline(result),
        "failed": result.failed,
        **plain,
        "rounds": [each.times for each in result.rounds],
        "workers": result.info,
        "notes": list(result.notes),
        "environment": machine,
    }


def pooled(rounds: Sequence[Round], metric: Metric, side: str) -> list[float]:
    """Every time of a side's two arms, in seconds."""
    arms = [arm for arm in SIDES if SIDES[arm] == side]
    return [value for each in rounds for arm in arms for turn in each.times[str(metric)][arm] for value in turn]


def _row(metric: Metric, result: Result) -> tuple[str, ...]:
    verdict = result.verdicts[str(metric)]
    mean, low, high = (_signed(value) for value in vars(verdict.change).values())
    return (
        str(metric),
        *(f"{1e3 * _typical(result.rounds, metric, side):.3f}" for side in (BASE, HEAD)),
        f"{mean} ({low} to {high})" if math.isfinite(verdict.change.low) else "unknown",
        f"{100 * math.expm1(verdict.noise):.1f}",
        f"{100 * verdict.threshold:.1f}",
        verdict.outcome.value,
    )


def _typical(rounds: Sequence[Round], metric: Metric, side: str) -> float:
    arms = [arm for arm in SIDES if SIDES[arm] == side]
    return statistics.median(
        min(float(np.quantile(each.times[str(metric)][arm], QUANTILE)) for arm in arms) for each in rounds
    )


def _spread(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * value:.3f}" for value in np.quantile(seconds, (0.2, 0.5, 0.8)))


def _signed(log_ratio: float) -> str:
    return f"{100 * math.expm1(min(log_ratio, 700.0)):+.1f}"


def _explanation(result: Result) -> str:
    lines = []
    for metric in result.settings.metrics:
        found = result.verdicts[str(metric)]
        left_out = f"; {found.disturbed} disturbed, not counted" if found.disturbed else ""
        lines.append(f"- {metric.title}: {found.reason} ({found.rounds} rounds{left_out})")
    warning = (
        "\n\n**The machine was too noisy, or the change lies at the threshold. A slowdown of "
        f"{100 * SIGHT:.0f} % may be hidden: run this again when less else is running, or with more rounds.**"
        if result.has(Outcome.UNDECIDED)
        else ""
    )
    return "\n".join(lines) + warning


def _rounds(result: Result) -> pd.DataFrame:
    """Head against base in every round, so that a reader sees whether they agree; disturbed rounds in parentheses."""
    rows = []
    for metric in result.settings.metrics:
        found = [estimate(each.times[str(metric)]) for each in result.rounds]
        count = [counts(each, result.settings.threshold) for each in found]
        changes = [_signed(each.change) for each in found]
        rows.append([metric.title, *(text if counted else f"({text})" for text, counted in zip(changes, count, strict=True))])
    return pd.DataFrame(rows, columns=["change in round, %", *map(str, range(1, len(result.rounds) + 1))])


def _revisions(result: Result) -> str:
    """The two revisions; a commit's subject is text, whatever it holds."""
    lines = []
    for side, revision in ((BASE, result.base), (HEAD, result.head)):
        where = "the checkout at " if revision.is_checkout else ""
        changes = ", with uncommitted changes" if revision.dirty else ""
        subject = "".join(f"\\{char}" if char in "\\`*_[]<>|#!&@" else char for char in revision.subject)
        lines.append(f"- {side}: {where}`{revision.commit[:KEY_LENGTH]}` {subject}{changes}")
    return "\n".join(lines)


def _outputs(result: Result) -> Iterator[str]:
    if result.difference is None:
        yield "Outputs are equal, token for token, in float32."
    else:
        accepted = "" if result.refused else " (accepted)"
        yield f"In float32 {result.difference}{accepted}."
    if result.timed_difference is not None:
        yield f"In {result.settings.dtype} {result.timed_difference}; that is allowed: near ties round either way."
    elif result.rounds:
        yield f"In {result.settings.dtype}, which was timed, they are equal too."


def _machine(result: Result, machine: dict[str, Any]) -> str:
    settings = result.settings
    lines = [
        f"{settings.model}, {settings.dtype}, prompts of {settings.prompt_len} tokens, {settings.new_tokens} new tokens; "
        f"{len(result.rounds)} rounds of {settings.turns} turns"
    ]
    gpu = machine.get("gpu") or {}
    lines.append(f"{machine['cpu']}, {machine['cores']} cores" + (f"; {gpu['name']}" if gpu else ""))
    for side in (BASE, HEAD):
        if info := result.info.get(side):
            lines.append(
                f"{side}: {info['device']}, torch {info['torch']}, Python {info['python']}, {info['threads']} threads"
            )
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> Any:
    """A value as JSON has it: no infinities, NaN, paths or metrics."""
    if isinstance(value, Outcome):
        return value.value
    if is_dataclass(value) and not isinstance(value, (Metric, type)):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str)) or value is None else str(value)
