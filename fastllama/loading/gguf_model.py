"""A Llama in a GGUF file: its configs, and its tensors under Hugging Face's names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import gguf
import torch

from fastllama.config import GenerationConfig, LlamaConfig, RopeParameters
from fastllama.config.fields import tolerate
from fastllama.config.llama import dtype_name
from fastllama.loading.gguf import Gguf, GgufTensor
from fastllama.loading.stored import CheckpointError

ARCHITECTURE = "llama"
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
#: Values that would change the result, by what follows ``llama.``, and the values under which they do not.
CHANGING_FIELDS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0, 1), "attention.sliding_window": (0,), "attention.scale": (0.0,), "logit_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "use_parallel_residual": (False,),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "attention.causal": (True,), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "attention.value_scale": (1.0,), "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,), "attention.temperature_length": (0,), "swin_norm": (False,),
    "attention.sliding_window_pattern": (0, False), "no_rope_layer_step": (0,), "attn_output_gate": (False,),
    "expert_shared_count": (0,),
}  # fmt: skip
#: Values that are read, or that change nothing.
KNOWN_FIELDS = frozenset({
    *CHANGING_FIELDS, "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "expert_used_count", "tensor_data_layout", "attention.group_norm_epsilon", "leading_dense_block_count",
})  # fmt: skip
#: Tokens that end a turn, by what they are called, where a file does not say: as llama.cpp finds them.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")


def config_of(file: Gguf, strict: bool = False) -> LlamaConfig:
    """The network's config, from the values of a file.

    Factors by which dimensions turn more slowly become a ``longrope`` with the same factors for every length.

    Raises:
        CheckpointError: the file holds no Llama, lacks a value, or has one that fastllama does not compute.
        ValueError: a value out of range.
    """
    architecture = file.fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path} holds the architecture {architecture!r}; expected {ARCHITECTURE!r}: "
            "fastllama runs Llama checkpoints only"
        )
    _check_fields(file, strict)
    heads, hidden = _needed(file, "attention.head_count"), _needed(file, "embedding_length")
    head_dim = _value(file, "attention.key_length", hidden // heads if heads else 0)
    rotated = _value(file, "rope.dimension_count", head_dim)
    if rotated != head_dim or _value(file, "attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: heads of {head_dim} of which {rotated} turn; expected all of them to")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: no matrix token_embd.weight, which every Llama has")
    ids = {name: _token_id(file, key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=_needed(file, "feed_forward_length"),
        num_hidden_layers=_needed(file, "block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_value(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_value(file, "context_length", LlamaConfig.max_position_embeddings),
        rms_norm_eps=_needed(file, "attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        rope=_rope(file, head_dim, strict),
        dtype=dtype_name(_dtype(file, embedding)),
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
    )


def _dtype(file: Gguf, embedding: GgufTensor) -> torch.dtype:
    """As the embedding is stored; float32 where some matrix has blocks or is float32."""
    matrices = {tensor.natural_dtype for tensor in file.tensors.values() if len(tensor.shape) == 2}
    return torch.float32 if torch.float32 in matrices else embedding.natural_dtype


def generation_config_of(file: Gguf) -> GenerationConfig:
    """Which tokens begin, end and pad a text, from the values of a file."""
    tokens, types = (file.fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    ends = [_token_id(file, key) for key in ("eos", "eot", "eom")]
    if isinstance(tokens, list) and isinstance(types, list):
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind in (3, 4)}
        ends += [special.get(token) for token in END_OF_TURN]
    eos = tuple(dict.fromkeys(token for token in ends if token is not None))
    return GenerationConfig(
        bos_token_id=_token_id(file, "bos"), eos_token_id=eos, pad_token_id=_token_id(file, "padding")
    )


def tensors_of(file: Gguf, config: LlamaConfig) -> dict[str, GgufTensor]:
    """The tensors by Hugging Face's names; those that have none there keep their own."""
    layers = range(config.num_hidden_layers)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    pattern = re.compile(r"blk\.(\d{1,9})\.([\w.]+)")
    modules = _layer_modules()
    found: dict[str, GgufTensor] = {}
    for key, tensor in file.tensors.items():
        if key in ROPE_FACTORS or key.endswith(".attn_rot_embd.weight"):
            continue
        base, _, suffix = key.rpartition(".")
        block = pattern.fullmatch(base)
        if block is None:
            found[f"{names.get(base, f'model.{base}')}.{suffix}"] = tensor
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(block[2], 0)
        if heads and int(block[1]) in layers and tensor.shape[0] == heads * config.head_dim:
            tensor = dataclasses.replace(tensor, heads=heads)
        found[f"model.layers.{block[1]}.{modules.get(block[2], block[2])}.{suffix}"] = tensor
    return found


