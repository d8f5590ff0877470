"""From weights to 8- and 4-bit codes, as :mod:`fastllama_kernels.linear.packed` lays them out.

    8 bits   scale = max |w| / 127 of a group; code = round(w / scale) + 128
    4 bits   code = round(w / scale) + 8, from 0 to 15, with the scale of least squared error: for each divisor of
             DIVISORS and both signs, max |w| / divisor gives codes q, and those the scale Σ w q / Σ q², which leaves
             Σ w² - (Σ w q)² / Σ q²
    4 bits with offsets   code = round((w - offset) / scale), from 0 to 15: for each range of w from which 0 to CUTS - 1
             times CUT of it are cut off on either side, evenly spaced codes, and the line through them of least squared
             error; the best of these lines

Scales and offsets are rounded to float16 before the codes are taken. Kernel: ``quantize.cpp``.

Shape suffixes: ``n`` rows, a multiple of 16, ``k`` columns, ``g`` groups.
"""

from __future__ import annotations

import itertools

import torch

from fastllama_kernels.linear.packed import by_panel, packed, quotient

CUTS, CUT = 4, 0.04
DIVISORS = (5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0)

torch.library.define(
    "fastllama::quantize", "(Tensor weight, int bits, int group, bool has_offsets) -> (Tensor, Tensor, Tensor)"
)


def quantize_ref(
    weight_nk: torch.Tensor, bits: int, group: int, has_offsets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and offsets (of no panels, if there are none) of a matrix in torch operators."""
    weight_ngk = weight_nk.float().unflatten(1, (-1, group))
    if has_offsets:
        scale_ng1, offset_ng1 = (each.half() for each in _lines_of_nibbles(weight_ngk))
        code_ngk = ((weight_ngk - offset_ng1.float()) * quotient(1.0, scale_ng1.float())).round_().clamp_(0, 15)
        codes = packed(code_ngk.flatten(1).to(torch.uint8), bits)
        return codes, by_panel(scale_ng1.squeeze(2)), by_panel(offset_ng1.squeeze(2))
    largest_ng1 = weight_ngk.abs().amax(dim=2, keepdim=True)
    scale_ng1 = largest_ng1 / 127 if bits == 8 else _scales_of_nibbles(weight_ngk, largest_ng1)
    scale_ng1 = scale_ng1.half()
    inverse_ng1 = quotient(1.0, scale_ng1.float())
    middle, lowest = 2 ** (bits - 1), -127 if bits == 8 else -8
    code_ngk = (weight_ngk * inverse_ng1).round_().clamp_(lowest, middle - 1).add_(middle)
    scales = by_panel(scale_ng1.squeeze(2))
    return packed(code_ngk.flatten(1).to(torch.uint8), bits), scales, scales.new_empty((0, *scales.shape[1:]))


def _lines_of_nibbles(weight_ngk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = weight_ngk.shape[2]
    low_ng1, high_ng1 = weight_ngk.amin(2, True), weight_ngk.amax(2, True)
    sum_ng1 = weight_ngk.sum(2, True)
    best_gain_ng1 = torch.full_like(low_ng1, -1.0)
    best_scale_ng1, best_offset_ng1 = torch.zeros_like(low_ng1), low_ng1
    for a, b in itertools.product(range(CUTS), repeat=2):
        first_ng1, last_ng1 = (low_ng1 + a * CUT * (high_ng1 - low_ng1), high_ng1 - b * CUT * (high_ng1 - low_ng1))
        code_ngk = ((weight_ngk - first_ng1) * quotient(15.0, last_ng1 - first_ng1)).round_().clamp_(0, 15)
        codes_ng1, product_ng1 = code_ngk.sum(2, True), (weight_ngk * code_ngk).sum(2, True)
        spread_ng1 = n * code_ngk.square_().sum(2, True) - codes_ng1.square()
        top_ng1 = n * product_ng1 - sum_ng1 * codes_ng1
        scale_ng1 = torch.where(spread_ng1 > 0, top_ng1 / spread_ng1, 0.0)
        offset_ng1 = (sum_ng1 - scale_ng1 * codes_ng1) / n
        gain_ng1 = offset_ng1 * sum_ng1 + scale_ng1 * product_ng1
        better_ng1 = gain_ng1 > best_gain_ng1
        best_scale_ng1 = torch.where(better_ng1, scale_ng1, best_scale_ng1)
        best_offset_ng1 = torch.where(better_ng1, offset_ng1, best_offset_ng1)
        best_gain_ng1 = torch.where(better_ng1, gain_ng1, best_gain_ng1)
    return best_scale_ng1, best_offset_ng1


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
def _quantize_fake(weight, bits, group, has_offsets):
    n, k = weight.shape
    codes = weight.new_empty((n // 16, k * bits // 32, 64), dtype=torch.uint8)
    scales = weight.new_empty((n // 16, k // group, 16), dtype=torch.float16)
    return codes, scales, scales.new_empty((n // 16 if has_offsets else 0, k // group, 16))
