"""Write weights as a GGUF file, as llama.cpp's own converter would."""

from __future__ import annotations

import math
import os
from typing import Any

import gguf
import numpy as np
import torch

from fastllama import ops
from fastllama.config import LlamaConfig, RopeParameters
from fastllama.model.llama import Llama
from fastllama.model.rope import inverse_frequencies
from fastllama.quantization.linear import Packed, is_tied, packed_modules

ROPE_TYPES = ("default", "linear", "llama3")
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def write_gguf(model: Llama, path: str | os.PathLike[str]) -> None:
    """Write the weights and constants that llama.cpp needs to run the network on token ids.

    Matrices keep the model's dtype; quantized ones become blocks of as many bits, Q8_0 and Q4_0, with scales of their
    own. Norms and biases become float32, the only type llama.cpp takes them in. A tied head is left out. There is no
    tokenizer: the file says so, and has the number of tokens. Besides the model, one tensor at a time is in memory.

    Args:
        model: on any device.
        path: the file; an existing one is overwritten.

    Raises:
        NotImplementedError: llama.cpp cannot compute this network.
    """
    check_expressible(model.config, model.dtype)
    writer = gguf.GGUFWriter(path, "llama")
    _add_constants(writer, model.config)
    tensors = _tensors(model)
    kinds = {_kind(tensor).name for tensor in tensors.values() if isinstance(tensor, Packed)}
    file_type = f"MOSTLY_{min(kinds)}" if kinds else FILE_TYPES[model.dtype]  # Q4_0 with a Q8_0 head is Q4_0
    writer.add_file_type(gguf.LlamaFileType[file_type])
    for name, tensor in tensors.items():
        kind = _kind(tensor)
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = tensor.shape[-1] // size * nbytes
        is_packed = isinstance(tensor, Packed)
        shape = (tensor.shape[0], row_bytes) if is_packed else tuple(tensor.shape)  # of blocks it wants bytes
        array = np.empty(0, np.uint8) if is_packed else _to_numpy(tensor[:0])
        writer.add_tensor_info(name, shape, array.dtype, math.prod(tensor.shape[:-1]) * row_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            if isinstance(tensor, Packed):
                array = _to_numpy(_reordered(name, tensor.weight, model.config))
                writer.write_tensor_data(gguf.quants.quantize(array, _kind(tensor)))
            else:
                writer.write_tensor_data(_to_numpy(_reordered(name, tensor, model.config)))
    finally:
        writer.close()


def check_expressible(config: LlamaConfig, dtype: torch.dtype) -> None:
    """Raise :class:`NotImplementedError` if llama.cpp's llama architecture cannot compute this network."""
    if dtype not in TYPES:
        raise NotImplementedError(f"llama.cpp has no {str(dtype).removeprefix('torch.')} matrices")
    if ops.ACTIVATIONS[config.hidden_act] != ops.ACTIVATIONS["silu"]:
        raise NotImplementedError(f"llama.cpp's llama has hidden_act silu, not {config.hidden_act}")
    if config.rope.rope_type not in ROPE_TYPES:
        raise NotImplementedError(
            f"rope_type {config.rope.rope_type} is not written to GGUF; {', '.join(ROPE_TYPES)} are"
        )


def _add_constants(writer: Any, config: LlamaConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _kind(tensor: torch.Tensor | Packed) -> gguf.GGMLQuantizationType:
    """The type that a tensor is written in; of quantized weights blocks of as many bits."""
    if isinstance(tensor, Packed):
        return gguf.GGMLQuantizationType.Q8_0 if tensor.bits == 8 else gguf.GGMLQuantizationType.Q4_0
    return gguf.GGMLQuantizationType[TYPES[_stored_dtype(tensor)]]


def _tensors(model: Llama) -> dict[str, torch.Tensor | Packed]:
    """The tensors of the file by GGUF name: parameters, quantized modules, and the rope's factors."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors: dict[str, torch.Tensor | Packed] = {}
    factors = _rope_factors(model.config)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    modules = packed_modules(model)
    if is_tied(model):
        modules.pop("lm_head", None)
    quantized = {f"{name}.weight": module for name, module in modules.items()}
    for key, tensor in (*model.named_parameters(), *quantized.items()):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"GGUF has no name for {key}"
        tensors[name] = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
    return tensors


def _rope_factors(config: LlamaConfig) -> torch.Tensor | None:
    """How many times more slowly than by ``rope_theta`` alone each pair of dimensions turns; None: none does."""
    if config.rope.rope_type == "default":
        return None
    plain = config.replace(rope=RopeParameters(rope_theta=config.rope.rope_theta))
    return inverse_frequencies(plain)[0] / inverse_frequencies(config)[0]


def _reordered(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    if ".attn_q." in name:
        return interleaved(tensor, config.num_attention_heads)
    if ".attn_k." in name:
        return interleaved(tensor, config.num_key_value_heads)
    return tensor


def _stored_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.dim() == 1 else tensor.dtype


def _to_numpy(tensor: torch.Tensor) -> Any:
    """The bits to store; numpy has no bfloat16, so that goes as int16."""
    tensor = tensor.to("cpu", _stored_dtype(tensor))
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection for an embedding that turns neighbours.

    In the Hugging Face order dimension i of a head turns with i + d/2; in the order of the original checkpoints, which
    gpt-fast and llama.cpp compute in, 2i turns with 2i + 1. Scores are the same, for q and k are reordered alike.

    Args:
        weight: ``[heads * d, m]``, or a bias ``[heads * d]``.
        heads: of the projection.

    Returns:
        A contiguous tensor of the same shape.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape).contiguous()
