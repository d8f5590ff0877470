"""The gate itself: revisions made ready, outputs compared, then rounds until there is a verdict.

Rounds go on past the first few only while a metric is inconclusive: noise costs time, and hides nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..harness import Unavailable, Workload
from ..remote import Remote
from .environments import Requirements, interpreter, prune
from .outputs import Difference, compare, first_difference, prompts
from .rounds import BASE, HEAD, SIDES, Metric, Round, run_round
from .verdict import THRESHOLD, Outcome, Verdict, estimate, judge
from .worktrees import Revision, files_of, repository, resolve

START = Path(__file__).with_name("start.py")
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "TRITON_CACHE_DIR": "triton",
}
REFERENCE_DTYPE = "float32"
BUSY = 0.5  # load for each core that is worth a note
KEPT_REVISIONS, KEPT_ENVIRONMENTS = 16, 4  # in the cache folder, by last use

Say = Callable[[str], None]


class BaseUnavailable(Unavailable):
    """The base cannot be measured, so nothing can be said of the head."""


@dataclass(frozen=True)
class Settings:
    """What to compare, and how.

    Attributes:
        repo: a folder in the repository.
        base, head: revisions; ``.`` is the checkout as it is.
        model, dtype, device: what decodes; the device is CUDA where there is one if None.
        metrics: what is judged.
        prompt_len, new_tokens: of every decode.
        rounds, max_rounds: so many at least, and at most.
        turns: runs of each arm and batch size in a round.
        minutes: after so many no further round is started, once there were ``rounds``.
        threshold: slowdown as a fraction; None: ``verdict.THRESHOLD`` on CUDA, calibrated on a CPU.
        accept_different_outputs: measure although outputs differ.
        python: interpreter for both; None: an environment for each set of requirements.
        threads: of each worker; None: as many as torch takes.
        cache: folder for environments, worktrees and what was compiled.
    """

    repo: Path
    base: str
    head: str
    cache: Path
    metrics: tuple[Metric, ...]
    model: str = "demo"
    dtype: str = "bfloat16"
    device: str | None = None
    prompt_len: int = 128
    new_tokens: int = 64
    rounds: int = 3
    max_rounds: int = 12
    turns: int = 8
    minutes: float = 15.0
    threshold: float | None = None
    accept_different_outputs: bool = False
    python: Path | None = None
    threads: int | None = None

    @property
    def batches(self) -> list[int]:
        """Batch sizes that the metrics need."""
        return sorted({metric.batch for metric in self.metrics})

    def workload(self, vocab_size: int, batch: int) -> Workload:
        """What is timed at a batch size."""
        return Workload.random(vocab_size, batch, self.prompt_len, self.new_tokens)


@dataclass(frozen=True)
class Side:
    """One of the two revisions, ready to decode.

    Attributes:
        revision: which.
        tree: folder with its files.
        python: interpreter of its environment.
        caches: folder for what is compiled from it.
        requirements: what it needs; None where that cannot be read.
    """

    revision: Revision
    tree: Path
    python: Path
    caches: Path
    requirements: Requirements | None


@dataclass(frozen=True)
class Result:
    """What an invocation of the gate has found.

    Attributes:
        settings: as asked for.
        base, head: the revisions.
        difference: where their float32 outputs part; None: nowhere.
        timed_difference: where those in the timed dtype part.
        rounds: what was measured; empty where outputs differ.
        verdicts: of each metric by name.
        notes: what a reader should know besides, one line each.
    """

    settings: Settings
    base: Revision
    head: Revision
    difference: Difference | None = None
    timed_difference: Difference | None = None
    rounds: tuple[Round, ...] = ()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether outputs differ and nobody accepted that."""
        return self.difference is not None and not self.settings.accept_different_outputs

    @property
    def failed(self) -> bool:
        """Whether the head must not be merged: other outputs, or slower."""
        return self.refused or self.has(Outcome.SLOWER)

    def has(self, outcome: Outcome) -> bool:
        """Whether a metric came out so."""
        return any(verdict.outcome is outcome for verdict in self.verdicts.values())

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """What the workers of each arm said of themselves."""
        return self.rounds[0].info if self.rounds else {}


