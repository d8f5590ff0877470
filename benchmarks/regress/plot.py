"""The plot of a report: what every round has seen of every metric."""

from __future__ import annotations

import math
from pathlib import Path

from ..harness import Unavailable
from .gate import Result
from .verdict import estimate

CHANGE_COLOR, NOISE_COLOR, LIMIT_COLOR = "#d1495b", "#8d96a3", "#30638e"


def draw(result: Result, path: Path) -> None:
    """Draw change and noises of each round, with the thresholds and the interval of the mean, to a file.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Unavailable("no plot without matplotlib: pip install 'fastllama[bench]'") from None
    metrics = result.settings.metrics
    figure = Figure(figsize=(3.6 * len(metrics), 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        verdict = result.verdicts[str(metric)]
        estimates = [estimate(each.times[str(metric)]) for each in result.rounds]
        numbers = range(1, len(estimates) + 1)
        change = [_percent(each.change) for each in estimates]
        noises = [
            (number, _percent(noise)) for number, each in zip(numbers, estimates, strict=True) for noise in each.noises
        ]
        axes.axhline(0, color="black", linewidth=0.8)
        for side in (1, -1):
            axes.axhline(_percent(side * math.log1p(verdict.threshold)), color=LIMIT_COLOR, linestyle="--", linewidth=1)
        if math.isfinite(verdict.change.low):
            band = (_percent(verdict.change.low), _percent(verdict.change.high))
            axes.axhspan(*band, color=CHANGE_COLOR, alpha=0.15, label="95 % of the mean change")
        axes.plot(*zip(*noises, strict=True), "o", color=NOISE_COLOR, fillstyle="none", label="equal code")
        axes.plot(numbers, change, "o", color=CHANGE_COLOR, label="head to base")
        axes.set_title(f"{metric.title}: {verdict.outcome.value}", fontsize=10)
        axes.set_xlabel("round")
        axes.set_xticks(list(numbers))
    figure.axes[0].set_ylabel("change in % (above zero: slower)")
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)
