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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

EXPECTED = {"equal": 0, "slowed": 1}  # exit codes
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
    log.touch()
    outcomes = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    options = ["--repo", str(repo), "--base", base, "--head", base, *(arguments or [])]
    for kind in list(EXPECTED) * runs:
        if sum(each["kind"] == kind for each in outcomes) >= runs or len(outcomes) % 2 != list(EXPECTED).index(kind):
            continue
        outcomes.append(invoke(kind, [*options, *(["--slowdown", str(slowdown)] if kind == "slowed" else [])]))
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(outcomes[-1]) + "\n")
        typer.echo(f"{kind}: exit {outcomes[-1]['exit']}, {outcomes[-1]['headline']}", err=True)
    if summary:
        summary.write_text(json.dumps(summed_up(outcomes), indent=1) + "\n", encoding="utf-8")
    typer.echo("\n".join(tally(outcomes)))
    raise typer.Exit(not all(each["exit"] == EXPECTED[each["kind"]] for each in outcomes))


def invoke(kind: str, options: Sequence[str]) -> dict[str, Any]:
    """One invocation of the gate, as a user would run it."""
    start = time.perf_counter()
    command = [sys.executable, "-m", str(__package__), "--json", "-", "--quiet", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = round(time.perf_counter() - start, 1)
    found = {"headline": "no report", "rounds": [], "verdicts": {}, "environment": {}}
    found |= json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    kept = {name: found[name] for name in ("headline", "verdicts", "environment")}
    samples = {"rounds": len(found["rounds"]), "samples": found["rounds"]}
    return {"kind": kind, "exit": done.returncode, "seconds": seconds, **kept, **samples}


def tally(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each kind."""
    lines = []
    for kind, verb in (("equal", "passed"), ("slowed", "failed")):
        found = [outcome for outcome in outcomes if outcome["kind"] == kind]
        right = sum(outcome["exit"] == EXPECTED[kind] for outcome in found)
        unsure = sum("INCONCLUSIVE" in outcome["headline"] for outcome in found)
        longest = max((outcome["seconds"] for outcome in found), default=0.0)
        as_they_should = f"{right} of {len(found)} {verb} as they should"
        lines.append(f"{kind}: {as_they_should}, {unsure} inconclusive, {longest:.0f} s at most")
    return lines


def summed_up(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outcomes as a document that can be committed: without samples, and without paths of the machine's."""
    environment = {name: each for name, each in outcomes[0]["environment"].items() if name not in ("argv", "variables")}
    kept = [{name: outcome[name] for name in KEPT} for outcome in outcomes]
    return {"tally": tally(outcomes), "environment": environment, "outcomes": kept}


if __name__ == "__main__":
    typer.run(main)
