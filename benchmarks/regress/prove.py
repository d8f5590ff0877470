"""Does the gate pass equal revisions and fail a slower one, every time, on this machine?

    python -m benchmarks.regress.prove --runs 20 --log proof.jsonl -- --threads 1

Runs the gate on the base against itself, interleaved with runs in which the head's worker makes every step 10 % longer:
the former must pass, the latter must fail. Each outcome is appended to the log as a JSON line as soon as it is there;
``--resume`` goes on where an interrupted proof stopped. Exits with 1 unless all came out as they should.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

EQUAL, SLOWED = "equal", "slowed"
EXPECTED = {EQUAL: 0, SLOWED: 1}  # exit codes
KEPT = ("kind", "exit", "seconds", "headline", "rounds", "verdicts")


def main(
    runs: Annotated[int, typer.Option(min=1, help="Invocations of the gate of each kind.")] = 20,
    log: Annotated[Path, typer.Option(help="File of JSON lines, one for each invocation.")] = Path("proof.jsonl"),
    summary: Annotated[Path | None, typer.Option(help="JSON file for the outcomes without samples and paths.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a log that is there.")] = False,
    slowdown: Annotated[float, typer.Option(min=0.0, help="Slowdown of the head, in percent.")] = 10.0,
    repo: Annotated[Path, typer.Option(help="A folder in the repository.")] = Path(),
    base: Annotated[str, typer.Option(help="Revision to prove it on.")] = "HEAD",
    arguments: Annotated[list[str] | None, typer.Argument(help="Options for the gate, after --.")] = None,
) -> None:
    """Run the gate many times where the right answer is known."""
    if log.exists() and not resume:
        raise typer.BadParameter(f"{log} exists: --resume goes on with it", param_hint="--log")
    done = Counter(outcome["kind"] for outcome in read(log))
    options = ["--repo", str(repo), "--base", base, "--head", base, *(arguments or [])]
    for kind in (kind for number in range(runs) for kind in EXPECTED if number >= done[kind]):
        outcome = invoke(kind, [*options, *(["--slowdown", str(slowdown)] if kind == SLOWED else [])])
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


def invoke(kind: str, options: Sequence[str]) -> dict[str, Any]:
    """One invocation of the gate, as a user would run it."""
    command = [sys.executable, "-m", str(__package__), "--json", "-", "--quiet", *options]
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
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


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
    return {
        "tally": list(tally(outcomes)),
        "environment": environment,
        "outcomes": [{name: outcome[name] for name in KEPT} for outcome in outcomes],
    }


if __name__ == "__main__":
    typer.run(main)
