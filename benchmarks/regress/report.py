"""What the gate found, for people (Markdown) and for programs (a plain object for JSON)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .gate import Result
from .rounds import BASE, HEAD, SIDES, Metric, Round
from .verdict import QUANTILE, SIGHT, Estimate, Interval, Outcome, Verdict, counts, estimate
from .worktrees import KEY_LENGTH, Revision

SCHEMA = 1
COLUMNS = ("", "base, ms", "head, ms", "change, %", "noise, %", "limit, %", "verdict")
SPREAD = ("base, p20 / p50 / p80", "head, p20 / p50 / p80")  # beside them in the report


def headline(result: Result) -> str:
    """The outcome in one line of plain text."""
    if result.refused:
        return f"FAIL: {result.difference}"
    names = {
        outcome: [str(metric) for metric in result.settings.metrics if _outcome(result, metric) is outcome]
        for outcome in Outcome
    }
    if result.failed:
        return f"FAIL: slower: {', '.join(names[Outcome.SLOWER])}"
    found = [f"faster: {', '.join(names[Outcome.FASTER])}"] if names[Outcome.FASTER] else []
    if names[Outcome.UNDECIDED]:
        return "; ".join(["INCONCLUSIVE, not failed", *found, f"cannot tell: {', '.join(names[Outcome.UNDECIDED])}"])
    return "; ".join(["PASS: not slower", *found])


def markdown(result: Result, machine: dict[str, Any], command: str, plot: str | None = None) -> str:
    """The report.

    Args:
        result: of the gate.
        machine: as :func:`..environment.environment` gives it.
        command: repeats the measurement.
        plot: address of the plot, relative to where the report will lie; None: there is none.
    """
    parts = [f"## Latency: {headline(result)}", _revisions(result)]
    if result.verdicts:
        parts += [_table(result), _explanation(result), _rounds(result)]
    if plot:
        parts.append(f"![change of every round]({plot})")
    parts += ["\n".join(f"- {line}" for line in [*_outputs(result), *result.notes])]
    parts += [_machine(result, machine), f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """A row of ``COLUMNS`` for each metric.

    A side's time is the one that is judged, the median over the rounds.
    """
    return [_row(metric, result) for metric in result.settings.metrics]


def to_dict(result: Result, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw samples included, of plain values; seconds, and natural logarithms of ratios."""
    settings = {
        name: [str(metric) for metric in value] if name == "metrics" else _plain(value)
        for name, value in vars(result.settings).items()
    }
    return {
        "schema": SCHEMA,
        "headline": headline(result),
        "failed": result.failed,
        "settings": settings,
        "base": asdict(result.base),
        "head": asdict(result.head),
        "difference": None if result.difference is None else asdict(result.difference),
        "timed_difference": None if result.timed_difference is None else asdict(result.timed_difference),
        "verdicts": {name: _finite(asdict(verdict)) for name, verdict in result.verdicts.items()},
        "rounds": [each.times for each in result.rounds],
        "workers": result.info,
        "notes": list(result.notes),
        "environment": machine,
    }


def pooled(rounds: Sequence[Round], metric: Metric, side: str) -> list[float]:
    """Every time of a side's two arms, in seconds."""
    arms = [arm for arm in SIDES if SIDES[arm] == side]
    return [value for each in rounds for arm in arms for turn in each.times[str(metric)][arm] for value in turn]


def _outcome(result: Result, metric: Metric) -> Outcome | None:
    verdict = result.verdicts.get(str(metric))
    return verdict.outcome if verdict else None


def _row(metric: Metric, result: Result) -> tuple[str, ...]:
    verdict = result.verdicts[str(metric)]
    return (
        str(metric),
        *(f"{1e3 * _typical(result.rounds, metric, side):.3f}" for side in (BASE, HEAD)),
        _with_interval(verdict.change),
        f"{100 * math.expm1(verdict.noise):.1f}",
        f"{100 * verdict.threshold:.1f}",
        verdict.outcome.value,
    )


def _table(result: Result) -> str:
    lines = [(*COLUMNS, *SPREAD), ("---",) * len((*COLUMNS, *SPREAD))]
    for metric, row in zip(result.settings.metrics, table_rows(result), strict=True):
        lines.append((metric.title, *row[1:], *(_spread(pooled(result.rounds, metric, side)) for side in (BASE, HEAD))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _typical(rounds: Sequence[Round], metric: Metric, side: str) -> float:
    arms = [arm for arm in SIDES if SIDES[arm] == side]
    return statistics.median(
        min(float(np.quantile(each.times[str(metric)][arm], QUANTILE)) for arm in arms) for each in rounds
    )


def _spread(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * value:.3f}" for value in np.quantile(seconds, (0.2, 0.5, 0.8)))


def _with_interval(change: Interval) -> str:
    if not math.isfinite(change.low):
        return "unknown"
    return f"{_signed(change.mean)} ({_signed(change.low)} to {_signed(change.high)})"


def _signed(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}"


def _explanation(result: Result) -> str:
    reasons = [f"- {metric.title}: {_why(result.verdicts[str(metric)])}" for metric in result.settings.metrics]
    warning = (
        "\n\n**The machine was too noisy to tell, or the change lies at the threshold. A slowdown "
        f"of {100 * SIGHT:.0f} % may be hidden: run this again when less else is running, or with more rounds.**"
        if result.has(Outcome.UNDECIDED)
        else ""
    )
    return "\n".join(reasons) + warning


def _why(verdict: Verdict) -> str:
    left_out = f"; {verdict.disturbed} disturbed, not counted" if verdict.disturbed else ""
    return f"{verdict.reason} ({verdict.rounds} rounds{left_out})"


def _rounds(result: Result) -> str:
    """Head against base in every round, so that a reader sees whether they agree; disturbed rounds in parentheses."""
    numbers = [str(number) for number in range(1, len(result.rounds) + 1)]
    lines = [["change in round, %", *numbers], ["---"] * (len(numbers) + 1)]
    for metric in result.settings.metrics:
        estimates = [estimate(each.times[str(metric)]) for each in result.rounds]
        lines.append([metric.title, *(_of_round(each, result.settings.threshold) for each in estimates)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_round(found: Estimate, threshold: float | None) -> str:
    change = _signed(found.change)
    return change if counts(found, threshold) else f"({change})"


def _revisions(result: Result) -> str:
    return "\n".join(f"- {side}: {_revision(getattr(result, side))}" for side in (BASE, HEAD))


def _revision(revision: Revision) -> str:
    where = "the checkout at " if revision.is_checkout else ""
    changes = ", with uncommitted changes" if revision.dirty else ""
    return f"{where}`{revision.commit[:KEY_LENGTH]}` {_escaped(revision.subject)}{changes}"


def _escaped(text: str) -> str:
    """A commit's subject as text, whatever it holds."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#!&@" else char for char in text)


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
        f"{settings.model}, {settings.dtype}, prompts of {settings.prompt_len} tokens, {settings.new_tokens} new ones; "
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
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)


def _finite(value: Any) -> Any:
    """Without infinities and NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, Outcome):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value
