"""Tokens that would end an n-gram which a row has already get minus infinity, in Triton.

Every program looks at a block of a row's tokens, each as the last of an n-gram: where those before it are the newest of
the row, it is banned. Programs of rows that ask for nothing end at once, and so do those of blocks in which nothing is
left to ban. Bytes moved: a row's tokens up to n times, 8 each.

:mod:`fastllama_kernels.sampling.processing` has the definition. Needs compute capability 8.0, or the interpreter.

Shape suffixes: ``b`` batch, ``v`` vocabulary, ``s`` cache slots, ``n`` tokens of a block.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check
from fastllama_kernels.common.launch import Launch, cdiv

BLOCK = 1024


@triton.jit
def _ban_kernel(
    logits_ptr, tokens_ptr, size_ptr, position_ptr, vocab, slots, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    pdl.let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    at_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens_ptr += row * slots
    pdl.wait_for_previous(PDL)

    size, position = tl.load(size_ptr + row), tl.load(position_ptr + row)
    last = tl.where(size > 0, position, -1)
    repeats_n = (at_n >= size - 1) & (at_n <= last)
    back = tl.full((), 0, tl.int64)
    while (back < size - 1) & (tl.max(repeats_n.to(tl.int32), axis=0) > 0):
        newest = tl.load(tokens_ptr + position - back, mask=back <= position, other=-1)
        before_n = tl.load(tokens_ptr + at_n - 1 - back, mask=repeats_n, other=-2)
        repeats_n = repeats_n & (before_n == newest)
        back += 1
    token_n = tl.load(tokens_ptr + at_n, mask=repeats_n, other=0)
    tl.store(logits_ptr + row * vocab + token_n, float("-inf"), mask=repeats_n)


def plan_launch(
    logits_bv: torch.Tensor,
    tokens_bs: torch.Tensor,
    size_b: torch.Tensor,
    position_b: torch.Tensor,
    chip: tuple[int, int] | None = None,
) -> Launch:
    """The launch, which changes ``logits_bv`` in place.

    Args:
        logits_bv: float32.
        tokens_bs: int64, the row's tokens by their positions, all of the vocabulary up to the newest.
        size_b: int64, n of each row; 0 bans nothing.
        position_b: int64, of each row's newest token.
        chip: compute capability to make it for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    check("logits", logits_bv, logits_bv, (None, None), torch.float32)
    batch, vocab = logits_bv.shape
    check("tokens", tokens_bs, logits_bv, (batch, None), torch.int64)
    check("sizes", size_b, logits_bv, (batch,), torch.int64)
    check("positions", position_b, logits_bv, (batch,), torch.int64)
    with_pdl = pdl.used(logits_bv.device, chip)
    slots = tokens_bs.shape[1]
    arguments = {"logits_ptr": logits_bv, "tokens_ptr": tokens_bs, "size_ptr": size_b, "position_ptr": position_b}
    return Launch(
        "no repeated n-grams",
        _ban_kernel,
        (batch, cdiv(slots, BLOCK)),
        {**arguments, "vocab": vocab, "slots": slots},
        {"BLOCK": BLOCK, "PDL": with_pdl},
        reads=tokens_bs.nbytes,
        pdl=with_pdl,
    )


def ban_ngrams(
    logits_bv: torch.Tensor, tokens_bs: torch.Tensor, size_b: torch.Tensor, position_b: torch.Tensor
) -> None:
    """Ban them in place; see :func:`plan_launch` for the arguments."""
    plan_launch(logits_bv, tokens_bs, size_b, position_b).run()


torch.library.impl("fastllama::ban_ngrams", "CUDA", ban_ngrams)
