"""What the keys of a ``config.json`` mean beyond the fields of LlamaConfig: which change a Llama, and which do not.

A key that is in none of these tables cannot be known to change anything: transformers ignores it too, and here it is
named in a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastllama.config.fields import bad, shortened, tolerate

# fmt: off
# Keys that Llama inference never reads, whatever their value.
INERT_KEYS = frozenset({
    "architectures", "transformers_version", "transformers.js_config", "_name_or_path", "_model_name_or_path",
    "name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal",
    "_flash_attn_2_enabled", "attn_implementation", "experts_implementation", "use_return_dict",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "finetuning_task", "id2label",
    "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix",
    "sep_token_id", "unk_token_id", "mask_token_id", "cls_token_id", "cross_attention_hidden_size",
    "gradient_checkpointing", "max_sequence_length", "model_max_length", "is_decoder", "is_llama_config",
    "sliding_window", "max_window_layers", "unsloth_fixed", "unsloth_version", "license", "ignore_index",
    "_from_auto", "_auto_class", "base_model_tp_plan", "base_model_pp_plan",
})
# fmt: on


class Change(NamedTuple):
    """What a key changes, and the values besides null under which it changes nothing."""

    what: str
    neutral: tuple[Any, ...] = (False,)


_ONE = (1, 1.0, False)
_NONE = (0, False)
_EMPTY: tuple[Any, ...] = ({}, [], False)
_QK_NORMS = Change("normalize queries and keys")
_NORMS = Change("normalize in other places or in another way")
_EXPERTS = Change("replace the MLP by a choice of experts", (0, 1, False, *_EMPTY))
_SOFT_CAP = Change("bound scores or logits smoothly", _NONE)
_SCALE = Change("scale what the network computes", (1, 1.0))
_BIASES = Change("add biases that this network does not have")
_WINDOW = Change("hide tokens by their distance", _NONE)
_LATENT = Change("compress keys and values", _NONE)
_QUANTIZED = Change("store the weights quantized", _EMPTY)
_STRUCTURE = Change("change the structure of the network", _EMPTY)

#: Keys that are known to change what a Llama computes; fastllama computes their neutral values only.
CHANGING_KEYS: dict[str, Change] = {
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "qk_layer_norm", "use_qk_layernorm"), _QK_NORMS),
    **dict.fromkeys(("post_norm", "use_post_norm", "sandwich_norm", "norm_after", "add_unit_offset"), _NORMS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe"), _EXPERTS),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "soft_cap"), _SOFT_CAP),
    **dict.fromkeys(("logit_scale", "logits_scaling", "logit_scaling", "logits_scale", "output_multiplier"), _SCALE),
    **dict.fromkeys(("residual_multiplier", "residual_scale", "embedding_multiplier", "embedding_scale"), _SCALE),
    **dict.fromkeys(
        ("attention_multiplier", "attention_scale", "scale_emb", "scale_depth", "lm_head_multiplier"), _SCALE
    ),
    **dict.fromkeys(("key_multiplier", "mlp_multipliers", "mup_base_width", "dim_model_base"), _SCALE),
    "query_pre_attn_scalar": Change("scale the attention scores by another number", ()),
    "scale_attn_weights": Change("leave the attention scores as they are", (True,)),
    "scale_attn_by_inverse_layer_idx": Change("scale the attention scores by layer"),
    "attn_temperature_tuning": Change("scale queries by their position", _NONE),
    **dict.fromkeys(
        ("qkv_bias", "add_qkv_bias", "use_qkv_bias", "use_bias", "add_bias_linear", "lm_head_bias"), _BIASES
    ),
    **dict.fromkeys(("use_sliding_window", "attention_chunk_size", "attention_window", "window_size"), _WINDOW),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "use_mla"), _LATENT),
    "no_rope_layers": Change("leave the rotary embedding out of some layers", _EMPTY),
    "no_rope_layer_interval": Change("leave the rotary embedding out of some layers", _NONE),
    "nope_layer_interval": Change("leave the rotary embedding out of some layers", _NONE),
    "use_rope": Change("leave the rotary embedding out", (True,)),
    "alibi": Change("add a bias by distance to the attention scores"),
    "position_embedding_type": Change("encode positions otherwise", ("rope", "rotary", "rotary_embedding", "absolute")),
    "partial_rotary_factor": Change("rotate a part of each head only", (1, 1.0)),
    "rotary_pct": Change("rotate a part of each head only", (1, 1.0)),
    "rope_percent": Change("rotate a part of each head only", (1, 1.0)),
    "rotary_dim": Change("rotate a part of each head only", ()),
    "rope_interleaved": Change("rotate neighbouring dimensions together"),
    "clip_qkv": Change("bound queries, keys and values", _NONE),
    "parallel_attn": Change("add attention and MLP to the same input"),
    "use_parallel_residual": Change("add attention and MLP to the same input"),
    "cross_attention_layers": Change("attend to images in some layers", _EMPTY),
    "layer_norm_type": Change("normalize in another way", ("rms", "rmsnorm", "rms_norm", "RMSNorm")),
    "norm_type": Change("normalize in another way", ("rms", "rmsnorm", "rms_norm", "RMSNorm")),
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"), _QUANTIZED),
    **dict.fromkeys(("pruned_heads", "per_layer_config", "block_configs"), _STRUCTURE),
    **dict.fromkeys(("is_encoder_decoder", "tie_encoder_decoder", "add_cross_attention"), _STRUCTURE),
}


def check_changing(values: Mapping[str, Any]) -> None:
    """Refuse the keys that are known to change a Llama and that are set to do so.

    Raises:
        ValueError: naming each of them, and what it would change.
    """
    layer_types = values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}
    ):
        raise bad("layer_types", layer_types, "'full_attention' for every layer: others hide tokens by their distance")
    problems = [
        f"{key}={shortened(repr(values[key]), 100)} would {change.what}"
        for key, change in CHANGING_KEYS.items()
        if values.get(key) is not None and values[key] not in change.neutral
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}: fastllama computes a plain Llama and nothing else")


def check_own_code(values: Mapping[str, Any], strict: bool) -> None:
    """Warn about a config that comes with code of its own, for another class than Llama's."""
    classes = values.get("auto_map")
    named = classes.values() if isinstance(classes, Mapping) else ()
    own = sorted({str(name) for name in named if not str(name).rpartition(".")[2].startswith("Llama")})
    if own:
        tolerate(f"auto_map names code of its own, {', '.join(own)}, which is not run: this is a plain Llama", strict)
