"""The gate itself: revisions made ready, outputs compared, then rounds until there is a verdict."""

import filecmp
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from ..contenders import FASTLLAMA, Task
from ..contenders.remote import Remote
from ..rounds import Say
from ..workload import Unavailable, Workload
from .outputs import Difference, compare, first_difference, prompts
from .revisions import Revision, files_of, git, resolve
from .rounds import BASE, HEAD, SIDES, Metric, Round, lead_in, run_round
from .verdict import THRESHOLD, Outcome, Verdict, estimate, judge

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
REQUIREMENTS = "pyproject.toml"
REFERENCE_DTYPE = "float32"
BUSY = 0.5  # load for each core that is worth a note


class BaseUnavailable(Unavailable):
    """The base cannot be measured, so nothing can be said of the head."""


@dataclass(frozen=True)
class Settings:
    """What to compare, and how."""

    repo: Path
    base: str  # revisions; ``.`` is the checkout as it is
    head: str
    cache: Path  # for worktrees and what was compiled
    metrics: tuple[Metric, ...]
    model: str = "demo"
    dtype: str = "bfloat16"
    device: str = "cpu"
    prompt_len: int = 128
    new_tokens: int = 64
    rounds: int = 3
    max_rounds: int = 12
    turns: int = 8  # runs of each arm and batch size in a round
    minutes: float = 15.0  # after which no round beyond ``rounds`` is started
    threshold: float | None = None  # a fraction; None: ``verdict.THRESHOLD`` on CUDA, calibrated on a CPU
    accept_different_outputs: bool = False
    python: Path = Path(sys.executable)  # of both
    threads: int | None = None  # of each worker
    slowdown: float = 0.0  # fraction by which every step of the head is made longer, to prove that it is seen

    @property
    def batches(self) -> list[int]:
        """Batch sizes that the metrics need."""
        return sorted({metric.batch for metric in self.metrics})

    def workload(self, vocab_size: int, batch: int) -> Workload:
        """What is timed at a batch size."""
        return Workload.random(vocab_size, batch, self.prompt_len, self.new_tokens)


class Side(NamedTuple):
    """One of the two revisions, ready to decode."""

    revision: Revision
    tree: Path  # its files; next to them, what was compiled from them


