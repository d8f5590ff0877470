"""The operations of a decode step at a model's shapes, with random weights: what runs, what it replaces, what it reads.

Shape suffixes: ``b`` batch, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``v`` vocabulary, ``n`` output features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from fastllama import LlamaConfig, ops
from fastllama.loading.names import resolve
from fastllama.model.rope import rotary_cos_sin
from fastllama_kernels.attention.op import rotary_attention_ref
from fastllama_kernels.linear.op import gate_up_ref, linear_ref
from fastllama_kernels.sampling.op import sample_ref

TORCH, PLAIN = "torch", "F.linear"  # the formula in torch operators; the bare matrix product
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
PEAKS = 64  # logits above all others, among which a token is sampled
POOL = 1_000_003  # random numbers that tensors are tiled from; prime, so that rows differ

Function = Callable[..., torch.Tensor]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class StepOp:
    """One operation of a decode step, with its arguments: those of all layers, then those that each layer has."""

    name: str
    label: str  # for people
    shape: str  # of its matrix or cache
    calls: int  # of a greedy decode step
    nbytes: int  # that a call must read: weights and live cache, or the logits that sampling reads
    shared: Arguments
    own: Arguments
    run: Function  # what the step runs
    references: Mapping[str, Function]  # what it is measured against; the first is the formula in torch operators
    in_cache: bool = False  # whether a step has just written what it reads
    results: Callable[[Function, Arguments], torch.Tensor] = field(default=lambda function, args: function(*args))


@dataclass(frozen=True)
class Shapes:
    """What decides the shapes of a step's operations."""

    model: str
    config: LlamaConfig  # its dtype is that of weights and cache
    batch: int
    live: int  # tokens that each row attends, the new one included
    capacity: int  # slots of the cache
    device: torch.device

    @classmethod
    def of(
        cls, model: str, dtype: str | None, device: str, *, batch: int = 1, live: int = 512, capacity: int | None = None
    ) -> Shapes:
        """The shapes of a model by name; reads its config and not its weights."""
        config = resolve(model).config
        if dtype is not None:
            config = config.replace(dtype=dtype)
        slots = live if capacity is None else capacity
        if not 1 <= live <= slots:
            raise ValueError(f"{live} live tokens do not fit a cache of {slots} slots; give a larger capacity")
        return cls(model, config, batch, live, slots, torch.empty(0, device=device).device)  # with its index

    @property
    def dtype(self) -> torch.dtype:
        """Weights and cache."""
        return getattr(torch, self.config.dtype)

    def describe(self) -> dict[str, Any]:
        """The fields of a record that say what was measured."""
        plain = {name: getattr(self, name) for name in ("model", "batch", "live", "capacity")}
        weights = {"dtype": self.config.dtype, "device": str(self.device), "quantize": None}
        return plain | weights | {"config": self.config.to_dict()}

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Normal numbers, the same ones for the same arguments."""
        pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).mul_(scale)
        count = math.prod(shape)
        tiled = pool.to(self.device, self.dtype).repeat(-(-count // POOL))
        return tiled[:count].reshape(shape).clone()


def nbytes(tensors: Arguments) -> int:
    """Bytes of those arguments that there are."""
    return sum(x.nbytes for x in tensors if x is not None)


def step_ops(shapes: Shapes) -> Iterator[StepOp]:
    """The operations in the order of a step, each made when it is asked for: forget one before taking the next."""
    config = shapes.config
    m, f, width = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    packed = width + 2 * config.num_key_value_heads * config.head_dim
    layers, bias, act = config.num_hidden_layers, config.attention_bias, config.hidden_act
    yield _matrix(shapes, ("qkv", "norm, q/k/v", layers), m, packed, True, bias, False)
    yield _attention(shapes)
    yield _matrix(shapes, ("o", "output, residual", layers), width, m, False, bias, True)
    yield _matrix(shapes, ("gate_up", f"norm, gate/up, {act}", layers), m, 2 * f, True, config.mlp_bias, False, act)
    yield _matrix(shapes, ("down", "down, residual", layers), f, m, False, config.mlp_bias, True)
    yield _matrix(shapes, ("lm_head", "norm, head", 1), m, config.vocab_size, True, False, False)
    yield _sampling(shapes, "sample_greedy", "sample, greedy", 1, 0.0)
    yield _sampling(shapes, "sample_top_k", f"sample, top-k {TOP_K}", 0, TEMPERATURE)


def _matrix(
    shapes: Shapes, what: tuple[str, str, int], k: int, n: int, norm: bool, bias: bool, residual: bool, act: str = ""
) -> StepOp:
    (name, label, calls), eps = what, shapes.config.rms_norm_eps
    # One token a row; the head takes ``[b, m]`` and the layers ``[b, 1, m]``, which is the same to a matrix.
    shared = (shapes.normal(shapes.batch, k), shapes.normal(shapes.batch, n, seed=1) if residual else None)
    bias_n = shapes.normal(n, seed=3) if bias else None
    norm_k = shapes.normal(k, scale=0.1, seed=4).add_(1) if norm else None
    own = (shapes.normal(n, k, scale=k**-0.5, seed=2), bias_n, norm_k)

    def formula(x: torch.Tensor, residual: Any, w: torch.Tensor, bias: Any, norm: Any) -> torch.Tensor:
        if act:
            return gate_up_ref(x, w, bias, norm, eps, ops.ACTIVATIONS[act].number)
        return linear_ref(x, w, bias, norm, eps, residual)

    def run(x: torch.Tensor, residual: Any, w: torch.Tensor, bias: Any, norm: Any) -> torch.Tensor:
        return ops.gate_up(x, w, bias, norm, eps, act) if act else ops.linear(x, w, bias, norm, eps, residual)

    references = {TORCH: formula, PLAIN: lambda x, residual, w, bias, norm: F.linear(x, w, bias)}
    return StepOp(name, label, f"{n} x {k}", calls, nbytes(own), shared, own, run, references)


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
    read = 2 * b * kv_heads * live * d * shapes.dtype.itemsize
    shared = (qkv_b1n, cos_1sd[0].contiguous(), sin_1sd[0].contiguous(), position_b1)
    what = ("attention", "rotary, KV write, attention", f"{live} slots", config.num_hidden_layers, read)
    run = functools.partial(ops.rotary_attention, arrived_p=arrived_p)
    return StepOp(*what, shared, tuple(caches), run, {TORCH: rotary_attention_ref}, results=_attention_results)


def _attention_results(function: Function, arguments: Arguments) -> torch.Tensor:
    *shared, k_cache_bksd, v_cache_bksd = arguments
    caches = k_cache_bksd.clone(), v_cache_bksd.clone()
    out_b1n = function(*shared, *caches)
    slot = int(shared[-1][0, 0])
    return torch.cat([out_b1n[:, 0], *(cache_bksd[:, :, slot].flatten(1) for cache_bksd in caches)], dim=-1)


def _sampling(shapes: Shapes, name: str, label: str, calls: int, temperature: float) -> StepOp:
    b, v, device = shapes.batch, shapes.config.vocab_size, shapes.device
    settings = {"temperature": temperature, "top_k": TOP_K, "top_p": TOP_P, "min_p": 0.0, "typical_p": 1.0}
    rows = {name: torch.full((b,), value, device=device) for name, value in settings.items()}
    params = ops.SamplingParams(**rows, seed=torch.arange(b, device=device))
    logits_bv = shapes.normal(b, v)
    peaks = min(PEAKS, v)  # distinct in any dtype, for which of two equal logits comes first is irrelevant
    logits_bv[:, :: v // peaks][:, :peaks] = 8 + torch.arange(peaks, device=device) / 8
    run = lambda position_b, logits_bv: ops.sample(logits_bv, params, position_b)  # noqa: E731
    references = {TORCH: lambda position_b, logits_bv: sample_ref(logits_bv, params, position_b)}
    shared, own = (torch.full((b,), shapes.live, device=device),), (logits_bv,)
    return StepOp(name, label, f"{v} logits", calls, logits_bv.nbytes, shared, own, run, references, in_cache=True)
