"""The Llama network, top to bottom, eager and complete: the reference that the engine is checked against.

Shape suffixes: ``b`` batch, ``t`` query tokens, ``s`` cache slots, ``h`` query heads, ``k`` KV heads, ``d`` head dim,
``m`` model dim, ``f`` FFN dim, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastllama import ops
from fastllama.config import LlamaConfig
from fastllama.model.cache import DynamicCache, one_cache, target_length
from fastllama.model.inputs import embedded, prepare_inputs_for_generation
from fastllama.model.masks import causal_mask
from fastllama.model.outputs import CausalLMOutput, DecoderOutput
from fastllama.model.rope import rotary_cos_sin


class LlamaRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) → (-x2, x1) over the halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(x_bhtd: torch.Tensor, cos_btd: torch.Tensor, sin_btd: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its token's angle (arXiv 2104.09864, the half-split layout of the HF checkpoints)."""
    return x_bhtd * cos_btd[:, None] + rotate_half(x_bhtd) * sin_btd[:, None]


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        m, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(m, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(m, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(m, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, m, bias=bias)

    def forward(
        self,
        x_btm: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask_b1ts: torch.Tensor,
        cache: Any,
        cache_position: torch.Tensor,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        b, t, _ = x_btm.shape
        d = self.config.head_dim
        q_bhtd = self.q_proj(x_btm).view(b, t, -1, d).transpose(1, 2)
        k_bktd = self.k_proj(x_btm).view(b, t, -1, d).transpose(1, 2)
        v_bktd = self.v_proj(x_btm).view(b, t, -1, d).transpose(1, 2)
        q_bhtd, k_bktd = apply_rotary(q_bhtd, *rotary), apply_rotary(k_bktd, *rotary)
        k_bksd, v_bksd = k_bktd, v_bktd
        if cache is not None:
            k_bksd, v_bksd = cache.update(k_bktd, v_bktd, self.layer_idx, {"cache_position": cache_position})
        dropout = self.config.attention_dropout if self.training else 0.0
        out_bhtd, weights = attend(q_bhtd, k_bksd, v_bksd, mask_b1ts, dropout, output_attentions)
        return self.o_proj(out_bhtd.transpose(1, 2).reshape(b, t, -1)), weights


def attend(
    q_bhtd: torch.Tensor,
    k_bksd: torch.Tensor,
    v_bksd: torch.Tensor,
    mask_b1ts: torch.Tensor,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(q·k / sqrt(d) + mask)·v with k and v shared by groups of query heads; softmax in float32.

    Returns:
        The heads' outputs ``[b, h, t, d]`` and, if requested, the attention weights ``[b, h, t, s]``.
    """
    mask_b1ts = mask_b1ts[..., : k_bksd.shape[2]]
    if not output_attentions:
        out = F.scaled_dot_product_attention(q_bhtd, k_bksd, v_bksd, mask_b1ts, dropout, enable_gqa=True)
        return out, None
    groups, scale = q_bhtd.shape[1] // k_bksd.shape[1], q_bhtd.shape[-1] ** -0.5
    k_bhsd, v_bhsd = (x.repeat_interleave(groups, dim=1) for x in (k_bksd, v_bksd))
    scores_bhts = q_bhtd @ k_bhsd.transpose(2, 3) * scale + mask_b1ts
    weights_bhts = F.softmax(scores_bhts, dim=-1, dtype=torch.float32).to(q_bhtd.dtype)
    weights_bhts = F.dropout(weights_bhts, dropout)
    return weights_bhts @ v_bhsd, weights_bhts


class LlamaMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        m, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(m, f, bias=bias)
        self.up_proj = nn.Linear(m, f, bias=bias)
        self.down_proj = nn.Linear(f, m, bias=bias)
        self.act = ops.ACTIVATIONS[config.hidden_act].function

    def forward(self, x_btm: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x_btm)) * self.up_proj(x_btm))


class LlamaDecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_btm: torch.Tensor, **attention_args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(x_btm), **attention_args)
        x_btm = x_btm + attended
        return x_btm + self.mlp(self.post_attention_layernorm(x_btm)), weights


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm: everything but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        pad = config.pad_token_id
        padding_idx = pad if pad is not None and pad < config.vocab_size else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        cache_position: torch.Tensor | None,
    ) -> DecoderOutput:
        """Run the stack; the arguments are those of ``Llama.forward`` with its defaults filled in."""
        x_btm = embedded(self.embed_tokens, input_ids, inputs_embeds)
        b, t, _ = x_btm.shape
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        if cache_position is None:
            cache_position = torch.arange(past, past + t, device=x_btm.device)
        if position_ids is None:
            position_ids = cache_position[None]
        slots = target_length(cache, past + t, cache_position)
        args: dict[str, Any] = {
            "rotary": self._rotary(position_ids.expand(b, t), x_btm.dtype),
            "mask_b1ts": causal_mask(cache_position, slots, x_btm.dtype, attention_mask, b),
            "cache": cache,
            "cache_position": cache_position,
            "output_attentions": output_attentions,
        }
        hidden_states, attentions = [x_btm], []
        for layer in self.layers:
            x_btm, weights = layer(x_btm, **args)
            hidden_states.append(x_btm)
            attentions.append(weights)
        x_btm = hidden_states[-1] = self.norm(x_btm)
        return DecoderOutput(
            x_btm,
            cache if use_cache else None,
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def _rotary(self, position_bt: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cos_btd, sin_btd = rotary_cos_sin(self.config, position_bt)
        return cos_btd.to(dtype), sin_btd.to(dtype)


class Llama(nn.Module):
    """A Llama decoder with its language-model head, under Hugging Face's parameter names.

    Args:
        config: the architecture.

    Source: arXiv 2302.13971, 2307.09288 and 2407.21783; parameter names and layouts of the checkpoints on the
    Hugging Face hub.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.norm.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding; a tied head follows it."""
        self.model.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear:
        """The language-model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the language-model head."""
        self.lm_head = new_embeddings

    def get_decoder(self) -> LlamaModel:
        """The network without its head."""
        return self.model

    def set_decoder(self, decoder: LlamaModel) -> None:
        """Replace the network without its head; a tied head follows its embedding."""
        self.model = decoder
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the head's weight with the embedding where the config says so."""
        if not self.config.tie_word_embeddings:
            return
        head, table = self.lm_head, self.model.embed_tokens
        if isinstance(head, nn.Linear) != isinstance(table, nn.Embedding):
            kinds = f"the head, a {type(head).__name__}, is tied to the embedding, a {type(table).__name__}"
            raise ValueError(f"{kinds}: replace both, or load the model without quantizing them")
        for name in ("weight",) if isinstance(head, nn.Linear) else ("codes", "scales", "offsets"):
            setattr(head, name, getattr(table, name))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Llama:
        super()._apply(fn, recurse)
        self.tie_weights()  # of a quantized network .to(device) makes two copies
        return self

    prepare_inputs_for_generation = prepare_inputs_for_generation

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        num_logits_to_keep: int = 0,
        logits_to_keep: int | None = None,
        cache: Any = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Compute the logits of the next token at every position, and what else is requested.

        Args:
            input_ids: int64 ``[b, t]``; exactly one of this and ``inputs_embeds`` is given.
            attention_mask: padding mask ``[b, past + t]`` (1: token, 0: padding) or an additive mask ``[b, 1, t, s]``.
            position_ids: rotary positions int64 ``[b, t]``; ``cache_position`` when None.
            past_key_values, cache: two names for a StaticCache, a DynamicCache or an object with ``update`` and
                ``get_seq_length``.
            inputs_embeds: ``[b, t, m]``.
            labels: int64 ``[b, t]``, -100 ignored; the loss compares position i's logits with label i + 1.
            use_cache: return a cache, making one if none is given; the config's value when None.
            output_attentions, output_hidden_states, return_dict: the config's values when None.
            cache_position: slots the tokens go to, int64 ``[t]``; following the cache's content when None.
            num_logits_to_keep, logits_to_keep: compute the logits of that many last positions; 0 means all.

        Returns:
            CausalLMOutput with float32 logits ``[b, t, v]``; with ``return_dict=False`` its fields as a tuple.

        Raises:
            CacheOverflowError: a static cache is too small; nothing was written.
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``; a mask that does not fit; two caches.
        """
        config, last = self.config, num_logits_to_keep if logits_to_keep is None else logits_to_keep
        decoded = self.model(
            input_ids,
            attention_mask,
            position_ids,
            one_cache(past_key_values, cache),
            inputs_embeds,
            config.use_cache if use_cache is None else use_cache,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            cache_position,
        )
        logits_btv = self._head(decoded.last_hidden_state, last).float()
        output = CausalLMOutput(
            loss=None if labels is None else self._loss(logits_btv, labels),
            logits=logits_btv,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _head(self, x_btm: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last ``keep`` positions; of all where it is 0."""
        # A clone: of a view with gaps torch's linear makes a batched product, for which it copies the whole head.
        x_btm = x_btm[:, -keep:].clone(memory_format=torch.contiguous_format)
        if self.config.pretraining_tp <= 1:
            return self.lm_head(x_btm)
        parts = self.lm_head.weight.split(max(1, self.config.vocab_size // self.config.pretraining_tp), dim=0)
        return torch.cat([F.linear(x_btm, part) for part in parts], dim=-1)

    def _loss(self, logits_btv: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shifted = logits_btv[:, :-1].flatten(0, 1)
        return F.cross_entropy(shifted, labels[:, 1:].flatten().to(shifted.device), ignore_index=-100)
