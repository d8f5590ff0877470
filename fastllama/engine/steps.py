"""The steps: pure functions of the network, its rows and its memory, which they update in place.

They are compiled, but where a step is one operation of the kernels (:func:`decode_at_once` and its like).

Shape suffixes: ``b`` batch, ``t`` query tokens, ``m`` model dim, ``v`` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastllama import ops
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.state import Chunk, Memory, Rows

VERIFY_TOKENS = (1, 2, 4, 8)


def prefill(net: FusedDecoder, chunk: Chunk, memory: Memory) -> None:
    """Write tokens to the cache."""
    net(*chunk, *memory)


def prefill_and_sample(net: FusedDecoder, chunk: Chunk, memory: Memory, rows: Rows) -> None:
    """Write the last tokens of the rows' prompts to the cache and sample their first new ones."""
    _advance_processed(rows, net.logits(net(*chunk, *memory)[:, -1]))


def decode(net: FusedDecoder, rows: Rows, memory: Memory) -> None:
    """From the rows' newest tokens to their next ones, where nothing changes the logits of any row."""
    _advance(rows, net.logits(net(rows.ids_b1, rows.position_b1, *memory)[:, -1]))


def decode_processed(net: FusedDecoder, rows: Rows, memory: Memory) -> None:
    """From the rows' newest tokens to their next ones."""
    _advance_processed(rows, net.logits(net(rows.ids_b1, rows.position_b1, *memory)[:, -1]))


def draft(net: FusedDecoder, rows: Rows, draft_bt: torch.Tensor, memory: Memory) -> None:
    """Like :func:`decode_processed`, and on while tokens are those that were drafted: 1 to t + 1 tokens a row.

    Args:
        draft_bt: ids that may come after the newest one.
    """
    tokens, ended_b = draft_bt.shape[1] + 1, rows.finished_b.clone()
    ids_bt = torch.cat([rows.ids_b1, torch.where(ended_b[:, None], rows.ids_b1, draft_bt)], dim=1)
    ahead_bt = torch.arange(tokens, device=ids_bt.device) * ~ended_b[:, None]
    logits_btv = net.logits(net(ids_bt, rows.position_b1 + ahead_bt, *memory))
    stays_b = torch.zeros_like(ended_b)
    for t in range(tokens):
        ids_b1, finished_b = rows.ids_b1.clone(), rows.finished_b.clone()
        rows.finished_b.logical_or_(stays_b)
        _advance_processed(rows, logits_btv[:, t].contiguous())
        rows.ids_b1.copy_(torch.where(stays_b[:, None], ids_b1, rows.ids_b1))
        rows.finished_b.copy_(torch.where(stays_b, finished_b, rows.finished_b))
        if t < tokens - 1:
            stays_b = stays_b | rows.finished_b | (rows.ids_b1[:, 0] != draft_bt[:, t])


def verify(net: FusedDecoder, chunk: Chunk, memory: Memory, logits_btv: torch.Tensor) -> None:
    """Write tokens to the cache, and the logits of what follows each of them to ``logits_btv``."""
    logits_btv.copy_(net.logits(net(*chunk, *memory)))


def decode_at_once(net: FusedDecoder, rows: Rows, memory: Memory) -> Callable[[], None]:
    """What :func:`decode` does on these arguments, as one operation."""
    weights, kinds, eps, activation = net.network()
    cos_sd, sin_sd, k_caches, v_caches, _ = memory
    args = (rows.tensors, cos_sd, sin_sd, weights, kinds, k_caches, v_caches, eps, activation, net.vocab_size)
    return functools.partial(ops.decode_step, *args)


def draft_at_once(net: FusedDecoder, rows: Rows, draft_bt: torch.Tensor, memory: Memory) -> Callable[[], None]:
    """What :func:`draft` does on these arguments, as one operation."""
    weights, kinds, eps, activation = net.network()
    cos_sd, sin_sd, k_caches, v_caches, _ = memory
    args = (draft_bt, cos_sd, sin_sd, weights, kinds, k_caches, v_caches, eps, activation, net.vocab_size)
    return functools.partial(ops.draft_step, rows.tensors, *args)


def verify_at_once(net: FusedDecoder, chunk: Chunk, memory: Memory, logits_btv: torch.Tensor) -> Callable[[], None]:
    """What :func:`verify` does on these arguments, as one operation."""
    weights, kinds, eps, activation = net.network()
    cos_sd, sin_sd, k_caches, v_caches, _ = memory
    args = (*chunk, cos_sd, sin_sd, weights, kinds, k_caches, v_caches, eps, activation, logits_btv)
    return functools.partial(ops.verify_step, *args)


def _advance_processed(rows: Rows, logits_bv: torch.Tensor) -> None:
    """Change the logits by what the rows ask for and have written so far, and go on from there."""
    processing, going_b1 = rows.processing, ~rows.finished_b[:, None]
    processing.tokens.scatter_(1, rows.position_b1, rows.ids_b1)
    logits_bv = ops.processed(logits_bv, processing, rows.position_b1[:, 0], rows.step_b, rows.limit_b)
    _advance(rows, logits_bv)
    processing.counts.scatter_add_(1, rows.ids_b1, 2 * going_b1.int())


def _advance(rows: Rows, logits_bv: torch.Tensor) -> None:
    """Sample; every row that has not ended is one token further."""
    token_b = ops.sample(logits_bv, rows.params, rows.position_b1[:, 0] + 1)
    token_b = torch.where(rows.finished_b, rows.pad_b, token_b)
    rows.output_bn.scatter_(1, rows.step_b[:, None], token_b[:, None])
    going_b = ~rows.finished_b
    rows.position_b1.add_(going_b[:, None])  # a row that has ended stays where it is, inside its cache
    rows.step_b.add_(going_b)
    rows.finished_b.logical_or_((token_b[:, None] == rows.eos_be).any(dim=1) | (rows.step_b >= rows.limit_b))
    rows.ids_b1.copy_(token_b[:, None])


def batch_bucket(rows: int) -> int:
    """The batch that ``rows`` rows run in: the next power of two."""
    return 1 << (rows - 1).bit_length()