@dataclass(frozen=True)
class Result:
    """What an invocation of the gate has found."""

    settings: Settings
    base: Revision
    head: Revision
    difference: Difference | None = None  # of float32 outputs
    timed_difference: Difference | None = None  # of those in the timed dtype
    rounds: tuple[Round, ...] = ()  # none where outputs differ
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)  # by metric
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether outputs differ and nobody accepted that."""
        return self.difference is not None and not self.settings.accept_different_outputs

    @property
    def failed(self) -> bool:
        """Whether the head must not be merged: other outputs, or slower."""
        return self.refused or Outcome.SLOWER in self.outcomes

    @property
    def undecided(self) -> bool:
        """Whether a metric is inconclusive."""
        return Outcome.UNDECIDED in self.outcomes

    @property
    def outcomes(self) -> set[Outcome]:
        """How the metrics came out."""
        return {verdict.outcome for verdict in self.verdicts.values()}

    @property
    def info(self) -> dict[str, Mapping[str, Any]]:
        """What the workers of each arm said of themselves."""
        return self.rounds[0].info if self.rounds else {}


def run(settings: Settings, say: Say) -> Result:
    """Compare two revisions."""
    load = os.getloadavg()[0]
    repo = Path(git(settings.repo, "rev-parse", "--show-toplevel"))
    base, head = resolve(repo, settings.base), resolve(repo, settings.head)
    with ExitStack() as stack:
        settings.cache.mkdir(parents=True, exist_ok=True)  # two runs at once would be each other's noise
        stack.enter_context(FileLock(settings.cache / "lock"))
        sides = {}
        for side, revision in {BASE: base, HEAD: head}.items():
            say(f"checking out the {side} {revision}")
            tree = settings.cache / "revisions" / revision.key / "tree"
            if all(each.tree != tree for each in sides.values()):
                stack.enter_context(files_of(repo, revision, tree))
            sides[side] = Side(revision, tree)
        gate = Gate(settings, sides, say)
        difference = gate.compare_outputs()
        result = Result(settings, base, head, difference, notes=tuple(notes(sides, settings, load)))
        if result.refused:
            return result
        gate.warm_up()
        return gate.measure(result)


class Gate:
    """Two revisions that are ready, and the workers to measure them with."""

    def __init__(self, settings: Settings, sides: Mapping[str, Side], say: Say) -> None:
        self._settings, self._sides, self._say = settings, sides, say

    def start(self, arm: str, dtype: str | None = None) -> Remote:
        """Start the worker of an arm, which decodes a little of each batch size, the largest first, to be ready."""
        settings, side = self._settings, self._sides[SIDES[arm]]
        paths = os.pathsep.join(map(str, (side.tree, side.tree / "kernels")))
        folders = {name: str(side.tree.with_name("caches") / name.lower()) for name in CACHES}
        threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
        worker = Remote(
            FASTLLAMA,
            name=f"the {SIDES[arm]} {side.revision}",
            python=settings.python,
            env={**os.environ, "PYTHONPATH": paths, **folders, **threads},
            tree=side.tree,
            warm_up=[lead_in(settings.workload(2, batch)) for batch in reversed(settings.batches)],
        )
        slowdown = settings.slowdown if SIDES[arm] == HEAD else 0.0
        asked = (settings.model, dtype or settings.dtype, settings.device)
        worker.load(Task(*asked, threads=settings.threads, slowdown=slowdown))
        return worker

    def compare_outputs(self) -> Difference | None:
        """The parity gate in float32."""
        self._say(f"comparing outputs in {REFERENCE_DTYPE}")
        with self._both(REFERENCE_DTYPE) as (base, head):
            vocab_size = min(base.info["vocab_size"], head.info["vocab_size"])
            return compare(base, head, prompts(vocab_size, self._settings.batches, self._settings.prompt_len))

    def warm_up(self) -> None:
        """Compile everything in processes that are not measured: one that compiles is not like one that does not."""
        if self._settings.dtype != REFERENCE_DTYPE:
            self._say(f"warming up in {self._settings.dtype}")
            with self._both(self._settings.dtype):
                pass

    def measure(self, result: Result) -> Result:
        """Rounds until there is a verdict, or until there were enough."""
        settings, rounds = self._settings, []
        verdicts: dict[str, Verdict] = {}
        end = time.monotonic() + 60 * settings.minutes

        def go_on() -> bool:
            outcomes = {verdict.outcome for verdict in verdicts.values()}
            is_decided = Outcome.SLOWER in outcomes or Outcome.UNDECIDED not in outcomes
            return not is_decided and len(rounds) < settings.max_rounds and time.monotonic() < end

        threshold = settings.threshold or (THRESHOLD if settings.device.startswith("cuda") else None)
        while len(rounds) < settings.rounds or go_on():
            self._say(f"round {len(rounds) + 1} of at least {settings.rounds}")
            sizes = (settings.metrics, settings.workload, settings.turns)
            rounds.append(run_round(len(rounds), self.start, *sizes))
            verdicts = verdicts_of(rounds, threshold)
        base, head = rounds[0].tokens[BASE], rounds[0].tokens[HEAD]
        found = (first_difference(base[batch], head[batch], settings.prompt_len) for batch in settings.batches)
        difference = next(filter(None, found), None)
        return replace(result, timed_difference=difference, rounds=tuple(rounds), verdicts=verdicts)

    @contextmanager
    def _both(self, dtype: str) -> Iterator[tuple[Remote, Remote]]:
        with ExitStack() as stack:
            base, head = (stack.enter_context(closing(self.start(arm, dtype))) for arm in (BASE, HEAD))
            assert head.info  # the head first: what both lack is no fault of the base
            try:
                assert base.info
            except Unavailable as error:
                raise BaseUnavailable(str(error)) from None
            yield base, head


def verdicts_of(rounds: Sequence[Round], threshold: float | None) -> dict[str, Verdict]:
    """The verdict on every metric after these rounds."""
    return {metric: judge([estimate(each.times[metric]) for each in rounds], threshold) for metric in rounds[0].times}


def notes(sides: Mapping[str, Side], settings: Settings, load: float) -> Iterator[str]:
    """What a reader should know besides the verdicts."""
    (base, head), cores = sides.values(), os.cpu_count() or 1
    if load > BUSY * cores:
        yield f"Something else was running: before this began, the load was {load:.1f} on {cores} cores."
    if settings.slowdown:
        yield f"Every step of the head was made {100 * settings.slowdown:g} % longer on purpose."
    if base.revision.key == head.revision.key:
        yield "Base and head are the same files: whatever differs is noise."
    elif not filecmp.cmp(base.tree / REQUIREMENTS, head.tree / REQUIREMENTS, shallow=False):
        yield f"The revisions have different requirements; both ran on what {settings.python} has installed."
