"""Checkpoints that others have quantized: which tensors hold a matrix, and what they stand for.

How a matrix is stored is seen from its tensors, then compared with what the config says. Each format has a file that
says where its layout is defined.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

from fastllama.config import LlamaConfig
from fastllama.config.stored_quantization import FILES, Declared, check_read
from fastllama.loading.formats import bitsandbytes, compressed_tensors, fp8, gptq, mlx, ours, torchao
from fastllama.loading.formats.parts import FLOATS, Parts
from fastllama.loading.safetensors import SafeTensor
from fastllama.loading.stored import CheckpointError, Stored, said_once

logger = logging.getLogger(__name__)

#: What a tensor's name ends with that holds a part of a matrix, besides its ``.weight``.
PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>weight_(?:packed|scale|scale_inv|shape|zero_point|g_idx|global_scale|scale_2|format)"
    r"|(?:in|out)put_(?:scale|zero_point|global_scale)|activation_scale|qweight|qzeros|scales|biases|g_idx|SCB"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)|_weight_\w+|W_q|zero"
    r"|scale|nbits|packing|axis|group_size)$"
)
WEIGHT = ".weight"

#: How a matrix is recognised by the names of its parts, and what reads it; the first that fits does.
FORMATS: tuple[tuple[str, Callable[[Parts], Stored]], ...] = (
    ("weight_packed", compressed_tensors.packed),
    ("qweight", gptq.tensor),
    ("_weight_qdata", torchao.tensor),
    ("weight.absmax", bitsandbytes.four_bits),
    ("SCB", bitsandbytes.eight_bits),
    ("biases", mlx.tensor),
    ("weight_scale_inv", fp8.tensor),
    ("weight_scale", compressed_tensors.plain),
)


def decoded(stored: Mapping[str, SafeTensor], declared: Declared, config: LlamaConfig) -> dict[str, Stored]:
    """The tensors by name, where those that hold a quantized matrix together have become one, named as a dense one.

    Biases that the network does not have are left out where they are zeros, as AutoGPTQ wrote them.

    Raises:
        CheckpointError: a matrix is stored in a way that is not read, or that contradicts the config.
        NotImplementedError: the config names a way that is not read.
    """
    modules: dict[str, dict[str, SafeTensor]] = {}
    for key, tensor in stored.items():
        if match := PART.match(key):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
    found: dict[str, Stored] = {key: tensor for key, tensor in stored.items() if not PART.match(key)}
    if modules:
        check_read(declared)
    problems: list[str] = []
    said: set[str] = set()
    for module, parts in modules.items():
        if module + WEIGHT in stored:
            parts["weight"] = stored[module + WEIGHT]
        is_plain = "weight" in parts and parts["weight"].dtype in FLOATS and "weight.absmax" not in parts
        read = None if is_plain else next((read for name, read in FORMATS if name in parts), None)
        try:
            if read is not None:
                if place := declared.left_out(module):
                    raise CheckpointError("", [f"{module}: its weights are quantized, but the config's {place}"])
                found[module + WEIGHT] = read(Parts(module, parts, declared, said))
                bias, has_bias = f"{module}.bias", config.mlp_bias if ".mlp." in module else config.attention_bias
                if bias in stored and not has_bias and not stored[bias].whole().any():
                    del found[bias]
            elif "W_q" in parts:
                problems.append(f"{module}: stored by HQQ, which is not read; quantize its original with fastllama")
            else:  # whatever they are, they are not lost
                found |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        except CheckpointError as error:
            problems += error.problems or [str(error)]
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, re.error) as error:
            problems.append(
                f"{module}: its tensors or the config's values are damaged ({type(error).__name__}: {error})"
            )
    without = [key for key, tensor in found.items() if tensor.dtype in fp8.DTYPES]
    if declared.method is not None:
        problems += [f"{key}: 8-bit floating point without its scale" for key in without]
    if problems:
        raise CheckpointError(f"quantized weights that are not read ({declared}):", said_once(problems))
    if declared.get("kv_cache_scheme", "kv_cache_quant_algo"):
        logger.warning("keys and values are cached in the model's dtype, not in 8 bits as the config says")
    if declared.method is not None and found.keys() == stored.keys():
        if declared.place not in FILES:
            raise CheckpointError(
                f"the config says {declared}, but no weight is stored so; remove it if they are plain"
            )
        logger.warning("%s is left from other weights: none is stored so", declared.place)
    return found


def written_out(stored: Mapping[str, Stored], config: LlamaConfig) -> dict[str, Stored]:
    """The tensors of a checkpoint of fastllama, its codes as the matrices that they stand for."""
    modules = [key.removesuffix(ours.CODES) for key in stored if key.endswith(ours.CODES)]
    parts = {f"{module}.{part}" for module in modules for part in ours.PARTS}
    found = {key: tensor for key, tensor in stored.items() if key not in parts}
    return found | {module + WEIGHT: ours.tensor(module, stored, config) for module in modules}
