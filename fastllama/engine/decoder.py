"""The network as the engine runs it: few large matrices a layer, few fused operations a layer.

It shares its memory with the ``Llama`` it is made from: q/k/v and gate/up move into one matrix each and
the original parameters become views of it.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``m`` model dim,
``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from fastllama import ops
from fastllama.model.llama import Llama, LlamaDecoderLayer

ACTIVATION_OPS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def fuse_linears(linears: Sequence[nn.Linear]) -> tuple[nn.Parameter, nn.Parameter | None]:
    """One weight ``[Σ n, k]`` (and bias) holding the linears' rows one below the other; they become views of it."""

    def fuse(parameters: list[torch.Tensor]) -> nn.Parameter:
        joined = torch.cat([parameter.data for parameter in parameters])
        sizes = [parameter.shape[0] for parameter in parameters]
        for parameter, view in zip(parameters, joined.split(sizes), strict=True):
            parameter.data = view
        return nn.Parameter(joined, requires_grad=False)

    weight = fuse([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else fuse([linear.bias for linear in linears])
    return weight, bias


def _shared(parameter: torch.Tensor) -> nn.Parameter:
    """A parameter over the same memory that wants no gradient, whatever the original wants."""
    return nn.Parameter(parameter.data, requires_grad=False)


def _shared_linear(linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The same for a linear's weight and bias."""
    return _shared(linear.weight), None if linear.bias is None else _shared(linear.bias)


class FusedLayer(nn.Module):
    """One decoder layer in five operations."""

    def __init__(self, layer: LlamaDecoderLayer, hidden_act: str) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv_weight, self.qkv_bias = fuse_linears((attention.q_proj, attention.k_proj, attention.v_proj))
        self.gate_up_weight, self.gate_up_bias = fuse_linears((mlp.gate_proj, mlp.up_proj))
        self.o_weight, self.o_bias = _shared_linear(attention.o_proj)
        self.down_weight, self.down_bias = _shared_linear(mlp.down_proj)
        self.input_norm = _shared(layer.input_layernorm.weight)
        self.post_norm = _shared(layer.post_attention_layernorm.weight)
        self.eps = layer.input_layernorm.eps
        self.activation = ACTIVATION_OPS[hidden_act]

    def forward(
        self,
        x_btm: torch.Tensor,
        cos_sd: torch.Tensor,
        sin_sd: torch.Tensor,
        position_bt: torch.Tensor,
        k_cache_bksd: torch.Tensor,
        v_cache_bksd: torch.Tensor,
        arrived_p: torch.Tensor,
    ) -> torch.Tensor:
        qkv_btn = ops.linear(x_btm, self.qkv_weight, self.qkv_bias, self.input_norm, self.eps)
        heads_btn = ops.rotary_attention(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p)
        x_btm = ops.linear(heads_btn, self.o_weight, self.o_bias, residual=x_btm)
        ffn_btf = ops.gate_up(x_btm, self.gate_up_weight, self.gate_up_bias, self.post_norm, self.eps, self.activation)
        return ops.linear(ffn_btf, self.down_weight, self.down_bias, residual=x_btm)

    def weights(self, no_bias: torch.Tensor) -> Iterator[torch.Tensor]:
        """The layer's weights as :func:`fastllama.ops.layers` takes them, with ``no_bias`` where there is no bias."""
        for field in ops.LAYER_FIELDS:
            weight = getattr(self, field)
            yield no_bias if weight is None else weight


class FusedDecoder(nn.Module):
    """Embedding to logits over a static cache, with every row at positions of its own.

    Args:
        model: whose weights are shared; its q/k/v and gate/up parameters become views of the fused matrices.
    """

    def __init__(self, model: Llama) -> None:
        super().__init__()
        decoder = model.model
        self.embedding = _shared(decoder.embed_tokens.weight)
        self.layers = nn.ModuleList(
            FusedLayer(cast(LlamaDecoderLayer, layer), model.config.hidden_act) for layer in decoder.layers
        )
        self.norm = _shared(decoder.norm.weight)
        # A tied head must stay the same Parameter: two parameters over one memory confuse CUDA graphs.
        tied = model.lm_head.weight is decoder.embed_tokens.weight
        self.head = self.embedding if tied else _shared(model.lm_head.weight)
        self.eps, self.activation = decoder.norm.eps, ACTIVATION_OPS[model.config.hidden_act]
        self.no_bias: torch.Tensor
        self.register_buffer("no_bias", self.embedding.new_empty(0), persistent=False)

    def forward(
        self,
        ids_bt: torch.Tensor,
        position_bt: torch.Tensor,
        cos_sd: torch.Tensor,
        sin_sd: torch.Tensor,
        k_caches: Sequence[torch.Tensor],
        v_caches: Sequence[torch.Tensor],
        arrived_p: torch.Tensor,
    ) -> torch.Tensor:
        """Write t tokens a row into the caches (in place) and return the hidden state ``[b, m]`` of the last."""
        x_btm = nn.functional.embedding(ids_bt, self.embedding)
        if ops.runs_layers_at_once(x_btm):
            weights = [weight for layer in self.layers for weight in cast(FusedLayer, layer).weights(self.no_bias)]
            args = (x_btm, cos_sd, sin_sd, position_bt, weights, k_caches, v_caches)
            return ops.layers(*args, self.eps, self.activation)[:, -1]
        for layer, k_cache_bksd, v_cache_bksd in zip(self.layers, k_caches, v_caches, strict=True):
            x_btm = layer(x_btm, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p)
        return x_btm[:, -1]

    def logits(self, x_bm: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, v]`` of hidden states, in their dtype."""
        return ops.linear(x_bm.contiguous(), self.head, None, self.norm, self.eps)