def run(settings: Settings, say: Say) -> Result:
    """Compare two revisions.

    Args:
        settings: which, and how.
        say: told what is going on.

    Raises:
        BaseUnavailable: the base cannot be measured.
        Unavailable: there is no such revision, or the head cannot be measured.
    """
    load = os.getloadavg()[0]
    repo = repository(settings.repo)
    base, head = resolve(repo, settings.base), resolve(repo, settings.head)
    with ExitStack() as stack:
        stack.enter_context(_alone(settings.cache, say))
        sides = _ready(stack, repo, {BASE: base, HEAD: head}, settings, say)
        gate = Gate(settings, sides, say)
        difference = gate.compare_outputs()
        result = Result(settings, base, head, difference, notes=tuple(_notes(sides, settings, load)))
        if result.refused:
            return result
        gate.warm_up()
        return gate.measure(result)


class Gate:
    """Two revisions that are ready, and the workers to measure them with."""

    def __init__(self, settings: Settings, sides: Mapping[str, Side], say: Say) -> None:
        self._settings, self._sides, self._say = settings, sides, say

    def start(self, arm: str, dtype: str | None = None) -> Remote:
        """Start the worker of an arm."""
        settings, side = self._settings, self._sides[SIDES[arm]]
        options = {
            "--tree": side.tree,
            "--model": settings.model,
            "--dtype": dtype or settings.dtype,
            "--prompt-len": settings.prompt_len,
            "--new-tokens": settings.new_tokens,
        }
        command = [str(side.python), str(START), *(str(part) for pair in options.items() for part in pair)]
        command += ["--batches", *map(str, settings.batches)]
        command += ["--device", settings.device] if settings.device else []
        name = f"the {SIDES[arm]} {side.revision}"
        return Remote(name, command, env=_environment(side, settings.threads))

    def compare_outputs(self) -> Difference | None:
        """The parity gate in float32."""
        self._say(f"comparing outputs in {REFERENCE_DTYPE}")
        with self._both(REFERENCE_DTYPE) as (base, head):
            vocab_size = min(base.info["vocab_size"], head.info["vocab_size"])
            return compare(base, head, prompts(vocab_size, self._settings.batches, self._settings.prompt_len))

    def warm_up(self) -> None:
        """Have everything compiled into the caches by processes that are not measured.

        A process that compiles is not like one that finds everything there. Where an earlier run has left a mark that
        it warmed the same, there is nothing to do.
        """
        marks = {self._mark(side) for side in self._sides.values()}
        if self._settings.dtype != REFERENCE_DTYPE and not all(mark.exists() for mark in marks):
            self._say(f"warming up in {self._settings.dtype}")
            with self._both(self._settings.dtype):
                pass
        for mark in marks:
            mark.touch()

    def measure(self, result: Result) -> Result:
        """Rounds until there is a verdict, or until there were enough."""
        settings, rounds = self._settings, []
        verdicts: dict[str, Verdict] = {}
        end = time.monotonic() + 60 * settings.minutes
        while len(rounds) < settings.rounds or self._go_on(len(rounds), verdicts, end):
            number = len(rounds)
            name = (
                f"round {number + 1} of {settings.rounds}" if number < settings.rounds else f"extra round {number + 1}"
            )
            self._say(f"{name}: starting")
            measuring = functools.partial(self._say, f"{name}: measuring")
            rounds.append(run_round(number, self.start, settings.metrics, settings.workload, settings.turns, measuring))
            verdicts = verdicts_of(rounds, self._threshold(rounds[0]))
        difference = _timed_difference(rounds[0], settings)
        return replace(result, timed_difference=difference, rounds=tuple(rounds), verdicts=verdicts)

    def _go_on(self, rounds: int, verdicts: Mapping[str, Verdict], end: float) -> bool:
        return not is_decided(verdicts) and rounds < self._settings.max_rounds and time.monotonic() < end

    def _threshold(self, first: Round) -> float | None:
        if self._settings.threshold is None and first.info[BASE]["device_type"] == "cuda":
            return THRESHOLD
        return self._settings.threshold

    @contextmanager
    def _both(self, dtype: str) -> Iterator[tuple[Remote, Remote]]:
        """A worker of the base and one of the head, ready to decode."""
        with ExitStack() as stack:
            base, head = (stack.enter_context(closing(self.start(arm, dtype))) for arm in (BASE, HEAD))
            assert head.info  # the head first: what both lack is no fault of the base
            try:
                assert base.info
            except Unavailable as error:
                raise BaseUnavailable(str(error)) from None
            yield base, head

    def _mark(self, side: Side) -> Path:
        settings = self._settings
        what = (settings.model, settings.dtype, settings.device, settings.batches, settings.threads, str(side.python))
        return side.caches / f"warm-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


