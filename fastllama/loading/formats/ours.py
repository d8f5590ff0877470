"""Folders that fastllama has quantized, read as the weights that their codes stand for.

They load as they are without this: it serves who wants them written out, or in other codes. Layout:
:mod:`fastllama_kernels.linear.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.config.quantization import LEAST_GROUP, QuantizationConfig, Scheme
from fastllama.loading.coded import CodedTensor, Codes
from fastllama.loading.stored import CheckpointError, Stored
from fastllama.quantization.linear import packed_modules

CODES, WEIGHT = ".codes", ".weight"
PARTS = ("codes", "scales", "offsets")
HEADS = ("lm_head", "embed_tokens")  # whose last panel may be filled up with zeros


def tensor(module: str, stored: Mapping[str, Stored], config: LlamaConfig) -> CodedTensor:
    """The matrix of a module, whose tensors have been checked.

    Raises:
        CheckpointError: the config gives it no scheme that its codes have.
    """
    assert config.quantization is not None
    panels, lines, _ = stored[module + CODES].shape
    scheme = _scheme(config.quantization, module, lines)
    n = config.vocab_size if module.endswith(HEADS) else panels * ops.PANEL
    k = lines * 32 // scheme.bits

    def read() -> Codes:
        codes, scales = (_whole(stored[f"{module}.{part}"]) for part in PARTS[:2])
        code_nk, scale_ng = ops.unpacked(codes, scheme.bits)[:n], _by_row(scales)[:n]
        if not scheme.has_offsets:
            return Codes.around(code_nk, scale_ng, 2.0 ** (scheme.bits - 1), None)
        return Codes(code_nk, scale_ng, _by_row(_whole(stored[f"{module}.offsets"]))[:n])

    return CodedTensor((n, k), f"{scheme.bits} bits", torch.float32, scheme, read)


def contradictions(stored: Mapping[str, Stored], model: nn.Module, quantization: QuantizationConfig) -> list[str]:
    """What is wrong with modules whose codes have other bits or groups than the config says.

    Args:
        stored: the tensors by name.
        model: as the config makes it.
        quantization: of the config.
    """
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), []
    for name in (key.removesuffix(CODES) for key in stored if key.endswith(CODES)):
        if name + WEIGHT in parameters:
            found.append(f"{name}: it has codes, but quantization_config leaves it as it is (exclude, head_bits)")
    for name, module in packed_modules(model).items():
        shapes = [stored[f"{name}.{part}"].shape for part in PARTS[:2] if f"{name}.{part}" in stored]
        if len(shapes) < 2 or any(len(shape) != 3 for shape in shapes):
            continue
        bits, group = shapes[0][1] * 32 / module.shape[1], module.shape[1] / max(1, shapes[1][1])
        is_single, is_head = name in dict(quantization.modules), name.endswith(HEADS)
        key = "modules" if is_single else "head_bits" if is_head else "bits"
        if bits in (4, 8) and bits != module.bits:
            found.append(
                f"{name}: its codes have {bits:g} bits, but {key} in quantization_config is {module.bits}; correct it"
            )
        elif bits == module.bits and group != module.group and group % LEAST_GROUP == 0:
            key = "modules" if is_single else "group_size"
            found.append(
                f"{name}: its groups have {group:g} columns, but {key} in quantization_config makes them "
                f"{module.group}; correct it"
            )
    return found


def _scheme(quantization: QuantizationConfig, module: str, lines: int) -> Scheme:
    for bits in (4, 8):
        with suppress(ValueError):
            scheme = quantization.scheme_of(module, lines * 32 // bits)
            if scheme is not None and scheme.bits == bits:
                return scheme
    raise CheckpointError(f"{module} has codes, but the config's quantization_config leaves it as it is")


def _whole(tensor: Stored) -> torch.Tensor:
    return torch.cat([block for _, block in tensor.blocks()])


def _by_row(values_pgr: torch.Tensor) -> torch.Tensor:
    return values_pgr.transpose(1, 2).reshape(-1, values_pgr.shape[1]).float()
