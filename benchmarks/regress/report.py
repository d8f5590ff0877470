"""What the gate found, for people (console, Markdown) and for programs (a plain object for JSON)."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text

from ..report import markdown as markdown_table
from ..report import terminal
from .gate import Result
from .revisions import KEY_LENGTH
from .rounds import BASE, HEAD, SIDES, Metric
from .verdict import QUANTILE, SIGHT, Outcome, counts, estimate

SCHEMA = 1
COLUMNS = ["", "base, ms", "head, ms", "change, %", "noise, %", "limit, %", "verdict"]
ARMS_OF = {side: [arm for arm in SIDES if SIDES[arm] == side] for side in (BASE, HEAD)}


def headline(result: Result) -> str:
    """The outcome in one line of plain text."""
    if result.refused:
        return f"FAIL: {result.difference}"
    slower, faster, _, undecided = (
        ", ".join(name for name, verdict in result.verdicts.items() if verdict.outcome is outcome)
        for outcome in Outcome
    )
    if slower:
        return f"FAIL: slower: {slower}"
    parts = ["INCONCLUSIVE, not failed" if undecided else "PASS: not slower", faster and f"faster: {faster}"]
    return "; ".join(filter(None, [*parts, undecided and f"undecided: {undecided}"]))


def table(result: Result) -> pd.DataFrame:
    """A row for each metric; a side's time is the one that is judged, the median over the rounds."""
    return pd.DataFrame([_row(metric, result) for metric in result.settings.metrics], columns=COLUMNS)


def show(result: Result, console: Console) -> None:
    """Print the table and the outcome."""
    if result.verdicts:
        console.print(terminal(table(result)))
    color = "red" if result.failed else "yellow" if result.undecided else "green"
    console.print(Text(headline(result), style=color))


def markdown(result: Result, machine: dict[str, Any], command: str) -> str:
    """The report, where ``machine`` is an environment and ``command`` repeats the measurement."""
    parts = [f"## Latency: {headline(result)}", _revisions(result)]
    if result.verdicts:
        parts += [markdown_table(table(result)), "\n".join(_reasons(result)), markdown_table(_rounds(result))]
    parts += ["\n".join(f"- {line}" for line in [*_outputs(result), *result.notes])]
    parts += ["\n".join(f"- {line}" for line in _machine(result, machine)), f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def to_dict(result: Result, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw samples included, as JSON has it; seconds, and natural logarithms of ratios."""
    names = ("settings", "base", "head", "verdicts", "difference", "timed_difference", "notes")
    found = {
        "schema": SCHEMA,
        "headline": headline(result),
        "failed": result.failed,
        **{name: getattr(result, name) for name in names},
        "rounds": [each.times for each in result.rounds],
        "workers": result.info,
        "environment": machine,
    }

    def plain(value: Any) -> Any:
        return vars(value) if is_dataclass(value) and not isinstance(value, Metric) else str(value)

    return json.loads(json.dumps(found, default=plain), parse_constant=lambda infinite: None)


def _row(metric: Metric, result: Result) -> list[str]:
    verdict = result.verdicts[str(metric)]
    mean, low, high = map(_signed, vars(verdict.change).values())
    interval = f"{mean} ({low} to {high})" if math.isfinite(verdict.change.low) else "unknown"
    rounds = [each.times[str(metric)] for each in result.rounds]
    typical = [
        statistics.median(min(float(np.quantile(times[arm], QUANTILE)) for arm in arms) for times in rounds)
        for arms in ARMS_OF.values()
    ]
    percents = (f"{100 * value:.1f}" for value in (math.expm1(verdict.noise), verdict.threshold))
    return [str(metric), *(f"{1e3 * each:.3f}" for each in typical), interval, *percents, verdict.outcome.value]


def _signed(log_ratio: float) -> str:
    return f"{100 * math.expm1(min(log_ratio, 700.0)):+.1f}"


def _reasons(result: Result) -> Iterator[str]:
    for metric in result.settings.metrics:
        found = result.verdicts[str(metric)]
        left_out = f"; {found.disturbed} disturbed, not counted" if found.disturbed else ""
        yield f"- {metric.title}: {found.reason} ({found.rounds} rounds{left_out})"
    if result.undecided:
        yield (
            "\n**The machine was too noisy, or the change lies at the threshold. A slowdown of "
            f"{100 * SIGHT:.0f} % may be hidden: run this again when less else is running, or with more rounds.**"
        )


def _rounds(result: Result) -> pd.DataFrame:
    rows = []
    for metric in result.settings.metrics:
        found = [estimate(each.times[str(metric)]) for each in result.rounds]
        forms = ["{}" if counts(each, result.settings.threshold) else "({})" for each in found]
        rows.append(
            [metric.title, *(form.format(_signed(each.change)) for form, each in zip(forms, found, strict=True))]
        )
    return pd.DataFrame(rows, columns=["change in round, %", *map(str, range(1, len(result.rounds) + 1))])


def _revisions(result: Result) -> str:
    lines = []
    for side, revision in ((BASE, result.base), (HEAD, result.head)):
        where = "the checkout at " if revision.is_checkout else ""
        changes = ", with uncommitted changes" if revision.dirty else ""
        subject = "".join(f"\\{char}" if char in "\\`*_[]<>|#!&@" else char for char in revision.subject)
        lines.append(f"- {side}: {where}`{revision.commit[:KEY_LENGTH]}` {subject}{changes}")
    return "\n".join(lines)


def _outputs(result: Result) -> Iterator[str]:
    dtype = result.settings.dtype
    if result.difference is None:
        yield "Outputs are equal, token for token, in float32."
    else:
        yield f"In float32 {result.difference}{'' if result.refused else ' (accepted)'}."
    if result.timed_difference is not None:
        yield f"In {dtype} {result.timed_difference}; that is allowed: near ties round either way."
    elif result.rounds:
        yield f"In {dtype}, which was timed, they are equal too."


def _machine(result: Result, machine: dict[str, Any]) -> Iterator[str]:
    asked, count = result.settings, len(result.rounds)
    sizes = f"prompts of {asked.prompt_len} tokens, {asked.new_tokens} new tokens"
    yield f"{asked.model}, {asked.dtype}, {sizes}; {count} rounds of {asked.turns} turns"
    gpu = machine.get("gpu") or {}
    yield f"{machine['cpu']}, {machine['cores']} cores" + (f"; {gpu['name']}" if gpu else "")
    if info := result.info.get(BASE):
        yield f"{info['device']}, torch {info['torch']}, Python {info['python']}, {info['threads']} threads"
