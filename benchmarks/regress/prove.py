"""Does the gate pass equal revisions and fail a slower one, every time, on this machine?

Runs the gate on the base against itself, interleaved with runs in which the head's worker makes every step 10 % longer;
exits with 1 unless all came out as they should.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    runs: Annotated[int, typer.Option(min=1, help="Invocations of the gate of each kind.")] = 20,
    log: Annotated[Path, typer.Option(help="File of JSON lines to append to.")] = Path("proof.jsonl"),
    slowdown: Annotated[float, typer.Option(min=0.0, help="Slowdown of the head, in percent.")] = 10.0,
    base: Annotated[str, typer.Option(help="Revision to prove it on.")] = "HEAD",
    arguments: Annotated[list[str] | None, typer.Argument(help="Options for the gate, after --.")] = None,
) -> None:
    """Run the gate many times where the right answer is known."""
    options = ["--base", base, "--head", base, *(arguments or [])]
    right = {"equal": 0, "slowed": 0}
    for kind in list(right) * runs:
        outcome = invoke([*options, *(["--slowdown", str(slowdown)] if kind == "slowed" else [])])
        right[kind] += outcome["exit"] == list(right).index(kind)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind} | outcome) + "\n")
        typer.echo(f"{kind}: exit {outcome['exit']}, {outcome['headline']}", err=True)
    typer.echo(f"equal: {right['equal']} of {runs} passed; slowed: {right['slowed']} of {runs} failed, as they should")
    raise typer.Exit(sum(right.values()) < 2 * runs)


def invoke(options: list[str]) -> dict[str, Any]:
    """One invocation of the gate, as a user would run it."""
    start = time.perf_counter()
    command = [sys.executable, "-m", str(__package__), "--json", "-", "--quiet", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"headline": "no report"}
    kept = {name: found.get(name) for name in ("headline", "verdicts", "environment")}
    return {"exit": done.returncode, "seconds": round(time.perf_counter() - start, 1), **kept}


if __name__ == "__main__":
    typer.run(main)
