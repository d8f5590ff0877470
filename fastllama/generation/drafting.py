"""From the settings of a call to what drafts for its rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllama.config import GenerationConfig
from fastllama.config.fields import check_int, check_number
from fastllama.config.settings import DRAFTS
from fastllama.engine.runner import Runner
from fastllama.generation.assistant import AssistantSource
from fastllama.generation.known import known_of
from fastllama.generation.lookup import LONGEST, LookupSource
from fastllama.generation.request import Request
from fastllama.generation.speculation import Drafter, Source

logger = logging.getLogger(__name__)

CHOICES = ("off", "auto")
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
ASSISTANT = {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}  # as in transformers


@dataclass(frozen=True)
class Drafting:
    """What drafts for a call.

    Attributes:
        source: makes it for the rows, once the engine is held.
        most: tokens of a draft at most.
        adapts: whether that follows from how drafts do.
        assistant: the second model's engine, which is held meanwhile; None without one.
    """

    source: Callable[[Sequence[Request]], Source]
    most: int
    adapts: bool = False
    assistant: Runner | None = None

    def drafter(self, runner: Runner, requests: Sequence[Request]) -> Drafter | None:
        """What drafts for these rows; None where no step takes several tokens."""
        rows, assistant = len(requests), self.assistant
        why = assistant.why_no_logits(rows) if assistant else None
        sizes = [] if why else runner.draft_sizes(rows)
        if not sizes:
            ours = runner.why_no_logits(rows) or "no step takes several tokens of these rows"
            say_off(f"of the second model, {why}" if why else ours)
            return None
        return Drafter(self.source(requests), rows, sizes, known_of(runner), self.most, self.adapts)


def drafting_of(
    config: GenerationConfig,
    settings: Mapping[str, Any],
    runner: Runner,
    assistant: tuple[Runner, GenerationConfig] | None = None,
) -> Drafting | None:
    """What drafts for a call; None: nothing does.

    Args:
        config: of the call.
        settings: its own, which count instead.
        runner: of its model.
        assistant: engine and generation config of a second model, if one is given.

    Raises:
        ValueError: a setting out of range.
    """
    asked: dict[str, Any] = {name: settings.get(name, getattr(config, name)) for name in DRAFTS}
    _check(asked)
    if settings.get("speculate") == "off":  # as a default it says nothing
        return None
    lookup_tokens = asked["prompt_lookup_num_tokens"]
    if assistant is not None and lookup_tokens is None:  # which counts first, as in transformers
        engine, own = assistant
        for name, default in ASSISTANT.items():
            set_there = getattr(own, name)
            asked[name] = next(value for value in (asked[name], set_there, default) if value is not None)
        schedule = asked["num_assistant_tokens_schedule"] or own.num_assistant_tokens_schedule
        threshold, adapts = asked["assistant_confidence_threshold"], schedule not in (None, "constant")
        source = functools.partial(AssistantSource, engine, threshold=threshold)
        return Drafting(source, asked["num_assistant_tokens"], adapts, engine)
    if asked["speculate"] != "auto" and lookup_tokens is None:
        return None
    longest, pool = min(asked["max_matching_ngram_size"] or LONGEST, LONGEST), asked["prompt_lookup_pool_tokens"] or 0

    def lookup(requests: Sequence[Request]) -> LookupSource:
        texts = known_of(runner).texts if pool else None
        return LookupSource([request.prompt for request in requests], longest, texts, pool)

    return Drafting(lookup, lookup_tokens or LONGEST)


@functools.cache
def say_off(why: str) -> None:
    """Say once that a call that asks for drafts gets none."""
    logger.warning("no tokens are drafted: %s", why)


def _check(asked: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range."""
    if asked["speculate"] not in (None, *CHOICES):
        raise ValueError(f"speculate is {asked['speculate']!r}; expected {' or '.join(map(repr, CHOICES))}")
    if asked["num_assistant_tokens_schedule"] not in (None, *SCHEDULES):
        got = asked["num_assistant_tokens_schedule"]
        raise ValueError(f"num_assistant_tokens_schedule is {got!r}; expected one of {', '.join(SCHEDULES)}")
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"):
        if asked[name] is not None:
            check_int(name, asked[name], at_least=1)
    check_int("prompt_lookup_pool_tokens", asked["prompt_lookup_pool_tokens"] or 0, at_least=0)
    if asked["assistant_confidence_threshold"] is not None:
        check_number("assistant_confidence_threshold", asked["assistant_confidence_threshold"], at_least=0, at_most=1)
