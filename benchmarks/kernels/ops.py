"""The operations of a decode step at a model's shapes: what runs, what it replaces, what is exact, what it reads.

Only shapes are taken from the model; weights and caches are random. Formulas: :mod:`fastllama_kernels`.

Shape suffixes: ``b`` batch, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim, ``m`` model dim,
``f`` FFN dim, ``v`` vocabulary, ``n`` output features of a matrix, ``g`` query heads a KV head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from fastllama import ops
from fastllama.model.rope import rotary_cos_sin
from fastllama.sampling import SamplingParams, row_seeds, sample
from fastllama_kernels.attention.op import rotary_attention_ref
from fastllama_kernels.linear.op import gate_up_ref, linear_ref
from fastllama_kernels.sampling.op import sample_ref, uniform

from .step import Arguments, Function, OpInfo, Shapes, StepOp, nbytes

TORCH, PLAIN = "torch", "F.linear"  # the formula in torch operators; the bare matrix product
BLOCK_ROWS = 8192  # of a matrix that are widened to float64 at once
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
PEAKS = 64  # logits above all others, among which a token is drawn


def step_ops(shapes: Shapes) -> Iterator[StepOp]:
    """The operations in the order of a step, each made when it is asked for: forget one before taking the next."""
    config = shapes.config
    m, f, width = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    packed = width + 2 * config.num_key_value_heads * config.head_dim
    layers, attention_bias, mlp_bias = config.num_hidden_layers, config.attention_bias, config.mlp_bias
    yield _linear(shapes, "qkv", "norm, q/k/v", layers, m, packed, has_norm=True, has_bias=attention_bias)
    yield _attention(shapes)
    yield _linear(shapes, "o", "output, residual", layers, width, m, has_residual=True, has_bias=attention_bias)
    yield _gate_up(shapes)
    yield _linear(shapes, "down", "down, residual", layers, f, m, has_residual=True, has_bias=mlp_bias)
    yield _linear(shapes, "lm_head", "norm, head", 1, m, config.vocab_size, has_norm=True)
    yield _greedy(shapes)
    yield _sampled(shapes)


# ---- matrices ------------------------------------------------------------------------------------------------------


def _linear(
    shapes: Shapes,
    name: str,
    label: str,
    calls: int,
    k: int,
    n: int,
    *,
    has_norm: bool = False,
    has_bias: bool = False,
    has_residual: bool = False,
) -> StepOp:
    eps = shapes.config.rms_norm_eps
    # One token a row; the head takes ``[b, m]`` and the layers ``[b, 1, m]``, which is the same to a matrix.
    shared = (shapes.normal(shapes.batch, k), shapes.normal(shapes.batch, n, seed=1) if has_residual else None)
    own = _weights(shapes, k, n, has_norm, has_bias)
    return StepOp(
        OpInfo(name, label, f"{n} x {k}", calls, nbytes(own)),
        shared=shared,
        own=own,
        run=lambda x, residual, weight, bias, norm: ops.linear(x, weight, bias, norm, eps, residual),
        references={
            TORCH: lambda x, residual, weight, bias, norm: linear_ref(x, weight, bias, norm, eps, residual),
            PLAIN: lambda x, residual, weight, bias, norm: F.linear(x, weight, bias),
        },
        exact=lambda x, residual, weight, bias, norm: _exact_linear(x, residual, weight, bias, norm, eps),
    )


def _gate_up(shapes: Shapes) -> StepOp:
    config = shapes.config
    eps, m, f = config.rms_norm_eps, config.hidden_size, config.intermediate_size
    activation, label = ops.ACTIVATIONS[config.hidden_act], f"norm, gate/up, {config.hidden_act}"
    own = _weights(shapes, m, 2 * f, True, config.mlp_bias)

    def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor) -> torch.Tensor:
        gate, up = _exact_linear(x, None, weight, bias, norm, eps).chunk(2, dim=-1)
        return activation.function(gate) * up

    return StepOp(
        OpInfo("gate_up", label, f"{2 * f} x {m}", config.num_hidden_layers, nbytes(own)),
        shared=(shapes.normal(shapes.batch, m),),
        own=own,
        run=lambda x, weight, bias, norm: ops.gate_up(x, weight, bias, norm, eps, config.hidden_act),
        references={
            TORCH: lambda x, weight, bias, norm: gate_up_ref(x, weight, bias, norm, eps, activation.number),
            PLAIN: lambda x, weight, bias, norm: F.linear(x, weight, bias),
        },
        exact=exact,
    )


def _weights(shapes: Shapes, k: int, n: int, has_norm: bool, has_bias: bool) -> Arguments:
    """Matrix, bias and norm weight, such that results are of unit size."""
    return (
        shapes.normal(n, k, scale=k**-0.5, seed=2),
        shapes.normal(n, seed=3) if has_bias else None,
        shapes.normal(k, scale=0.1, seed=4).add_(1) if has_norm else None,
    )


def _exact_linear(
    x_bk: torch.Tensor,
    residual_bn: torch.Tensor | None,
    weight_nk: torch.Tensor,
    bias_n: torch.Tensor | None,
    norm_k: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    x = x_bk.double()
    if norm_k is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_k.double()
    y = torch.cat([x @ block.double().T for block in weight_nk.split(BLOCK_ROWS)], dim=-1)
    for term in (bias_n, residual_bn):
        y = y if term is None else y + term.double()
    return y


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention(shapes: Shapes) -> StepOp:
    config, b, live = shapes.config, shapes.batch, shapes.live
    kv_heads, d = config.num_key_value_heads, config.head_dim
    cos_1sd, sin_1sd = rotary_cos_sin(config, torch.arange(shapes.capacity, device=shapes.device)[None], live)
    position_b1 = torch.full((b, 1), live - 1, device=shapes.device)
    caches = [shapes.normal(b, kv_heads, shapes.capacity, d, seed=seed) for seed in (5, 6)]
    for cache_bksd in caches:
        cache_bksd[:, :, live:] = 0  # as an engine's unwritten slots
    qkv_b1n = shapes.normal(b, 1, (config.num_attention_heads + 2 * kv_heads) * d)
    arrived_p = torch.zeros(b * config.num_attention_heads, dtype=torch.int32, device=shapes.device)
    return StepOp(
        OpInfo(
            "attention",
            "rotary, KV write, attention",
            f"{live} slots",
            config.num_hidden_layers,
            2 * b * kv_heads * live * d * shapes.dtype.itemsize,
        ),
        shared=(qkv_b1n, cos_1sd[0].contiguous(), sin_1sd[0].contiguous(), position_b1),
        own=tuple(caches),
        run=functools.partial(ops.rotary_attention, arrived_p=arrived_p),
        references={TORCH: rotary_attention_ref},
        exact=_exact_attention,
        results=_attention_results,
    )


def _attention_results(function: Function, arguments: Arguments) -> torch.Tensor:
    """The heads' outputs and what was written to the cache, ``[b, (h + 2k)·d]``; the arguments' caches stay as they
    are."""
    *shared, k_cache_bksd, v_cache_bksd = arguments
    caches = k_cache_bksd.clone(), v_cache_bksd.clone()
    out_b1n = function(*shared, *caches)
    slot = int(shared[-1][0, 0])
    return torch.cat([out_b1n[:, 0], *(cache_bksd[:, :, slot].flatten(1) for cache_bksd in caches)], dim=-1)


def _exact_attention(qkv_b1n, cos_sd, sin_sd, position_b1, k_cache_bksd, v_cache_bksd) -> torch.Tensor:
    """As :func:`_attention_results` lays it out; a row at a time, for a cache in float64 is large."""
    slot, d = int(position_b1[0, 0]), k_cache_bksd.shape[3]
    kv_heads = k_cache_bksd.shape[1]
    cos_d, sin_d = cos_sd[slot].double(), sin_sd[slot].double()

    def rotate(x_hd: torch.Tensor) -> torch.Tensor:
        return x_hd * cos_d + torch.cat((-x_hd[:, d // 2 :], x_hd[:, : d // 2]), dim=-1) * sin_d

    rows = []
    for row, qkv_1n in enumerate(qkv_b1n.double()):
        q_hd, k_kd, v_kd = qkv_1n.view(-1, d).split((qkv_1n.numel() // d - 2 * kv_heads, kv_heads, kv_heads))
        k_kd = rotate(k_kd)
        keys_ksd = torch.cat((k_cache_bksd[row, :, :slot].double(), k_kd[:, None]), dim=1)
        values_ksd = torch.cat((v_cache_bksd[row, :, :slot].double(), v_kd[:, None]), dim=1)
        q_kgd = rotate(q_hd).view(kv_heads, -1, d)
        scores_kgs = q_kgd @ keys_ksd.transpose(1, 2) / d**0.5
        rows.append(torch.cat([(scores_kgs.softmax(-1) @ values_ksd).flatten(), k_kd.flatten(), v_kd.flatten()]))
    return torch.stack(rows)


# ---- sampling ------------------------------------------------------------------------------------------------------


def _greedy(shapes: Shapes) -> StepOp:
    return _sampling(shapes, "sample_greedy", "sample, greedy", 1, 0.0)


def _sampled(shapes: Shapes) -> StepOp:
    return _sampling(shapes, "sample_top_k", f"sample, top-k {TOP_K}", 0, TEMPERATURE)


def _sampling(shapes: Shapes, name: str, label: str, calls: int, temperature: float) -> StepOp:
    """Logits as the head gives them to token ids; they come from the cache, where the head has just put them."""
    b, v, device = shapes.batch, shapes.config.vocab_size, shapes.device
    params = SamplingParams(
        temperature=torch.full((b,), temperature, device=device),
        top_k=torch.full((b,), TOP_K, device=device),
        top_p=torch.full((b,), TOP_P, device=device),
        min_p=torch.zeros(b, device=device),
        seed=row_seeds(0, b).to(device),
    )
    logits_bv = shapes.normal(b, v)
    peaks = min(PEAKS, v)  # distinct in any dtype, for which of two equal logits comes first is nobody's business
    logits_bv[:, :: v // peaks][:, :peaks] = 8 + torch.arange(peaks, device=device) / 8

    return StepOp(
        OpInfo(name, label, f"{v} logits", calls, logits_bv.nbytes, in_cache=True),
        shared=(params, torch.full((b,), shapes.live, device=device)),
        own=(logits_bv,),
        run=_sample,
        references={TORCH: _sample_ref},
        exact=_exact_scores,
        error=_below_the_best,
    )


def _sample(params: SamplingParams, position_b: torch.Tensor, logits_bv: torch.Tensor) -> torch.Tensor:
    return sample(logits_bv, params, position_b)


def _sample_ref(params: SamplingParams, position_b: torch.Tensor, logits_bv: torch.Tensor) -> torch.Tensor:
    return sample_ref(logits_bv, params, position_b)


def _exact_scores(params: SamplingParams, position_b: torch.Tensor, logits_bv: torch.Tensor) -> torch.Tensor:
    """What the token drawn must be the highest of, ``[b, v]``: minus infinity where a token is not kept."""
    if not params.temperature[0]:
        return logits_bv.double()
    ordered_bv, order_bv = (logits_bv.double() / TEMPERATURE).sort(dim=-1, descending=True, stable=True)
    scaled_bk, kept_bk = ordered_bv[:, :TOP_K], order_bv[:, :TOP_K]
    p_bk = scaled_bk.softmax(-1)
    u_bv = uniform(params.seed, position_b, logits_bv.shape[1]).double()
    score_bk = scaled_bk - torch.log(-torch.log1p(-u_bv.gather(1, kept_bk)))
    score_bk = torch.where(p_bk.cumsum(-1) - p_bk < TOP_P, score_bk, -torch.inf)
    return torch.full_like(ordered_bv, -torch.inf).scatter(1, kept_bk, score_bk)


def _below_the_best(token_b: torch.Tensor, score_bv: torch.Tensor) -> float:
    chosen_b = score_bv.gather(1, token_b[:, None])[:, 0]
    return float((score_bv.max(dim=1).values - chosen_b).max())
