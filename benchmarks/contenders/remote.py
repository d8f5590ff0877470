"""A contender in a process of its own, started by :mod:`.worker` and spoken to in lines of JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..workload import Decode, Unavailable, Workload
from . import Task, title_of

WORKER = Path(__file__).with_name("worker.py")
CLOSING_SECONDS = 10.0
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


class Remote:
    """A contender whose decodes happen in a worker process."""

    def __init__(
        self,
        key: str,
        *,
        name: str | None = None,
        python: str | os.PathLike[str] = sys.executable,
        env: Mapping[str, str] | None = None,
        tree: Path | None = None,
        warm_up: Sequence[Workload] = (),
    ) -> None:
        self.name = name or title_of(key)
        self._key, self._python, self._tree, self._warm_up = key, python, tree, warm_up
        self._env = worker_environment() if env is None else env
        self._process: subprocess.Popen[str] | None = None
        self._info: dict[str, Any] | None = None

    def load(self, task: Task) -> None:
        """Start the worker; ``info`` and the first run wait until it is ready."""
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed in close)
        try:
            self._process = subprocess.Popen(
                [os.fspath(self._python), str(WORKER)],
                env=self._env,
                cwd=tempfile.gettempdir(),  # Python looks for modules there first, and it holds none
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise Unavailable(f"cannot start {self._python}: {error.strerror}") from error
        self._send({
            "contender": self._key,
            "task": task.plain(),
            "tree": self._tree and str(self._tree),
            "warm_up": [asdict(workload) for workload in self._warm_up],
            "spawned": time.time(),
        })  # fmt: skip

    @property
    def info(self) -> dict[str, Any]:
        """What the worker said of itself when it was ready; waits for that."""
        if self._info is None:
            self._info = self._read()["ready"]
        assert self._info is not None
        return self._info

    def run(self, workload: Workload) -> Decode:
        """Have the worker decode the workload."""
        assert self.info is not None
        self._send(asdict(workload))
        answer = self._read()
        tokens = answer["tokens"]
        rows = None if tokens is None else tuple(tuple(row) for row in tokens)
        return Decode(rows, answer["ttft"], tuple(answer["tpot"]))

    def close(self) -> None:
        """End the worker."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS if self._info else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._process = None

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading the answer says why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            code, why = self._process.wait(), last_words(self._log.read())
            raise Unavailable(f"{self.name} ended with code {code}: {why}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer


def last_words(stderr: str) -> str:
    """The line that says why a process ended: the last that names an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it wrote nothing"]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1])


def worker_environment(**variables: str) -> dict[str, str]:
    """This process's environment with this process's fastllama first on the import path, and these variables."""
    specs = [importlib.util.find_spec(name) for name in ("fastllama", "fastllama_kernels")]
    folders = [str(Path(spec.origin).resolve().parents[1]) for spec in specs if spec and spec.origin]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}
