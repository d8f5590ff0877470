"""Does the gate pass equal revisions and fail a slower one, every time, on this machine?

    python -m benchmarks.regress.prove --runs 20 --log proof.jsonl -- --python .venv/bin/python

Clones the repository, adds a commit in which every step of the engine takes 10 % longer, and runs the gate by turns on
the base against itself, which must pass, and against that commit, which must fail. Each outcome is appended to the log
as a JSON line as soon as it is there; ``--resume`` goes on where an interrupted proof stopped. Exits with 1 unless all
came out as they should.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness import Unavailable
from .worktrees import git, repository, resolve

EQUAL, SLOWED = "equal", "slowed"
EXPECTED = {EQUAL: 0, SLOWED: 1}
HOOKED = "def call_plainly("  # on a CPU every step goes through it: prefill and decode, compiled or not
GRAPHS = Path("fastllama", "graphs.py")

SLOWDOWN = """

# ---- every step takes {percent} % longer ---------------------------------------------------------------------------
import time as _time

_call_at_full_speed = call_plainly


def call_plainly(step, args):
    start = _time.perf_counter()
    _call_at_full_speed(step, args)
    now = _time.perf_counter()
    until = now + {fraction} * (now - start)
    while _time.perf_counter() < until:
        pass
"""


def main(
    runs: Annotated[int, typer.Option(min=1, help="Invocations of the gate of each kind.")] = 20,
    log: Annotated[Path, typer.Option(help="JSON lines, one for each invocation.")] = Path("proof.jsonl"),
    summary: Annotated[Path | None, typer.Option(help="JSON: the outcomes without samples and paths.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a log that is there.")] = False,
    slowdown: Annotated[float, typer.Option(min=0.0, help="In percent.")] = 10.0,
    repo: Annotated[Path, typer.Option(help="A folder in the repository.")] = Path(),
    base: Annotated[str, typer.Option(help="Revision to prove it on.")] = "HEAD",
    arguments: Annotated[list[str] | None, typer.Argument(help="Options for the gate, after --.")] = None,
) -> None:
    """Run the gate many times where the right answer is known."""
    if log.exists() and not resume:
        raise typer.BadParameter(f"{log} exists: --resume goes on with it", param_hint="--log")
    done = Counter(outcome["kind"] for outcome in read(log))
    with slowed_clone(repository(repo), base, slowdown) as (clone, revisions):
        for kind in (kind for number in range(runs) for kind in EXPECTED if number >= done[kind]):
            outcome = invoke(clone, revisions, kind, arguments or [])
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")
            typer.echo(f"{kind}: exit {outcome['exit']}, {outcome['seconds']:.0f} s, {outcome['headline']}", err=True)
    outcomes = read(log)
    if summary:
        summary.write_text(json.dumps(summed_up(outcomes), indent=1) + "\n", encoding="utf-8")
    for line in tally(outcomes):
        typer.echo(line)
    raise typer.Exit(0 if is_proof(outcomes, runs) else 1)


@contextmanager
def slowed_clone(repo: Path, base: str, percent: float) -> Iterator[tuple[Path, dict[str, str]]]:
    """A clone with one more commit, and the head that each kind of invocation judges; gone at the end.

    The commit is the same for the same arguments, so that what was compiled from it stays good.
    """
    revision = resolve(repo, base)
    with tempfile.TemporaryDirectory(prefix="fastllama-proof-") as folder:
        clone = Path(folder) / "clone"
        git(repo, "clone", "--quiet", "--no-checkout", str(repo), str(clone))
        git(clone, "checkout", "--quiet", "--detach", revision.commit)
        inject(clone, percent)
        date = git(clone, "log", "-1", "--format=%cI")
        author = ("-c", "user.name=proof", "-c", "user.email=proof@localhost")
        message = f"Every step takes {percent:g} % longer"
        git(clone, *author, "commit", "--quiet", "--all", f"--date={date}", "-m", message, GIT_COMMITTER_DATE=date)
        slowed = resolve(clone, "HEAD").commit
        yield clone, {"base": revision.commit, EQUAL: revision.commit, SLOWED: slowed}


def inject(tree: Path, percent: float) -> None:
    """Make every step of the engine in ``tree`` wait, busily, for a part of the time it took.

    Raises:
        Unavailable: fastllama has no longer the function that every step goes through.
    """
    graphs = tree / GRAPHS
    source = graphs.read_text(encoding="utf-8") if graphs.exists() else ""
    if HOOKED not in source:
        raise Unavailable(f"{GRAPHS} has no {HOOKED.split()[1][:-1]} any more; the slowdown needs a new place")
    graphs.write_text(source + SLOWDOWN.format(percent=f"{percent:g}", fraction=percent / 100), encoding="utf-8")


def invoke(clone: Path, revisions: Mapping[str, str], kind: str, arguments: Sequence[str]) -> dict[str, Any]:
    """One invocation of the gate, as a user would run it."""
    options = ["--repo", str(clone), "--base", revisions["base"], "--head", revisions[kind], "--json", "-", "--quiet"]
    command = [sys.executable, "-m", str(__package__), *options, *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    return {
        "kind": kind,
        "exit": done.returncode,
        "seconds": round(seconds, 1),
        "headline": found.get("headline", "no report"),
        "rounds": len(found.get("rounds", ())),
        "verdicts": found.get("verdicts", {}),
        "samples": found.get("rounds", []),
        "environment": found.get("environment", {}),
    }


def read(log: Path) -> list[dict[str, Any]]:
    """The outcomes so far."""
    if not log.exists():
        return []
    with open(log, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_proof(outcomes: Sequence[Mapping[str, Any]], runs: int) -> bool:
    """Whether there are enough outcomes of each kind and all are as they should be."""
    counts = Counter(outcome["kind"] for outcome in outcomes)
    enough = all(counts[kind] >= runs for kind in EXPECTED)
    return enough and all(outcome["exit"] == EXPECTED[outcome["kind"]] for outcome in outcomes)


def tally(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each kind."""
    for kind, code in EXPECTED.items():
        of_kind = [outcome for outcome in outcomes if outcome["kind"] == kind]
        right = sum(outcome["exit"] == code for outcome in of_kind)
        unsure = sum("INCONCLUSIVE" in outcome["headline"] for outcome in of_kind)
        verb = "passed" if kind == EQUAL else "failed"
        longest = max((outcome["seconds"] for outcome in of_kind), default=0.0)
        yield f"{kind}: {right} of {len(of_kind)} {verb} as they should, {unsure} inconclusive, {longest:.0f} s at most"


def summed_up(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outcomes as a document that can be committed: without samples, and without paths of the machine's."""
    environment = {
        name: value for name, value in outcomes[0]["environment"].items() if name not in ("argv", "variables")
    }
    kept = ("kind", "exit", "seconds", "headline", "rounds", "verdicts")
    return {
        "tally": list(tally(outcomes)),
        "environment": environment,
        "outcomes": [{name: outcome[name] for name in kept} for outcome in outcomes],
    }


if __name__ == "__main__":
    typer.run(main)
