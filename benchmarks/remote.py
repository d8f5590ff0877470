"""A contender in a process of its own: another library, another revision, another environment.

The two talk in JSON, one object a line. The worker says ``{"ready": {...}}`` once it can decode; then each
``{"prompts": [[...]], "new_tokens": n, "capacity": null}`` is answered with ``{"tokens": [[...]], "ttft": s, "tpot":
[s, ...]}`` or ``{"error": "..."}``. What the worker's libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .harness import Run, Unavailable, Workload, reason

CLOSING_SECONDS = 10.0


class Remote:
    """A contender whose runs happen in a worker process.

    Args:
        name: of the contender.
        command: starts the worker.
        env: the worker's whole environment; None: this process's.
        cwd: folder in which it starts.

    Raises:
        Unavailable: the worker ended before it was ready; the message is the last line it wrote to stderr.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        try:
            self._process = subprocess.Popen(
                command, env=env, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise Unavailable(f"cannot start {command[0]}: {error.strerror}") from error
        self._info: dict[str, Any] | None = None

    @property
    def info(self) -> dict[str, Any]:
        """What the worker said of itself when it was ready; waits for that."""
        if self._info is None:
            self._info = self._read()["ready"]
        assert self._info is not None
        return self._info

    def run(self, workload: Workload) -> Run:
        """Have the worker decode the workload."""
        assert self.info is not None
        return self.ask(asdict(workload))

    def ask(self, request: Mapping[str, Any]) -> Run:
        """Send one request and wait for its run."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reading below says why
        answer = self._read()
        tokens = answer["tokens"]
        rows = None if tokens is None else tuple(tuple(row) for row in tokens)
        return Run(rows, answer["ttft"], tuple(answer["tpot"]))

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"{self.name} ended with code {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it wrote nothing"


def serve(open_run: Callable[[], tuple[dict[str, Any], Callable[[Workload], Run]]]) -> None:
    """Be a worker: answer requests on stdin until it closes.

    Args:
        open_run: prepares; gives what to say of itself and the function that decodes a workload.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    info, run = open_run()
    say({"ready": info})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = tuple(tuple(row) for row in request.pop("prompts"))
        try:
            say(asdict(run(Workload(prompts, **request))))
        except Exception as error:
            say({"error": reason(error)})


def worker_environment(*paths: Path) -> dict[str, str]:
    """This process's environment with these folders first on the worker's import path."""
    existing = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [existing])])}