def _layer_modules() -> dict[str, str]:
    """Hugging Face's names of a layer's modules, by GGUF's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    ours = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    ours += ["input_layernorm", "post_attention_layernorm"]
    return {str(names.get_name(f"model.layers.0.{module}")).removeprefix("blk.0."): module for module in ours}


def _rope(file: Gguf, head_dim: int, strict: bool) -> RopeParameters:
    theta = _value(file, "rope.freq_base", RopeParameters.rope_theta)
    factor = _value(file, "rope.scaling.factor", _value(file, "rope.scale_linear", 0.0)) or 1.0
    kind = _value(file, "rope.scaling.type", "linear")  # as llama.cpp takes a factor without a type
    attention = _value(file, "rope.scaling.attn_factor", 0.0)
    if kind != "longrope" and attention not in (0.0, 1.0):
        raise CheckpointError(f"{file.path}: rope scaling {kind!r} with attn_factor={attention}, which is not computed")
    original = _value(file, "rope.scaling.original_context_length", None)
    factors = {name: _numbers(file, name, head_dim) for name in ROPE_FACTORS if name in file.tensors}
    if factors and kind not in ("none", "linear", "longrope"):
        raise CheckpointError(f"{file.path}: {', '.join(factors)} with rope scaling {kind!r}, which is not computed")
    if factors:
        plain = factors.get("rope_freqs.weight")
        if kind == "linear" and plain:
            plain = tuple(factor * each for each in plain)
        short, long = plain or factors.get(ROPE_FACTORS[1]), plain or factors.get(ROPE_FACTORS[2])
        scale = 1.0 if plain else attention or None
        return RopeParameters(
            rope_type="longrope",
            rope_theta=theta,
            short_factor=short,
            long_factor=long,
            attention_factor=scale,
            original_max_position_embeddings=original,
        )
    if kind == "yarn":
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        betas = {name: _value(file, f"rope.scaling.{key}", None) for name, key in names.items()}
        return RopeParameters("yarn", theta, factor, original, **betas)
    if kind == "linear" and factor != 1.0:
        return RopeParameters("linear", theta, factor)
    if kind not in ("none", "linear"):
        tolerate(f"{file.path}: rope scaling {kind!r} without factors has no effect", strict)
    return RopeParameters(rope_theta=theta)


def _numbers(file: Gguf, name: str, head_dim: int) -> tuple[float, ...]:
    tensor = file.tensors[name]
    if tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{file.path}: {name} has shape {list(tensor.shape)}, expected [{head_dim // 2}]")
    return tuple(torch.cat([block for _, block in tensor.blocks()]).tolist())


def _check_fields(file: Gguf, strict: bool) -> None:
    prefix = f"{ARCHITECTURE}."
    unknown = [key for key in file.fields if key.startswith(prefix) and key.removeprefix(prefix) not in KNOWN_FIELDS]
    if unknown:
        tolerate(f"{file.path}: unknown values {', '.join(sorted(unknown)[:8])}: left out", strict)
    problems = [
        f"{ARCHITECTURE}.{name}={value!r}"
        for name, neutral in CHANGING_FIELDS.items()
        if (value := file.fields.get(f"{ARCHITECTURE}.{name}")) is not None and value not in neutral
    ]
    if problems:
        raise CheckpointError(
            f"{file.path} would change the network in ways that fastllama does not compute:", problems
        )


def _value(file: Gguf, name: str, default: Any) -> Any:
    """A value of the network; of one for each layer, the one that all have."""
    value = file.fields.get(f"{ARCHITECTURE}.{name}", default)
    if isinstance(value, list):
        if len(set(map(str, value))) != 1:
            raise CheckpointError(
                f"{file.path}: {ARCHITECTURE}.{name} differs by layer, which fastllama does not compute"
            )
        value = value[0]
    return value


def _needed(file: Gguf, name: str) -> Any:
    value = _value(file, name, None)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{file.path}: {ARCHITECTURE}.{name} is {value!r:.100}; expected a number")
    return value


def _token_id(file: Gguf, name: str) -> int | None:
    """The id of a token with a role; what lies outside of the vocabulary means none."""
    token = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    return token if isinstance(token, int) and 0 <= token < 2**31 else None
