"""Who holds an engine: one caller at a time, from any thread; the others wait, and hear what for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastllama.engine import forks
from fastllama.engine.forks import say_if_forked
from fastllama.engine.graphs import CallOrder

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # of a caller that waits without a word


class Callers:
    """The callers of one engine.

    Args:
        device: of the engine, on which their calls are put in order.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._since = 0.0
        self._session: object | None = None
        self._order = CallOrder(device)
        self._stream: torch.cuda.Stream | None = None
        forks.callers.add(self)

    @contextmanager
    def session(self) -> Iterator[object]:
        """Hold the engine; yields what :meth:`hold` takes.

        Raises:
            RuntimeError: this thread holds it already, in an unfinished iteration.
        """
        if self._owner is threading.current_thread() and self._lock.locked():
            raise RuntimeError(
                "this thread is still iterating over an earlier stream of this model; exhaust it or close() it first"
            )
        say_if_forked()
        with self._said_while_waiting() as got, self._lock, self._order.call() as stream:
            got.cancel()
            session = self._session = object()
            self._since = time.monotonic()
            self.hold(session)
            self._stream = stream
            try:
                yield session
            finally:
                if self._session is session:
                    self._owner = self._stream = self._session = None

    def hold(self, session: object) -> None:
        """From now on it is this thread that holds the engine: an iterator may be handed to another thread.

        Raises:
            RuntimeError: the session began in another process, from which this one was forked.
        """
        if self._session is not session:
            raise RuntimeError("this stream was begun in another process, which goes on with it; begin one of your own")
        self._owner = threading.current_thread()

    def launching(self) -> Any:
        """Everything inside goes to the session's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def forget(self) -> None:
        """In a forked process: whoever held the engine does not exist here."""
        self._lock, self._owner, self._session = threading.Lock(), None, None

    @contextmanager
    def _said_while_waiting(self) -> Iterator[threading.Timer]:
        timer = threading.Timer(PATIENCE_S, self._say_who_holds)
        timer.daemon = True
        if self._lock.locked():
            timer.start()
        try:
            yield timer
        finally:
            timer.cancel()

    def _say_who_holds(self) -> None:
        owner, seconds = self._owner, time.monotonic() - self._since
        logger.warning(
            "a call waits for the model, which thread %r has held for %.0f s: another call, or a stream() that is "
            "neither exhausted nor closed",
            owner.name if owner else "?",
            seconds,
        )
