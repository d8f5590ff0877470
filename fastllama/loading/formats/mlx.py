"""MLX's affine quantization (``mlx_lm``): codes in words along k, which stand for scale · code + bias of a group.

weight uint32 [n, k · bits / 32]   scales [n, g]   biases [n, g]
"""

from __future__ import annotations

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import CodedTensor, Codes, unpacked_words
from fastllama.loading.formats.parts import FLOATS, Parts
from fastllama.loading.stored import Stored

BITS, GROUP = (2, 4, 8), 64


def tensor(parts: Parts) -> Stored:
    """A matrix of codes.

    Raises:
        CheckpointError: it is damaged or contradicts the config.
    """
    parts.check_method("mlx")
    values = parts.declared.get(parts.module)
    override = values if isinstance(values, dict) else {}
    bits = override.get("bits") or parts.declared.get("bits", default=4)
    group = override.get("group_size") or parts.declared.get("group_size", default=GROUP)
    mode = override.get("mode") or parts.declared.get("mode", default="affine")
    if mode != "affine" or bits not in BITS:
        raise parts.error(f"{mode} codes of {bits!r} bits are not read; expected affine ones of 2, 4 or 8")
    n, k, groups = parts.shape("weight")[0], parts.shape("weight")[1] * 32 // bits, parts.shape("scales")[-1]
    if k != groups * group and (n, groups) == parts.shape("scales"):
        fit = parts.shape("weight")[1] * 32 / (groups * group)
        raise parts.error(
            f"its tensors have {fit:g} bits in groups of {group}, or {bits} bits in groups of {k / groups:g}, but the "
            f"config says {bits} bits in groups of {group}; correct its bits or its group_size"
        )
    parts.check("weight", (n, k * bits // 32), ("U32",))
    parts.check("scales", (n, groups), FLOATS)
    parts.check("biases", (n, groups), FLOATS)

    def read() -> Codes:
        code_nk = unpacked_words(parts.whole("weight").view(torch.int32), bits, 1)
        return Codes(code_nk, parts.whole("scales").float(), parts.whole("biases").float())

    scheme = Scheme(max(4, bits), group, True)
    return CodedTensor((n, k), f"MLX with {bits} bits", parts.natural_dtype("scales"), scheme, read)
