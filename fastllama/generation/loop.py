"""A batch from its prompts to its end.

Shape suffixes: ``b`` rows, ``n`` tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack

import torch

from fastllama.engine.buffers import Snapshot
from fastllama.engine.runner import Runner
from fastllama.generation.drafting import Drafting, say_off
from fastllama.generation.request import Request
from fastllama.generation.speculation import drafted
from fastllama.generation.stopping import Stopping
from fastllama.generation.token_masks import TokenMasks
from fastllama.model.cache import StaticCache

AHEAD = 256  # tokens a row has room for at the beginning; memory follows what is written, not what might be


def decode(
    runner: Runner,
    requests: Sequence[Request],
    poll_every: int = 1,
    cache: StaticCache | None = None,
    drafting: Drafting | None = None,
) -> Generator[torch.Tensor, None, None]:
    """Decode rows together until the last one ends; yields their new tokens, int64 ``[b, n]`` on the CPU, n ≥ 1.

    A row that has ended gives its pad id. Holds the engine until the generator is exhausted or closed.

    Args:
        runner: of the model.
        requests: one for each row.
        poll_every: on CUDA, steps launched between two looks at their tokens: 1 shows tokens soonest, more costs
            the host less. On a CPU, where nothing runs ahead, and where a token mask depends on the tokens, each step
            is looked at.
        cache: of the caller's, which the runner takes: holds each prompt's first tokens, and in the end all that has
            been computed.
        drafting: what drafts; nothing does next to a cache or a token mask, which depends on the tokens before.

    Raises:
        RuntimeError: this thread already holds the engine in an unfinished iteration.
    """
    assistant = drafting.assistant if drafting else None
    with ExitStack() as stack:
        held = sorted({runner, assistant} - {None}, key=id)  # in one order, or two calls could wait for each other
        sessions = {each: stack.enter_context(each.session()) for each in held}
        needed = max(len(request.prompt) + min(request.max_new_tokens, AHEAD) for request in requests)
        runner.reserve(len(requests), needed if runner.cache else max(needed, runner.default_cache_len))
        stopping, least = Stopping(requests), None if cache is None else 1
        if cache is not None:
            runner.take(cache, [request.prompt for request in requests])
        masks = TokenMasks(requests, runner.config.vocab_size)
        burst = poll_every if runner.runs_ahead and not masks else 1
        drafter = None
        if drafting and (masks or cache is not None):
            say_off("next to a token mask" if masks else "next to a cache that is given")
        elif drafting:
            drafter = drafting.drafter(runner, requests)
        if drafter is None:
            bursts = _bursts(runner, masks.first(requests), burst, least, runner.runs_ahead and not masks)
        else:
            bursts = drafted(runner, requests, drafter, least, stopping)
        try:
            for tokens_bn in bursts:
                tokens_bn = stopping.take(tokens_bn)
                if masks and not stopping.all_ended:
                    runner.allow(masks.after(tokens_bn, stopping.ended))
                yield tokens_bn
                if stopping.all_ended:
                    return
                for each, session in sessions.items():
                    each.hold(session)  # an iterator may be handed to another thread
        finally:
            if cache is not None:
                runner.give(cache)
            if drafter is not None:
                drafter.close()


def _bursts(
    runner: Runner, requests: Sequence[Request], burst: int, least: int | None, runs_ahead: bool
) -> Iterator[torch.Tensor]:
    """Prefill, then step after step, and yield what all rows have given since the last time.

    Where it runs ahead, a burst of steps is launched before the tokens of the burst before it are read, so that the
    device never waits for the host; what was launched past the end is dropped.
    """
    count, last = len(requests), max(request.max_new_tokens for request in requests)
    longest = max(len(request.prompt) for request in requests)
    done = runner.prefill(dict(enumerate(requests)), least)
    if done:
        yield runner.newest().read()[:count]
    pending: Snapshot | None = None
    for first in range(done, last, burst):
        after = min(first + burst, last)
        runner.reserve(count, longest + after)
        for _ in range(first, after):
            runner.step()
        taken = runner.newest() if burst == 1 else runner.output(first, after)
        ready, pending = (pending, taken) if runs_ahead else (taken, None)
        if ready:
            yield ready.read()[:count]
    if pending:
        yield pending.read()[:count]
