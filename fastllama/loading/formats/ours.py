"""Folders that fastllama has quantized, read as the weights that their codes stand for.

They load as they are without this: it serves who wants them written out, or in other codes. Layout:
:mod:`fastllama_kernels.linear.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.config.quantization import QuantizationConfig, Scheme
from fastllama.loading.coded import CodedTensor, Codes
from fastllama.loading.stored import CheckpointError, Stored

CODES = ".codes"
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
