"""The settings that generate() knows. What the compiled step does are fields of GenerationConfig, the rest is here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastllama.config.fields import check_bool, check_int, check_number, shortened
from fastllama.config.tokens import check_biases, check_one_or_more, check_sequences, check_tokens

# fmt: off
# Generation settings that the compiled step does not do, each with the value (besides null) that has no effect. Older
# checkpoints have them in config.json too; they do not concern the network, so GenerationConfig reads them.
OUTSIDE_THE_STEP: dict[str, Any] = {
    "max_time": None, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0,
    "dola_layers": None, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "force_words_ids": [], "constraints": [],
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "token_healing": False,
    "guidance_scale": 1.0, "watermarking_config": None, "return_dict_in_generate": False,
    # Arguments of generate() alone.
    "logits_processor": [], "stopping_criteria": [], "synced_gpus": False,
    "assistant_model": None, "negative_prompt_ids": None, "negative_prompt_attention_mask": None,
    "custom_generate": None, "inputs_embeds": None, "past_key_values": None, "cache": None, "position_ids": None,
}

# What has an effect only next to one of those.
DETAILS: dict[str, Any] = {
    "early_stopping": False, "length_penalty": 1.0, "renormalize_logits": False, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "output_logits": False,
}

# Arguments of generate() alone that the step does.
FUNCTIONS: dict[str, Any] = {"prefix_allowed_tokens_fn": None, "token_mask": None}

# What ends a row besides its limit and EOS ids; the step does that, with the tokenizer.
ENDS: dict[str, Any] = {"stop_strings": None, "tokenizer": None}

# How tokens are drafted, which changes nothing of what comes out.
DRAFTS: dict[str, Any] = {
    "speculate": "off", "prompt_lookup_num_tokens": None, "max_matching_ngram_size": None,
    "prompt_lookup_pool_tokens": 0, "num_assistant_tokens": None, "num_assistant_tokens_schedule": None,
    "assistant_confidence_threshold": None,
}

# Generation settings that do not change which tokens come out: how caches and compilation are organised, and details of
# transformers' assisted decoding.
INERT_GENERATION = frozenset({
    "transformers_version", "_from_model_config", "_commit_hash", "generation_kwargs", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config", "decoder_start_token_id", "is_assistant",
    "assistant_early_exit",
    "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind", "speculation_type", "use_mtp",
})
# fmt: on

# What null means in a call.
OFF = {
    "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_length": 0,
    "num_return_sequences": 1, "eos_token_id": (), "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0, "typical_p": 1.0,
}  # fmt: skip
NOT_IN_TRANSFORMERS = ("presence_penalty", "frequency_penalty", "seed")
# What matters to a call that samples only: fields, and settings outside the step.
WARPERS = ("top_h", "epsilon_cutoff", "eta_cutoff")
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")


_AT_LEAST_0, _AT_LEAST_1 = (functools.partial(check_int, at_least=least) for least in (0, 1))
_FRACTION = functools.partial(check_number, at_least=0, at_most=1)
_PENALTY = functools.partial(check_number, at_least=-100, at_most=100)
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "do_sample": check_bool, "temperature": functools.partial(check_number, at_least=0), "top_k": _AT_LEAST_0,
    "top_p": _FRACTION, "min_p": _FRACTION, "typical_p": functools.partial(check_number, above=0, at_most=1),
    "max_length": _AT_LEAST_1, "max_new_tokens": _AT_LEAST_1,
    "repetition_penalty": functools.partial(check_number, above=0), "min_new_tokens": _AT_LEAST_0,
    "min_length": _AT_LEAST_0, "num_return_sequences": _AT_LEAST_1, "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY, "no_repeat_ngram_size": _AT_LEAST_0, "bad_words_ids": check_sequences,
    "sequence_bias": check_biases, "suppress_tokens": check_tokens, "begin_suppress_tokens": check_tokens,
    "forced_bos_token_id": _AT_LEAST_0, "forced_eos_token_id": check_one_or_more,
    "pad_token_id": _AT_LEAST_0, "bos_token_id": _AT_LEAST_0, "seed": _AT_LEAST_0,
}  # fmt: skip
LISTS = ("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
NEUTRAL = OUTSIDE_THE_STEP | DETAILS | FUNCTIONS | ENDS | DRAFTS
KNOWN = NEUTRAL.keys() | INERT_GENERATION


def set_of(neutral: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that have another value than the neutral one, or null."""
    found = {key: values[key] for key in neutral if values.get(key) is not None}
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor) or value != neutral[key]}


def said(settings: Mapping[str, Any]) -> str:
    """Settings with their values, as they are written in a call."""
    return ", ".join(f"{key}={shortened(_written(value), 100)}" for key, value in settings.items())


def _written(value: Any) -> str:
    """A value as a warning has it: alike for alike objects, or it would not be said once but in every call."""
    return (
        f"tensor{list(value.shape)}" if isinstance(value, torch.Tensor) else re.sub(" at 0x[0-9a-f]+", "", repr(value))
    )