def is_decided(verdicts: Mapping[str, Verdict]) -> bool:
    """Whether more rounds could not change what becomes of the head."""
    outcomes = {verdict.outcome for verdict in verdicts.values()}
    return Outcome.SLOWER in outcomes or Outcome.UNDECIDED not in outcomes


def verdicts_of(rounds: Sequence[Round], threshold: float | None) -> dict[str, Verdict]:
    """The verdict on every metric after these rounds."""
    return {metric: judge([estimate(each.times[metric]) for each in rounds], threshold) for metric in rounds[0].times}


def _timed_difference(first: Round, settings: Settings) -> Difference | None:
    for batch in settings.batches:
        base, head = first.tokens[BASE][batch], first.tokens[HEAD][batch]
        if difference := first_difference(base, head, settings.prompt_len):
            return difference
    return None


def _ready(
    stack: ExitStack, repo: Path, revisions: Mapping[str, Revision], settings: Settings, say: Say
) -> dict[str, Side]:
    """Files, environment and caches of every revision; one that is there twice is made ready once."""
    kept, made, sides = settings.cache / "revisions", {}, {}
    for side, revision in revisions.items():
        if revision.key not in made:
            say(f"checking out the {side} {revision}")
            home = kept / revision.key
            tree = stack.enter_context(files_of(repo, revision, home / "tree"))
            os.utime(home)
            made[revision.key] = _side(side, revision, tree, home / "caches", settings, say)
        sides[side] = replace(made[revision.key], revision=revision)
    prune(kept.iterdir(), KEPT_REVISIONS)
    environments = settings.cache / "environments"
    prune(environments.iterdir() if environments.exists() else (), KEPT_ENVIRONMENTS)
    return sides


def _side(side: str, revision: Revision, tree: Path, caches: Path, settings: Settings, say: Say) -> Side:
    caches.mkdir(parents=True, exist_ok=True)
    try:
        requirements = Requirements.of(tree)
    except Unavailable as error:
        if settings.python is None:
            raise (BaseUnavailable if side == BASE else Unavailable)(f"the {side} {revision}: {error}") from None
        requirements = None
    if settings.python is not None:
        return Side(revision, tree, settings.python, caches, requirements)
    assert requirements is not None
    python = interpreter(requirements, settings.cache / "environments", say)
    return Side(revision, tree, python, caches, requirements)


def _environment(side: Side, threads: int | None) -> dict[str, str]:
    """The worker's: the revision's own code and caches, and nothing else that could be imported first."""
    paths = os.pathsep.join(map(str, (side.tree, side.tree / "kernels")))
    folders = {name: str(side.caches / folder) for name, folder in CACHES.items()}
    number = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | {"PYTHONPATH": paths} | folders | number


def _notes(sides: Mapping[str, Side], settings: Settings, load: float) -> Iterator[str]:
    base, head = sides[BASE], sides[HEAD]
    cores = os.cpu_count() or 1
    if load > BUSY * cores:
        yield f"Something else was running: before this began, the load was {load:.1f} on {cores} cores."
    if base.revision.key == head.revision.key:
        yield "Base and head are the same files: whatever differs is noise."
    if base.requirements != head.requirements:
        if settings.python is not None:
            yield f"The revisions have different requirements; both ran on what {settings.python} has installed."
        else:
            yield "The revisions have different requirements, and each ran in an environment of its own."


@contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Hold the cache folder: two runs at once would share worktrees, and each would be the other's noise."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run of the gate to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
