"""transformers' own decoding loops with logits of the engine: beams, processors and criteria are theirs.

A loop hands over whole sequences at every step; the engine finds in its slots what it has computed of them before, in
whatever order beams come, and computes the rest. So nothing depends on the cache API of a version of transformers.

Shape suffixes: ``b`` batch, ``t`` tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``v`` vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastllama import ops
from fastllama.engine.runner import Runner
from fastllama.generation.request import unpad

NEEDS_ALL_OF_THE_FORWARD = (
    "inputs_embeds", "past_key_values", "cache", "position_ids", "output_attentions", "output_hidden_states",
    "assistant_model", "custom_generate", "penalty_alpha", "dola_layers",
)  # fmt: skip


def why_not(runner: Runner, asked: Mapping[str, Any], rows: int, attention_mask: Any) -> str | None:
    """Why the loop of a call has to go over the eager forward; None where it can have its logits from the engine.

    Args:
        runner: of the model.
        asked: what the call and its config set, by transformers' names.
        rows: of the batch, before it is expanded to beams.
        attention_mask: of the call.
    """
    for name in NEEDS_ALL_OF_THE_FORWARD:
        value = asked.get(name)
        if value if isinstance(value, (bool, int, float)) else value is not None:
            return f"{name} is given"
    if attention_mask is not None and attention_mask.dim() != 2:
        return "the attention mask is not [batch, tokens]"
    return runner.why_no_logits(rows * max(asked.get(name) or 1 for name in ("num_beams", "num_return_sequences")))


def over_engine(model: Any, runner_of: Callable[[], Runner]) -> Any:
    """A shallow copy of a model of transformers, whose decoding loops get their logits from the engine; for one call.

    Args:
        model: a ``transformers.LlamaForCausalLM``, or what looks like it.
        runner_of: gives the engine, at the first step.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    twin, forward, vocab_size = copy.copy(model), model.forward, model.config.vocab_size
    runner: Runner | None = None

    @functools.wraps(forward)
    def logits_of(*args: Any, whole_bt: torch.Tensor | None = None, **kwargs: Any) -> Any:
        nonlocal runner
        if whole_bt is None:  # of a processor that calls the model itself
            return forward(*args, **kwargs)
        sequences = _sequences(whole_bt, kwargs["attention_mask"], vocab_size)
        goes_on, runner = runner is not None, runner or runner_of()
        longest = max(map(len, sequences))
        with runner.session():
            runner.reserve(len(sequences), longest if runner.cache else max(longest, runner.default_cache_len))
            logits_bv = runner.logits_after(sequences, goes_on).to(whole_bt.device, torch.float32, copy=True)
        return CausalLMOutputWithPast(logits=logits_bv[:, None])  # type: ignore[arg-type]

    def whole(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> dict[str, Any]:
        return {"whole_bt": input_ids, "attention_mask": attention_mask}

    twin.__dict__ |= {"forward": logits_of, "prepare_inputs_for_generation": whole}
    return twin


def with_cache(done: Any, runner: Runner, attention_mask: torch.Tensor | None) -> Any:
    """What such a loop has returned, with the cache that it would have over the eager forward; none after beams.

    Args:
        done: tokens, or transformers' output object.
        runner: of the model.
        attention_mask: of the prompts.
    """
    name = next((name for name in ("past_key_values", "cache") if hasattr(done, name)), None)
    if name is None:
        return done
    cache, whole_bt = None, done.sequences
    if not hasattr(done, "beam_indices") and whole_bt.shape[1] > 1:
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(len(whole_bt) // len(attention_mask), dim=0)
        cache = cache_of(runner, whole_bt, attention_mask)
    setattr(done, name, cache)
    return done


def cache_of(runner: Runner, whole_bt: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
    """A ``transformers.DynamicCache`` of sequences that the engine has decoded, all but their last tokens.

    Args:
        runner: of the model.
        whole_bt: prompts and new tokens.
        attention_mask: of the prompts; what is padded holds zeros.
    """
    from transformers import DynamicCache

    mask_bt = torch.ones_like(whole_bt[:, :-1])
    if attention_mask is not None:
        mask_bt[:, : attention_mask.shape[1]] = attention_mask != 0
    is_there_bt, cache = mask_bt.bool().cpu(), DynamicCache()
    sequences = _sequences(whole_bt[:, :-1], mask_bt, runner.config.vocab_size)
    with runner.session():
        runner.reserve(len(sequences), max(map(len, sequences)))
        runner.logits_after(sequences, goes_on=True)
        held = runner.cache
        assert held is not None
        for layer, layer_bksd in enumerate(zip(held.key_cache, held.value_cache, strict=True)):
            parts = []
            for part_bksd in layer_bksd:
                decoded_bksd = ops.kv_decoded(part_bksd[: len(sequences)], runner.dtype)
                part_bktd = decoded_bksd.new_zeros(*mask_bt.shape, decoded_bksd.shape[1], decoded_bksd.shape[3])
                for row, sequence in enumerate(sequences):
                    part_bktd[row, is_there_bt[row]] = decoded_bksd[row, :, : len(sequence)].transpose(0, 1)
                parts.append(part_bktd.transpose(1, 2))
            cache.update(*parts, layer)
    return cache


def _sequences(whole_bt: torch.Tensor, mask_bt: torch.Tensor | None, vocab_size: int) -> list[torch.Tensor]:
    ids_bt = whole_bt.cpu().clamp(0, vocab_size - 1)  # the pad id of a row that has ended may be any number
    return unpad(ids_bt, None if mask_bt is None else mask_bt.cpu())
