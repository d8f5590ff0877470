"""4-bit codes chosen by what a network does with them on a text: error feedback, as in GPTQ (arXiv 2210.17323).

Rounding each weight by itself makes errors that add up wherever the inputs of a matrix go together. So the columns of a
matrix are rounded one after the other, and those that are still to come make up for the error of each:

    H = Xᵀ X + λ I                  X: the inputs of the matrix on the text; λ = DAMPING times the mean of the diagonal
    Uᵀ U = H⁻¹                      U upper triangular
    for each column i:  e = (w_i - what its codes stand for) / U_ii;  w_j -= e U_ij for all columns j > i

Scales and offsets of a group are searched as without a text (:mod:`fastllama_kernels.linear.quantize`) when its first
column is reached.

Shape suffixes: ``n`` rows, ``k`` columns, ``g`` groups of columns, ``r`` inputs, ``b`` a batch of one text, ``t`` its
tokens, ``m`` model dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.model.llama import Llama
from fastllama.model.masks import causal_mask
from fastllama.model.rope import rotary_cos_sin
from fastllama.quantization.linear import TOGETHER, Packed, packed_modules

BITS, HIGHEST = 4, 15
DAMPING = 0.01  # GPTQ's
ALONE = (("self_attn.o_proj",), ("mlp.down_proj",))


@torch.no_grad()
def calibrate(model: Llama, source: Llama, texts: Sequence[torch.Tensor], progress: bool = False) -> None:
    """Choose the 4-bit codes of a quantized model's layers again, by error feedback on a text.

    The layers are gone through in order; each sees the text through those before it as they are quantized. Next to both
    models, memory holds in float32 a layer, what goes into it, and ``[k, k]`` for each of its inputs; and of the matrix
    at hand some ``[k, k]`` in float64. Matrices of 8 bits, the head and the embedding stay as they are.

    Args:
        model: the quantized one; its codes, scales and offsets are overwritten.
        source: what it was made from, not quantized.
        texts: int64 ids ``[b, t]``, as :func:`fastllama.quantization.quality.windows` makes them: some thousand tokens
            in all.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        ValueError: a model without matrices of 4 bits, no text or none of int64 ids ``[b, t]``, a source that is
            quantized or of another shape. Or one that is not finite, or whose scales are beyond float16: then the
            layers before have new codes already.
    """
    _check(model, source, texts)
    config, device = source.config, model.device
    inputs = [model.model.embed_tokens(ids.to(device)).float() for ids in texts]
    arguments = {t: _attention_arguments(config, t, device) for t in {x_btm.shape[1] for x_btm in inputs}}
    pairs = list(zip(source.model.layers, model.model.layers, strict=True))
    disable = None if progress else True  # None: shown on a terminal only
    for original, target in tqdm(pairs, unit="layer", desc="calibrating", leave=False, disable=disable):
        layer = copy.deepcopy(original).float().to(device)
        with _grams_of_inputs(layer) as grams:
            for x_btm in inputs:
                layer(x_btm, **arguments[x_btm.shape[1]])
        for names, gram_kk in grams.items():
            if not gram_kk.isfinite().all():
                raise ValueError(
                    f"{names[0]} of a layer has inputs that are not finite, on the text; load the model again"
                )
            _take_codes(layer, target, names, gram_kk)
        inputs = [layer(x_btm, **arguments[x_btm.shape[1]])[0] for x_btm in inputs]


def feedback_codes(
    weight_nk: torch.Tensor, factor_kk: torch.Tensor, group: int, has_offsets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes of a matrix, each column's error taken up by the columns after it.

    Args:
        weight_nk: of whole panels of 16 rows.
        factor_kk: U of :func:`feedback_factor`.
        group: columns that share a scale.
        has_offsets: codes stand for scale · code + offset; else for scale · (code - 8).

    Returns:
        Codes uint8 ``[n, k]``, scales and offsets ``[n, g]`` in float32, rounded to float16; without offsets, those
        that scale · (code - 8) amounts to.
    """
    weight_kn, factor_kk = weight_nk.float().t().contiguous(), factor_kk.float()
    code_kn = torch.empty_like(weight_kn, dtype=torch.uint8)
    lines = []
    for first in range(0, len(weight_kn), group):
        last = first + group
        _, scales, offsets = ops.quantize(weight_kn[first:last].t().contiguous(), BITS, group, has_offsets)
        scale_n = scales.flatten().float()
        offset_n = offsets.flatten().float() if has_offsets else -8 * scale_n
        lines.append((scale_n, offset_n))
        inverse_n = torch.where(scale_n != 0, 1 / scale_n, 0)
        error_kn = torch.empty_like(weight_kn[first:last])
        for i in range(first, last):
            code_n = ((weight_kn[i] - offset_n) * inverse_n).round_().clamp_(0, HIGHEST)
            code_kn[i] = code_n
            error_n = (weight_kn[i] - code_n * scale_n - offset_n) / factor_kk[i, i]
            weight_kn[i + 1 : last].addr_(factor_kk[i, i + 1 : last], error_n, alpha=-1)
            error_kn[i - first] = error_n
        weight_kn[last:].addmm_(factor_kk[first:last, last:].t(), error_kn, alpha=-1)
    scale_ng, offset_ng = (torch.stack(values, dim=1) for values in zip(*lines, strict=True))
    return code_kn.t().contiguous(), scale_ng, offset_ng


