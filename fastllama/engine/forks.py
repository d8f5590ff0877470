"""Processes that are forked from one in which torch has started threads.

OpenMP's threads do not come along, and a parallel loop would wait for them for ever. So such a process decodes on one
thread. One that is spawned has all of them.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import torch

logger = logging.getLogger(__name__)


class _Fork:
    had_threads = False  # the parent, when it forked
    happened = False  # from such a parent, and not said yet


callers: weakref.WeakSet[Any] = weakref.WeakSet()  # of engines; in a new process they do not exist


def _before() -> None:
    try:
        _Fork.had_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:
        _Fork.had_threads = True


def _after_in_child() -> None:
    if _Fork.had_threads:
        _Fork.happened = True
        torch.set_num_threads(1)
    for those in list(callers):
        those.forget()


def say_if_forked() -> None:
    """Warn, once, in a process that was forked."""
    if _Fork.happened:
        _Fork.happened = False
        logger.warning(
            "a forked process decodes on one thread; start it with multiprocessing's 'spawn' for all of them"
        )


os.register_at_fork(before=_before, after_in_child=_after_in_child)
