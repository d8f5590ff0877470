"""Filling slots with prompts: in chunks of exact lengths that run at once, or in padded ones whose step is compiled.

A row that is shorter than a chunk is padded with copies of its last prefilled token, at that token's position: they
write what is there already. So nothing is written past a row's end and no mask is needed.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``r`` rows that are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from fastllama.engine import steps
from fastllama.engine.buffers import Buffers
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import call_plainly
from fastllama.engine.state import Chunk

PREFILL_CHUNKS = (8, 32, 128, 512)  # tokens a row


def fill_eagerly(
    net: FusedDecoder, buffers: Buffers, prompts: Mapping[int, torch.Tensor], starts: Mapping[int, int], samples: bool
) -> None:
    """Fill slots in chunks of exact lengths.

    Args:
        net, buffers: of the engine.
        prompts, starts: by slot: int64 ``[tokens]`` on the CPU, and how many of them are in the cache already.
        samples: whether the rows that are loaded there get their first new tokens; else each prompt's last token is
            left out.
    """
    for first, last in _runs(prompts):
        slots, memory, rows = range(first, last), buffers.memory.cut(first, last), buffers.slots(first, last)
        texts, begun = [prompts[slot] for slot in slots], [starts[slot] for slot in slots]
        chunks = list(prompt_chunks(texts, begun, short_of=1 - samples, exact=True))
        for chunk in chunks[: len(chunks) - samples]:
            call_plainly(buffers.device.type, steps.prefill, (net, chunk, memory))
        if samples:
            call_plainly(buffers.device.type, steps.prefill_and_sample, (net, chunks[-1], memory, rows))


def fill_compiled(
    step_of: Callable[[int], Callable[[], None]],
    buffers: Buffers,
    b: int,
    prompts: Mapping[int, torch.Tensor],
    starts: Mapping[int, int],
) -> None:
    """Fill slots in padded chunks, up to each prompt's last token; other slots repeat their newest one.

    Args:
        step_of: gives the step for a chunk by its number of tokens a row.
        buffers: of the engine.
        b: the batch in which they run.
        prompts, starts: by slot: int64 ``[tokens]`` on the CPU, and how many of them are in the cache already.
    """
    slot_r = torch.tensor(list(prompts), device=buffers.device)
    for chunk in prompt_chunks(list(prompts.values()), [starts[slot] for slot in prompts], short_of=1, exact=False):
        t = chunk.ids_bt.shape[1]
        call, static = step_of(t), buffers.chunk(b, t)
        buffers.repeat_newest(static)
        static.ids_bt.index_copy_(0, slot_r, chunk.ids_bt.to(buffers.device))
        static.position_bt.index_copy_(0, slot_r, chunk.position_bt.to(buffers.device))
        call()


def prompt_chunks(
    prompts: Sequence[torch.Tensor], starts: Sequence[int], short_of: int, exact: bool
) -> Iterator[Chunk]:
    """The chunks that prefill these prompts, on the CPU.

    Args:
        prompts: of each row, int64 ``[tokens]``.
        starts: how many first tokens of each prompt are in the cache already.
        short_of: how many last tokens of each prompt are left out.
        exact: as :func:`prefill_chunks` takes it.
    """
    last_b1 = torch.tensor([[max(len(prompt) - 1 - short_of, 0)] for prompt in prompts], device="cpu")
    start_b1 = torch.tensor(starts, device="cpu")[:, None]
    ids_bt = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    longest = max(len(prompt) - short_of - start for prompt, start in zip(prompts, starts, strict=True))
    for t in prefill_chunks(longest, exact):
        position_bt = (start_b1 + torch.arange(t, device="cpu")).minimum(last_b1)
        yield Chunk(ids_bt.gather(1, position_bt), position_bt)
        start_b1 = start_b1 + t


def prefill_chunks(tokens: int, exact: bool) -> list[int]:
    """Sizes of the chunks that a prefill of ``tokens`` tokens takes; unless ``exact``, the last one is padded."""
    longest = max(PREFILL_CHUNKS)
    full, rest = divmod(tokens, longest)
    if rest and not exact:
        rest = min(size for size in PREFILL_CHUNKS if size >= rest)
    return [longest] * full + [rest] * (rest > 0)


def _runs(slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Slots that are neighbours, as ranges: the first, and the one after the last."""
    ordered = sorted(slots)
    first = ordered[0]
    for slot, following in zip(ordered, [*ordered[1:], None], strict=True):
        if following != slot + 1:
            yield first, slot + 1
            first = following or 0
