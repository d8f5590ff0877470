"""A contender in a process of its own, started by :mod:`.worker` and spoken to in lines of JSON."""

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
from functools import cached_property
from pathlib import Path
from typing import Any

from ..workload import Contender, Decode, Task, Unavailable, Workload
from . import title_of

WORKER = Path(__file__).with_name("worker.py")
CLOSING_SECONDS = 10.0
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


class Remote(Contender):
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
        self._process = None

    def load(self, task: Task) -> None:
        """Start the worker; ``info`` and the first run wait until it is ready."""
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed in close)
        command, pipe = [os.fspath(self._python), str(WORKER)], subprocess.PIPE
        nowhere = tempfile.gettempdir()  # Python looks for modules there first, and it holds none
        try:
            self._process: Any = subprocess.Popen(
                command, env=self._env, cwd=nowhere, stdin=pipe, stdout=pipe, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise Unavailable(f"cannot start {self._python}: {error.strerror}") from error
        warm_up = [asdict(workload) for workload in self._warm_up]
        job = {"contender": self._key, "task": task.plain(), "tree": self._tree and str(self._tree)}
        self._send(job | {"warm_up": warm_up, "spawned": time.time()})

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the worker said of itself when it was ready; waits for that."""
        return self._read()["ready"]

    def run(self, workload: Workload) -> Decode:
        """Have the worker decode the workload."""
        assert self.info
        self._send(asdict(workload))
        answer = self._read()
        tokens = None if answer["tokens"] is None else tuple(map(tuple, answer["tokens"]))
        return Decode(tokens, answer["ttft"], tuple(answer["tpot"]))

    def close(self) -> None:
        """End the worker."""
        if self._process is None:
            return
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(CLOSING_SECONDS if "info" in vars(self) else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._process = None

    def _send(self, message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # reading the answer says why
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _read(self) -> dict[str, Any]:
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


def worker_environment() -> dict[str, str]:
    """This process's environment with this process's fastllama first on the import path."""
    specs = [importlib.util.find_spec(name) for name in ("fastllama", "fastllama_kernels")]
    folders = [str(Path(spec.origin).resolve().parents[1]) for spec in specs if spec and spec.origin]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
