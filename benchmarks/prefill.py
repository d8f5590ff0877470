"""Prefill: the time to the first token of a prompt, and what that comes to in tokens and operations a second."""

from __future__ import annotations

from typing import Any

from fastllama import LlamaForCausalLM

from .compare import Comparison
from .harness import Workload


def prefill_flops(model: LlamaForCausalLM, workload: Workload) -> float:
    """Floating-point operations of the prompts' matrix products: two a weight and token, and attention's.

    The head is counted for one token a row, the embedding not at all. Attention is causal: on average a token sees
    half the prompt, in two products of two operations a query head and dimension.
    """
    config = model.config
    layer_weights = sum(p.numel() for p in model.model.layers.parameters())
    head_weights = model.lm_head.weight.numel()
    width = config.num_attention_heads * (config.head_dim or 0)
    attention = 4 * config.num_hidden_layers * width * workload.prompt_len / 2
    return workload.batch * (workload.prompt_len * (2 * layer_weights + attention) + 2 * head_weights)


def prefill_fields(comparison: Comparison, flops: float) -> dict[str, Any]:
    """The fields of a prefill record: a decode record's, with prompt tokens in place of new ones."""
    tokens = comparison.workload.batch * comparison.workload.prompt_len
    fields = comparison.to_dict()
    for entry in (fields, *fields["peers"].values()):
        if "ttft_ms" in entry:
            entry["tokens_per_second"] = 1e3 * tokens / entry["ttft_ms"]
            entry["tflops"] = flops / entry["ttft_ms"] / 1e9
    for entry in fields["peers"].values():
        if "ttft_ms" in entry:
            entry["ratio"] = entry["ttft_ms"] / fields["ttft_ms"]
    return fields
