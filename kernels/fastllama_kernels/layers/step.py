"""A whole step on a CPU in one operation (``step.cpp``): from ids to the next ids, or to logits.

    decode_step    logits of each row's newest token, a sample of them, and the bookkeeping of the rows
    draft_step     the same with some tokens after the newest one that may come next: rows go on while they are those
                   that are sampled, and one token further
    verify_step    logits of all positions of a few tokens a row

They are made of the operations of the other modules and compute what these do. Nothing is compiled for them when a
program starts, and between two kernels there is nothing but a function call in C++.

``rows`` are buffers, updated in place: ids int64 ``[b, 1]``, positions int64 ``[b, 1]``, finished bool ``[b]``, new
tokens so far int64 ``[b]``, output int64 ``[b, n]``, limit int64 ``[b]``, EOS ids int64 ``[b, e]``, pad id int64
``[b]``, then the fields of :class:`fastllama_kernels.sampling.processing.Processing` and of
:class:`fastllama_kernels.sampling.op.SamplingParams`. ``weights`` and ``kinds`` are those of the embedding, of the
layers as :func:`fastllama_kernels.layers.op.flatten` gives them, the last norm, and those of the head. Columns of the
head beyond ``vocab`` fill up its last panel. ``drafts``: int64 ``[b, t - 1]``, ids of the vocabulary.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``n`` output tokens, ``e`` EOS ids, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastllama_kernels.layers.op import Layer, Weights, flatten

_NETWORK = (
    "Tensor cos, Tensor sin, Tensor[] weights, int[] kinds, Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, "
    "float eps, int activation"
)
torch.library.define("fastllama::decode_step", f"(Tensor(c!)[] rows, {_NETWORK}, int vocab) -> ()")
torch.library.define("fastllama::draft_step", f"(Tensor(c!)[] rows, Tensor drafts, {_NETWORK}, int vocab) -> ()")
torch.library.define("fastllama::verify_step", f"(Tensor ids, Tensor positions, {_NETWORK}, Tensor(c!) logits) -> ()")


@torch.library.register_fake("fastllama::decode_step")
@torch.library.register_fake("fastllama::draft_step")
@torch.library.register_fake("fastllama::verify_step")
def _step_fake(*args) -> None:
    return None


def network(
    embedding: Weights, layers: Iterable[Layer], norm: torch.Tensor, head: Weights
) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
    """``weights`` and ``kinds`` of a network."""
    tensors, kinds = flatten(layers)
    return [*embedding.tensors, *tensors, norm, *head.tensors], [embedding.kind, *kinds, head.kind]
