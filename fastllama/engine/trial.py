"""Whether a compiled step does what it was made of: it runs on a text of its own, and all is put back as it was.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``v`` vocabulary, ``n`` tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastllama import ops
from fastllama.engine import steps
from fastllama.engine.buffers import Buffers
from fastllama.engine.decoder import FusedDecoder
from fastllama.engine.graphs import StepKey
from fastllama.engine.row import ALWAYS
from fastllama.engine.state import Rows

TEXT = 8  # tokens that each row holds before the step
COMPARED = 8  # tokens of a step
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of what is largest


def agrees(net: FusedDecoder, buffers: Buffers, key: StepKey, compiled: Callable[[], None]) -> bool:
    """Whether a compiled step gives what the network gives as it is written, token after token.

    Each row has tokens of its own before it and samples the most likely one; where the step processes logits, that
    which would come first is banned. What is compared: keys and values of every layer, and logits, or where the step
    samples the logits of its tokens, which may differ within rounding.
    """
    b, tokens = key.batch, min(key.tokens, COMPARED)
    before = max(0, min(TEXT, buffers.cache.max_cache_len - tokens))
    tokens = min(tokens, buffers.cache.max_cache_len)
    new = slice(before, before + tokens)
    with torch.no_grad(), buffers.trial(b, new.stop) as rows:
        start_b1 = _begin(net, buffers, rows, before)
        kept = [x.clone() for x in rows.tensors]
        plain = steps.decode if key.kind == "decode" else steps.decode_processed
        logits, processed = (torch.stack(each, dim=1) for each in _one_by_one(net, buffers, rows, plain, tokens))
        right_bt, wanted = rows.output_bn[:, :tokens].clone(), buffers.held(b, new)
        for buffer, value in zip(rows.tensors, kept, strict=True):
            buffer.copy_(value)
        buffers.wipe(b, new)
        if key.kind in ("prefill", "verify"):
            chunk, at_t = buffers.chunk(b, key.tokens), torch.arange(key.tokens, device=buffers.device)
            at_t = at_t.clamp(max=tokens - 1)  # the last token fills it up
            chunk.ids_bt.copy_(torch.cat((start_b1, right_bt), dim=1)[:, at_t])
            chunk.position_bt.copy_((before + at_t).expand_as(chunk.position_bt))
        if key.kind == "draft":
            buffers.draft(b, tokens - 1).copy_(right_bt[:, :-1])
        if key.kind == "verify":
            buffers.logits(b, key.tokens).zero_()
        compiled()
        errors = [_error(buffers.held(b, new) - wanted, wanted)]
        if key.kind == "verify":
            errors += [_error(buffers.logits(b, key.tokens)[:, :tokens] - logits, logits)]
        elif key.kind != "prefill":
            wanted = logits if key.kind == "decode" else processed
            errors += _sampled(rows, before, right_bt, wanted, logits)
    return all(error <= TOLERANCE[buffers.dtype] for error in errors)


def _begin(net: FusedDecoder, buffers: Buffers, rows: Rows, before: int) -> torch.Tensor:
    """Give each row a text and settings of its own; its newest token ``[b, 1]``."""
    b, device = len(rows.ids_b1), buffers.device
    noise = torch.Generator("cpu").manual_seed(0)
    text_bn = torch.randint(net.vocab_size, (b, before + 1), generator=noise, device="cpu").to(device)
    if before:
        net(text_bn[:, :-1].contiguous(), torch.arange(before, device=device).repeat(b, 1), *buffers.memory)
    rows.ids_b1.copy_(text_bn[:, -1:])
    rows.position_b1.fill_(before)
    rows.limit_b.fill_(COMPARED + 2)
    rows.params.temperature.fill_(0.7)
    rows.params.top_k.fill_(1)
    likely_bv = net.logits(net(rows.ids_b1, rows.position_b1, *buffers.memory)[:, -1])
    rows.processing.bias_tokens[:, 0, -1] = likely_bv.argmax(dim=1)
    rows.processing.bias_values[:, 0] = -torch.inf
    rows.processing.bias_until[:, 0] = ALWAYS
    return text_bn[:, -1:]


def _one_by_one(
    net: FusedDecoder, buffers: Buffers, rows: Rows, step: Callable[..., None], tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Take steps as they are written; the logits ``[b, v]`` of each, plain and processed."""
    plain, processed = list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(tokens):
        plain.append(net.logits(net(rows.ids_b1, rows.position_b1, *buffers.memory)[:, -1]).float())
        rows.processing.tokens.scatter_(1, rows.position_b1, rows.ids_b1)
        state = (rows.processing, rows.position_b1[:, 0], rows.step_b, rows.limit_b)
        processed.append(ops.processed(plain[-1].to(buffers.dtype), *state).float())
        step(net, rows, buffers.memory)
    return plain, processed


def _sampled(
    rows: Rows, before: int, right_bt: torch.Tensor, logits_btv: torch.Tensor, plain_btv: torch.Tensor
) -> Iterator[float]:
    """How far a step's tokens are from those that are right, and its rows from where they should be."""
    tokens = right_bt.shape[1]
    moved_b1, given_bt = rows.position_b1 - before, rows.output_bn[:, :tokens]
    yield _wrong((moved_b1 < 1) | (moved_b1 > tokens) | (moved_b1[:, 0] != rows.step_b)[:, None])
    moved_b1 = moved_b1.clamp(1, tokens)
    yield _wrong(given_bt.gather(1, moved_b1 - 1) != rows.ids_b1)
    place_t = torch.arange(tokens, device=right_bt.device)
    is_right_bt = given_bt == right_bt
    yield _wrong(~is_right_bt & (place_t < moved_b1 - 1))  # it goes on after a right token
    yield _wrong(is_right_bt & (place_t == moved_b1 - 1) & (moved_b1 < tokens))  # and ends after another one
    gap_bt = logits_btv.amax(dim=2) - logits_btv.gather(2, given_bt[:, :, None])[:, :, 0]
    yield _error(gap_bt.masked_fill(place_t >= moved_b1, 0), plain_btv)


def _wrong(where: torch.Tensor) -> float:
    return float(where.any())


def _error(difference: torch.Tensor, wanted: torch.Tensor) -> float:
    largest = wanted.abs().amax().cpu().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference.abs().amax().cpu() / largest)
