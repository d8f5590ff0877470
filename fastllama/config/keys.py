"""What the keys of a ``config.json`` mean beyond the fields of LlamaConfig: which change a Llama, and which do not.

A key that neither table knows is named in a warning: transformers does not read it for a Llama either.
"""

from __future__ import annotations

import re
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

    def is_neutral(self, value: Any) -> bool:
        """Whether a value changes nothing; so does a list of such values."""
        if isinstance(value, str):
            value = re.sub("[_ -]", "", value.lower())
        if isinstance(value, list) and value:
            return all(map(self.is_neutral, value))
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.neutral)


_EMPTY: tuple[Any, ...] = ({}, [], False, 0)
_ROTARY_PART = Change("rotate a part of each head only", (1, 1.0))

#: Keys that are known to change what a Llama computes, as patterns that a key holds somewhere: other networks of its
#: kind spell one thing in many ways. fastllama computes the neutral values only.
CHANGING_KEYS: dict[str, Change] = {
    r"^(is_)?causal$": Change("let tokens see those after them", (True,)),
    r"bidirectional": Change("let tokens see those after them"),
    r"(^|_)qk_?\w*norm|query_key_norm|^[qk]_norm": Change("normalize queries and keys"),
    r"^(use_)?post_(attention_)?norm|sandwich_norm|norm_after|unit_offset": Change("normalize elsewhere or otherwise"),
    r"^(layer_)?norm(alization)?_type$": Change("normalize otherwise", ("rms", "rmsnorm")),
    r"^num_(local_)?experts$": Change("replace the MLP by a choice of experts", (1, *_EMPTY)),
    r"^num_experts_per_tok(en)?$": Change("replace the MLP by a choice of experts", (1, *_EMPTY)),
    r"expert|(^|_)moe(_|$)|first_k_dense|mlp_only_layers": Change("replace the MLP by a choice of experts", _EMPTY),
    r"soft_?cap|logit_cap": Change("bound scores or logits smoothly", _EMPTY),
    r"^(residual|embedding|attention(_in|_out)?|key|lm_head|mlp|output|logits?)_multipliers?$": Change(
        "scale what the network computes", (1, 1.0)
    ),
    r"scale_embeddings|^(use_)?mup$": Change("scale what the network computes"),
    r"(logits?|embed\w*|emb|residual|attn|attention|softmax|head|depth|layer)_scal(e|ing)$": Change(
        "scale what the network computes", (1, 1.0, False)
    ),
    r"scale_(emb|depth)$|normalize_embeddings|^mup_|dim_model_base|query_pre_attn_scalar": Change(
        "scale what the network computes", (1, 1.0, False)
    ),
    r"^scale_attn_weights$": Change("leave the attention scores as they are", (True,)),
    r"scale_attn_by|temperature_tuning|logn_attn": Change("scale attention scores by layer or position", _EMPTY),
    r"^(bias|\w*(qkv|[qkvo]|attn|attention_out|linear|head)_bias|use_bias|add_qkv_bias|add_bias_linear)$": Change(
        "add biases that this network does not have"
    ),
    r"use_sliding|sliding_window_(pattern|size)|attention_(chunk_size|window|types|sinks)|^window_size|local_att": (
        Change("hide tokens by their distance", (-1, *_EMPTY))
    ),
    r"^(kv|q)_lora_rank|use_mla|kv_shared|cla_share": Change("compress or share keys and values", _EMPTY),
    r"no_rope_layers": Change("leave the rotary embedding out of some layers", (1, [], {})),
    r"no_rope|(^|_)nope(_|$)": Change("leave the rotary embedding out of some layers", _EMPTY),
    r"^use_rope$": Change("leave the rotary embedding out", (True,)),
    r"^(use_)?alibi$": Change("add a bias by distance to the attention scores"),
    r"^position_embedding_type$": Change("encode positions otherwise", ("rope", "rotary", "absolute")),
    r"(rotary|rope)_(pct|percent)|partial_rotary_factor": _ROTARY_PART,
    r"^rotary_dim$": Change("rotate a part of each head only", ()),
    r"rope_interleaved?$": Change("rotate neighbouring dimensions together"),
    r"^(rotary_emb_base|rope_base|rope_ratio|rope_local_base_freq)$": Change("rotate by other angles", ()),
    r"dynamic_ntk": Change("rotate by other angles", _EMPTY),
    r"clip_qkv": Change("bound queries, keys and values", _EMPTY),
    r"parallel_(attn|residual|attention)$": Change("add attention and MLP to the same input"),
    r"output_gate|gated_attention|cross_attention_layers|layers_block_type|skip_layers|block_configs": Change(
        "change the structure of the network", _EMPTY
    ),
    r"^(quantization_config|compression_config|quantization)$": Change("store the weights quantized", _EMPTY),
    r"^(pruned_heads|per_layer_config|is_encoder_decoder|tie_encoder_decoder|add_cross_attention)$": Change(
        "change the structure of the network", _EMPTY
    ),
}
_PATTERNS = [(re.compile(pattern), change) for pattern, change in CHANGING_KEYS.items()]

#: Models whose text part is a Llama where their config does not say what it is.
LLAMA_PARENTS = ("llava", "llava_next", "vipllava", "video_llava", "idefics3", "smolvlm")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def change_of(key: str) -> Change | None:
    """What a key is known to change, or None."""
    return next((change for pattern, change in _PATTERNS if pattern.search(key)), None)


def check_changing(values: Mapping[str, Any]) -> None:
    """Refuse the keys that are known to change a Llama and that are set to do so.

    Raises:
        ValueError: naming each of them, and what it would change.
    """
    layer_types = values.get("layer_types")
    if layer_types not in (None, ["full_attention"] * len(layer_types or ())):
        raise bad("layer_types", layer_types, "'full_attention' for every layer: others hide tokens by their distance")
    problems = [
        f"{key}={shortened(repr(value), 100)} would {change.what}"
        for key, value in values.items()
        if value is not None and (change := change_of(key)) is not None and not change.is_neutral(value)
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


def text_part(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a multimodal model's config that says what its Llama is; None where there is none."""
    parent = config.get("model_type")
    if parent in (None, "llama"):
        return None
    for name in TEXT_CONFIGS:
        text = config.get(name)
        if isinstance(text, Mapping) and (text.get("model_type") or (parent in LLAMA_PARENTS and "llama")) == "llama":
            shared = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "auto_map", "eos_token_id")
            default = {"eos_token_id": 2} | {key: config[key] for key in shared if key in config}
            return default | dict(text) | {"model_type": "llama"}
    return None
