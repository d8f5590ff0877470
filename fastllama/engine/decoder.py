"""The network as the engine runs it: few large matrices a layer, few fused operations a layer.

It shares its memory with the ``Llama`` it is made from: q/k/v and gate/up move into one matrix each and
the original parameters become views of it.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``k`` KV heads, ``d`` head dim, ``m`` model dim,
``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from fastllama import ops
from fastllama.model.llama import (
    Llama,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from fastllama.quantization.linear import QuantizedEmbedding, QuantizedLinear, is_tied
from fastllama.quantization.matrix import Matrix, shared

PLAIN_MODULES = (
    nn.Linear, nn.Embedding, nn.ModuleList, QuantizedLinear, QuantizedEmbedding,
    LlamaRMSNorm, LlamaAttention, LlamaMLP, LlamaDecoderLayer, LlamaModel,
)  # fmt: skip
FORWARDS: dict[type[nn.Module], Any] = {module: module.forward for module in PLAIN_MODULES}  # as they are written


def check_plain(model: Llama) -> None:
    """Refuse a model whose modules do something that the fused network, which shares nothing but weights, would not do.

    Raises:
        NotImplementedError: a module has a forward hook, was replaced or wrapped; the message names it.
    """
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    layers, wanted = len(model.model.layers), model.config.num_hidden_layers
    if layers != wanted or len(kinds) != 1 or model.device.type == "meta":
        found = " and ".join(sorted(f"{str(dtype).removeprefix('torch.')} on {device}" for dtype, device in kinds))
        raise NotImplementedError(
            f"the model has {layers} layers and parameters in {found}; expected {wanted} layers, as its config says, "
            "in one dtype on one device"
        )
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        raise NotImplementedError("a global forward hook is registered, which the compiled engine does not run")
    for name, module in model.named_modules():
        if type(module).forward is not FORWARDS.get(type(module), type(module).forward):
            what = "has a forward() that was put into its class"
        elif module._forward_hooks or module._forward_pre_hooks:
            what = "has a forward hook"
        elif "forward" in module.__dict__:
            what = "has a forward() of its own"
        elif module is not model and type(module) not in PLAIN_MODULES:
            what = f"is a {type(module).__name__}"
        elif module is model and type(module).forward is not Llama.forward:
            what = f"is a {type(module).__name__}, with a forward() of its own"
        elif isinstance(module, LlamaRMSNorm) and module.eps != model.config.rms_norm_eps:
            what = f"has eps {module.eps:g}, and its config {model.config.rms_norm_eps:g}"
        elif isinstance(module, LlamaMLP) and module.act is not ops.ACTIVATIONS[model.config.hidden_act].function:
            what = "has another activation than its config"
        else:
            continue
        raise NotImplementedError(
            f"{name or 'the model'} {what}, which the compiled engine does not run: take it away to generate, "
            "or call forward(), which runs it"
        )


class FusedLayer(nn.Module):
    """One decoder layer in five operations: four matrices and two norms."""

    def __init__(self, layer: LlamaDecoderLayer, hidden_act: str) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Matrix.joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.o = Matrix.of(attention.o_proj)
        self.gate_up = Matrix.joined((mlp.gate_proj, mlp.up_proj))
        self.down = Matrix.of(mlp.down_proj)
        self.input_norm = shared(layer.input_layernorm.weight)
        self.post_norm = shared(layer.post_attention_layernorm.weight)
        self.eps = layer.input_layernorm.eps
        self.activation = hidden_act

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
        qkv_btn = self.qkv(x_btm, self.input_norm, self.eps)
        heads_btn = ops.rotary_attention(qkv_btn, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p)
        x_btm = self.o(heads_btn, residual=x_btm)
        ffn_btf = self.gate_up.gated(x_btm, self.post_norm, self.eps, self.activation)
        return self.down(ffn_btf, residual=x_btm)

    def weights(self) -> ops.Layer:
        """The layer's weights as :func:`fastllama.ops.layers` takes them."""
        qkv, o, gate_up, down = (
            ops.Weights(matrix.kind, matrix.tensors) for matrix in (self.qkv, self.o, self.gate_up, self.down)
        )
        return ops.Layer(self.input_norm, qkv, o, self.post_norm, gate_up, down)


class FusedDecoder(nn.Module):
    """Embedding to logits over a static cache, with every row at positions of its own.

    Args:
        model: whose weights are shared; its q/k/v and gate/up parameters become views of the fused matrices.
    """

    def __init__(self, model: Llama) -> None:
        super().__init__()
        decoder = model.model
        self.embedding = Matrix.of(decoder.embed_tokens)
        self.layers = nn.ModuleList(
            FusedLayer(cast(LlamaDecoderLayer, layer), model.config.hidden_act) for layer in decoder.layers
        )
        self.norm = shared(decoder.norm.weight)
        # A tied head must stay the same Parameter: two parameters over one memory confuse CUDA graphs.
        tied = is_tied(model)
        self.head = self.embedding if tied else Matrix.of(model.lm_head)
        self.eps, self.activation = decoder.norm.eps, model.config.hidden_act
        self.vocab_size = model.config.vocab_size

    def network(self) -> tuple[Any, ...]:
        """Weights, kinds, eps and activation, as the steps that are one operation take them."""
        embedding, head = (ops.Weights(matrix.kind, matrix.tensors) for matrix in (self.embedding, self.head))
        layers = [cast(FusedLayer, layer).weights() for layer in self.layers]
        tensors, kinds = ops.network(embedding, layers, self.norm, head)
        return tensors, kinds, self.eps, ops.ACTIVATIONS[self.activation].number

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
        """Write t tokens a row into the caches (in place) and return their hidden states ``[b, t, m]``."""
        x_btm = self.embedding.embed(ids_bt, self.norm)
        if ops.runs_layers_at_once(x_btm):
            weights = [cast(FusedLayer, layer).weights() for layer in self.layers]
            args = (x_btm, cos_sd, sin_sd, position_bt, weights, k_caches, v_caches)
            return ops.layers(*args, self.eps, self.activation)
        for layer, k_cache_bksd, v_cache_bksd in zip(self.layers, k_caches, v_caches, strict=True):
            x_btm = layer(x_btm, cos_sd, sin_sd, position_bt, k_cache_bksd, v_cache_bksd, arrived_p)
        return x_btm

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., v]`` of hidden states ``[..., m]``, in their dtype."""
        return self.head(x.contiguous(), self.norm, self.eps)
