"""The buffers of what changes the logits of rows: made once, and filled for a row that asks for something.

Shape suffixes: ``e`` biases of a row, ``l`` tokens of a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastllama import ops
from fastllama.engine.row import MAX_BIAS_TOKENS, MAX_BIASES, NO_CHANGES, Bias, Changes, Row

NUMBERS = Changes._fields[:-1]  # one a row


def changes_logits(row: Row) -> bool:
    """Whether anything is done with a row's logits before a token is sampled."""
    return row.changes != NO_CHANGES or row.allowed is not None


def new_processing(new: Callable[..., torch.Tensor], batch: int, slots: int, vocab_size: int) -> ops.Processing:
    """Buffers of rows that ask for nothing.

    Args:
        new: makes a tensor of zeros by its shape, int64 or of the ``dtype`` it is given.
        batch, slots: of the cache.
        vocab_size: of the model.
    """
    return ops.Processing(
        repetition_penalty=new(batch, dtype=torch.float32).fill_(1),
        presence_penalty=new(batch, dtype=torch.float32),
        frequency_penalty=new(batch, dtype=torch.float32),
        no_repeat_ngram_size=new(batch),
        forced_first=new(batch).fill_(-1),
        forced_last=new(batch).fill_(-1),
        bias_tokens=new(batch, MAX_BIASES, MAX_BIAS_TOKENS).fill_(-1),
        bias_values=new(batch, MAX_BIASES, dtype=torch.float32),
        bias_until=new(batch, MAX_BIASES),
        allowed=new(batch, ops.token_mask_words(vocab_size), dtype=torch.int32).fill_(-1),
        tokens=new(batch, slots),
        counts=new(batch, vocab_size, dtype=torch.int32),
    )


def load_processing(processing: ops.Processing, slot: int, row: Row) -> None:
    """Set what a slot's row asks for."""
    changes, device = row.changes, processing.counts.device
    for name in NUMBERS:
        getattr(processing, name)[slot] = getattr(changes, name)
    lists = (processing.bias_tokens[slot], processing.bias_values[slot], processing.bias_until[slot])
    for buffer, values in zip(lists, _bias_tensors(changes.biases), strict=True):
        buffer[: len(values)] = values.to(device)
    processing.bias_tokens[slot, len(changes.biases) :] = -1
    processing.allowed[slot] = -1 if row.allowed is None else row.allowed.to(device)
    if changes.reads_tokens:
        processing.tokens[slot, : len(row.prompt)] = row.prompt.to(device)
    if changes.counts_tokens:
        processing.counts[slot] = 0
        processing.counts[slot, row.seen.to(device)] = 1


def _bias_tensors(biases: Sequence[Bias]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, values and until when, as :class:`fastllama.ops.Processing` has them, on the CPU."""
    tokens_el = torch.full((len(biases), MAX_BIAS_TOKENS), -1, device="cpu")
    for tokens_l, bias in zip(tokens_el, biases, strict=True):
        tokens_l[-len(bias.tokens) :] = torch.tensor(bias.tokens, device="cpu")
    values_e = torch.tensor([bias.value for bias in biases], dtype=torch.float32, device="cpu")
    return tokens_el, values_e, torch.tensor([bias.until for bias in biases], dtype=torch.long, device="cpu")
