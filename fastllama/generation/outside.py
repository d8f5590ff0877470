"""Calls that ask for what the compiled step does not do: transformers' own ``generate`` over the model's forward.

Beams, processors, stopping criteria, scores and the rest are transformers' code, so they mean what they mean there. The
network is the model's own forward, eager, whatever its weights are held in.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fastllama.config import GenerationConfig
from fastllama.config.generation import said
from fastllama.generation.generate import Streamer
from fastllama.generation.request import check_ids, check_known, check_tensor, outside_the_step, unpad
from fastllama.model.llama import Llama

logger = logging.getLogger(__name__)

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def generate_outside(
    model: Llama,
    config: GenerationConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    streamer: Streamer | None,
    settings: Mapping[str, Any],
) -> Any:
    """Decode as ``transformers.LlamaForCausalLM.generate`` does.

    Args:
        model: its forward is called.
        config: what counts where the call says nothing.
        input_ids, attention_mask, streamer, settings: of the call.

    Returns:
        What transformers returns: int64 ``[b, t + n]``, or its output object with ``return_dict_in_generate``.

    Raises:
        NotImplementedError: transformers is not installed.
        TypeError: a setting that nobody knows, by name; ids that are no tensor.
        ValueError: ids of another shape or dtype, or outside the vocabulary; what transformers refuses.
    """
    check_known(config, settings)
    asked = outside_the_step(config, settings)
    try:
        import transformers
    except ImportError as error:
        raise NotImplementedError(
            f"generate() does {said(asked)} with transformers' code, which is not installed: "
            "pip install 'fastllama[transformers]'"
        ) from error
    if input_ids is not None and settings.get("inputs_embeds") is None:
        check_tensor(input_ids)
        check_ids(
            unpad(input_ids.cpu(), None if attention_mask is None else attention_mask.cpu()), model.config.vocab_size
        )
    _say_outside(tuple(asked))
    host = _host_class()(model)
    values, given = config.to_dict(), dict(settings)
    seed = given.pop("seed", values.pop("seed", None))
    host.generation_config = transformers.GenerationConfig(**values | {"disable_compile": True})
    with _seeded(seed, model.device):
        return host.generate(input_ids, attention_mask=attention_mask, streamer=streamer, **given)


@functools.cache
def _say_outside(names: tuple[str, ...]) -> None:
    logger.warning(
        "the compiled step does not do %s: decoding with transformers' code over the eager forward, which is slower",
        ", ".join(names),
    )


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Generator[None, None, None]:
    """Sample from a seed, without touching torch's own generators; from those where it is None."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@functools.cache
def _host_class() -> type[Any]:
    """A model of transformers whose forward is one of ours."""
    import transformers
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Host(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.LlamaConfig
        main_input_name = "input_ids"

        def __init__(self, network: Llama) -> None:
            sizes = {name: getattr(network.config, name) for name in SIZES}
            super().__init__(transformers.LlamaConfig(**sizes))
            self.network = network

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            use_cache: bool | None = None,
            output_attentions: bool | None = None,
            output_hidden_states: bool | None = None,
            logits_to_keep: int = 0,
            cache: Any = None,  # today's name of past_key_values
            **_: Any,
        ) -> CausalLMOutputWithPast:
            done = self.network.forward(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values if cache is None else cache,
                inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                logits_to_keep=logits_to_keep,
            )
            return CausalLMOutputWithPast(**vars(done))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.network.get_input_embeddings()

    return Host