def feedback_factor(gram_kk: torch.Tensor) -> torch.Tensor:
    """U with Uᵀ U = (gram + λ I)⁻¹, upper triangular, float64 ``[k, k]``; gram is XᵀX of a matrix's inputs, scaled."""
    damped_kk = gram_kk.double().clone()
    mean = damped_kk.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped_kk.diagonal().add_(DAMPING * mean)
    # With J turning rows around: J H J = L Lᵀ, so H = R Rᵀ with R = J L J, which is upper, and U = R⁻¹.
    root_kk = torch.linalg.cholesky(damped_kk.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(root_kk, torch.eye(len(root_kk)).to(root_kk), upper=True)


def _check(model: Llama, source: Llama, texts: Sequence[torch.Tensor]) -> None:
    if not any(each.bits == BITS for each in packed_modules(model.model.layers).values()):
        raise ValueError('the model has no layers of 4 bits to calibrate: load it with quantize="int4"')
    if not texts:
        raise ValueError("there is no text to calibrate with: expected at least one token")
    for ids in texts:
        if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.numel():
            got = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
            raise ValueError(f"got {got} as a text, expected int64 ids [b, t], at least one")
    if packed_modules(source.model.layers):
        raise ValueError('the source of a calibration is quantized: load it with quantize="none"')
    shapes = [{name: tuple(each.shape) for name, each in _linears(network)} for network in (model, source)]
    if shapes[0] != shapes[1]:
        raise ValueError("the source of a calibration has matrices of other shapes than the model")


def _linears(network: Llama) -> Iterator[tuple[str, Any]]:
    for name, module in network.model.layers.named_modules():
        if isinstance(module, Packed):
            yield name, module
        elif isinstance(module, nn.Linear):
            yield name, module.weight


def _attention_arguments(config: LlamaConfig, t: int, device: torch.device) -> dict[str, Any]:
    """What a layer needs besides its input, to read a text of t tokens from its beginning in float32."""
    position_t = torch.arange(t, device=device)
    return {
        "rotary": rotary_cos_sin(config, position_t[None]),
        "mask_b1ts": causal_mask(position_t, t, torch.float32),
        "cache": None,
        "cache_position": position_t,
        "output_attentions": False,
    }


@contextmanager
def _grams_of_inputs(layer: nn.Module) -> Iterator[dict[tuple[str, ...], torch.Tensor]]:
    """While open, XᵀX of what the matrices of a layer are multiplied with; of those with one input, once."""
    grams: dict[tuple[str, ...], torch.Tensor] = {}
    hooks = []
    for names in (*TOGETHER, *ALONE):

        def add(module: nn.Module, args: tuple[torch.Tensor], names: tuple[str, ...] = names) -> None:
            x_rk = args[0].flatten(0, -2)
            grams[names] = torch.addmm(grams[names], x_rk.t(), x_rk) if names in grams else x_rk.t() @ x_rk

        hooks.append(layer.get_submodule(names[0]).register_forward_pre_hook(add))
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()


def _take_codes(layer: nn.Module, target: nn.Module, names: Sequence[str], gram_kk: torch.Tensor) -> None:
    """Quantize matrices that have one input; their float32 copies become what the codes stand for."""
    packed = {name: each for name in names if isinstance(each := target.get_submodule(name), Packed)}
    factor_kk = feedback_factor(gram_kk) if any(each.bits == BITS for each in packed.values()) else None
    for name, each in packed.items():
        linear = cast(nn.Linear, layer.get_submodule(name))
        if each.bits == BITS and factor_kk is not None:
            codes = feedback_codes(linear.weight, factor_kk, each.group, each.offsets is not None)
            if not each.take(*codes, BITS):
                raise ValueError(f"{name} of a layer needs scales beyond float16; exclude it, and load the model again")
        linear.weight.copy_(each.dequantized(torch.float32))
