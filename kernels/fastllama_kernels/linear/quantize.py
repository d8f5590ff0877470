"""From weights to 8- and 4-bit codes, as :mod:`fastllama_kernels.linear.packed` lays them out, without zeros.

    8 bits   scale = max |w| / 127 of a group; code = round(w / scale) + 128
    4 bits   code = round(w / scale) + 8, from 0 to 15, with the scale of least squared error: for each divisor of
             DIVISORS and both signs, max |w| / divisor gives codes q, and those the scale Σ w q / Σ q², which leaves
             Σ w² - (Σ w q)² / Σ q²

Scales are rounded to float16 before the codes are taken. Kernel: ``quantize.cpp``.

Shape suffixes: ``n`` rows, a multiple of 16, ``k`` columns, ``g`` groups.
"""

from __future__ import annotations

import torch

from fastllama_kernels.linear.packed import by_panel, packed, quotient

DIVISORS = (5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0)

torch.library.define("fastllama::quantize", "(Tensor weight, int bits, int group) -> (Tensor, Tensor)")


def quantize_ref(weight_nk: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix in torch operators."""
    weight_ngk = weight_nk.float().unflatten(1, (-1, group))
    largest_ng1 = weight_ngk.abs().amax(dim=2, keepdim=True)
    scale_ng1 = largest_ng1 / 127 if bits == 8 else _scales_of_nibbles(weight_ngk, largest_ng1)
    scale_ng1 = scale_ng1.half()
    inverse_ng1 = quotient(1.0, scale_ng1.float())
    middle, lowest = 2 ** (bits - 1), -127 if bits == 8 else -8
    code_ngk = (weight_ngk * inverse_ng1).round_().clamp_(lowest, middle - 1).add_(middle)
    return packed(code_ngk.flatten(1).to(torch.uint8), bits), by_panel(scale_ng1.squeeze(2))


def _scales_of_nibbles(weight_ngk: torch.Tensor, largest_ng1: torch.Tensor) -> torch.Tensor:
    best_ng1, best_gain_ng1 = torch.zeros_like(largest_ng1), torch.zeros_like(largest_ng1)
    for divisor in (signed for each in DIVISORS for signed in (each, -each)):
        code_ngk = (weight_ngk * quotient(divisor, largest_ng1)).round_().clamp_(-8, 7)
        product_ng1 = (weight_ngk * code_ngk).sum(dim=2, keepdim=True)
        square_ng1 = code_ngk.square_().sum(dim=2, keepdim=True)
        gain_ng1 = torch.where(square_ng1 > 0, product_ng1.square() / square_ng1, 0.0)
        better_ng1 = gain_ng1 > best_gain_ng1
        best_ng1 = torch.where(better_ng1, product_ng1 / square_ng1, best_ng1)
        best_gain_ng1 = torch.where(better_ng1, gain_ng1, best_gain_ng1)
    return best_ng1


@torch.library.register_fake("fastllama::quantize")
def _quantize_fake(weight, bits, group):
    n, k = weight.shape
    codes = weight.new_empty((n // 16, k * bits // 32, 64), dtype=torch.uint8)
    return codes, weight.new_empty((n // 16, k // group, 16), dtype=torch.float16)
