"""Calls that ask for what the compiled step does not do: transformers' own ``generate`` over the engine's logits.

Beams, processors, stopping criteria, scores and the rest are transformers' code, so they mean what they mean there.
Where a call needs more than logits (attentions, states, embeddings, a cache of its own) the network is the model's own
forward, eager.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fastllama.config import GenerationConfig
from fastllama.config.settings import DRAFTS, FUNCTIONS, NOT_IN_TRANSFORMERS, said
from fastllama.config.tokens import bias_items
from fastllama.engine.runner import Runner
from fastllama.generation.drafting import say_off
from fastllama.generation.generate import Streamer
from fastllama.generation.processors import CountPenalties, MaskedTokens
from fastllama.generation.request import (
    check_ids,
    check_known,
    check_tensor,
    inferred_mask,
    outside_the_step,
    unpad,
)
from fastllama.generation.stop_strings import StopStrings
from fastllama.generation.transformers_loop import over_engine, why_not, with_cache
from fastllama.model.cache import one_cache
from fastllama.model.llama import Llama
from fastllama.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# How caches are organised: without a meaning where the engine's is used.
ORGANISES_CACHES = ("cache_implementation", "cache_config", "prefill_chunk_size")
# Settings that the step takes in more forms than transformers, and transformers' form of each.
FORMS: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "no_repeat_ngram_size": int,
    "sequence_bias": lambda value: {tokens: float(number) for tokens, number in bias_items(value)},
    "bad_words_ids": lambda value: [list(tokens) for tokens in value],
    "suppress_tokens": list, "begin_suppress_tokens": list, "forced_bos_token_id": int,
    "forced_eos_token_id": lambda value: value if isinstance(value, int) else list(value),
}  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def generate_outside(
    model: Llama,
    runner_of: Callable[[], Runner],
    config: GenerationConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    streamer: Streamer | None,
    settings: Mapping[str, Any],
) -> Any:
    """Decode as ``transformers.LlamaForCausalLM.generate`` does.

    Args:
        model: whose forward is called where the engine's logits are not enough.
        runner_of: gives its engine.
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
    asked = outside_the_step(config, settings, model.device.type)
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
    host = _host_class()(model)
    values, given = _prepared(config, settings, input_ids)
    seed = given.pop("seed", None)
    reason = _why_eager(runner_of, values | given, input_ids, attention_mask)
    _say_outside(tuple(asked), reason)
    if reason is None:
        host = over_engine(host, runner_of)
        for name in ORGANISES_CACHES:
            values.pop(name, None)
            given.pop(name, None)
    host.generation_config = transformers.GenerationConfig(**values | {"disable_compile": True})
    with seeded(seed, model.device):
        done = host.generate(input_ids, attention_mask=attention_mask, streamer=streamer, **given)
    if reason is not None or not (values | given).get("use_cache", True):
        return done
    if attention_mask is None and input_ids is not None:
        attention_mask = inferred_mask(input_ids, config)
    return with_cache(done, runner_of(), attention_mask)


def _prepared(
    config: GenerationConfig, settings: Mapping[str, Any], input_ids: torch.Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config and a call come to for transformers; and ``seed``, which is with the call's."""
    values, given = config.to_dict(), _plain(config, settings)
    values |= _plain(config, {name: values[name] for name in FORMS if name in values})
    cache = one_cache(given.pop("past_key_values", None), given.pop("cache", None))
    if cache is not None:
        given[_cache_name()] = cache
    if isinstance(given.get("tokenizer"), Tokenizer):
        _use_our_tokenizer(values, given)
    if (values | given).get("speculate") == "auto" or (values | given).get("prompt_lookup_num_tokens"):
        say_off("transformers' loop decodes, which has no part in it")
    for name in DRAFTS:  # nothing comes out otherwise without
        values.pop(name, None)
        given.pop(name, None)
    for name in (*NOT_IN_TRANSFORMERS, *FUNCTIONS):  # which transformers' object does not have
        if name in values:
            given.setdefault(name, values.pop(name))
    add_processors(given, values, input_ids)
    return values, given


def _plain(config: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's settings in the forms that transformers takes, checked as the step checks them."""
    own = {name: given[name] for name in FORMS if given.get(name) is not None}
    checked = config.replace(**own)
    values = {name: getattr(checked, name) for name in own}
    return {**given, **{name: None if value is None else FORMS[name](value) for name, value in values.items()}}


def add_processors(given: dict[str, Any], values: Mapping[str, Any], input_ids: torch.Tensor | None) -> None:
    """Do with processors what a call asks for and transformers has no settings for; those are taken out of the call.

    Args:
        given: the call's settings, which change.
        values: of its config, which count where the call says nothing.
        input_ids: its prompts.
    """
    prompt_tokens = 0 if input_ids is None else input_ids.shape[1]
    presence, frequency = (float(given.pop(f"{name}_penalty", None) or 0) for name in ("presence", "frequency"))
    token_mask, added = given.pop("token_mask", None), list[Any]()
    if presence or frequency:
        added.append(CountPenalties(presence, frequency, prompt_tokens))
    if token_mask is not None:
        beams = given.get("num_beams") or values.get("num_beams") or 1
        eos = GenerationConfig(eos_token_id=given.get("eos_token_id", values.get("eos_token_id"))).eos_token_id
        added.append(MaskedTokens(token_mask, beams, prompt_tokens, eos))
    if added:
        from transformers import LogitsProcessorList

        given["logits_processor"] = LogitsProcessorList([*(given.get("logits_processor") or ()), *added])


def _use_our_tokenizer(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Do what a call needs a tokenizer for with ours; transformers' own code takes transformers' ones.

    Raises:
        NotImplementedError: token_healing, which needs such a one.
    """
    from transformers import StoppingCriteriaList

    tokenizer = given.pop("tokenizer")
    if (values | given).get("token_healing"):
        raise NotImplementedError("token_healing takes a tokenizer of transformers; give AutoTokenizer's")
    strings = given.pop("stop_strings", values.pop("stop_strings", None))
    stop = [] if strings is None else [StopStrings(strings, tokenizer)]
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), *stop])


def _why_eager(
    runner_of: Callable[[], Runner], asked: Mapping[str, Any], input_ids: torch.Tensor | None, attention_mask: Any
) -> str | None:
    """Why the eager forward has to do it; None where the engine's logits are enough."""
    try:
        return why_not(runner_of(), asked, 1 if input_ids is None else len(input_ids), attention_mask)
    except NotImplementedError as error:  # the engine does not run this model
        return str(error)


@functools.cache
def _say_outside(names: tuple[str, ...], reason: str | None) -> None:
    what = ", ".join(names)
    if reason is None:
        logger.info("the compiled step does not do %s: transformers' loop does, with the engine's logits", what)
    else:
        logger.warning(
            "the compiled step does not do %s: transformers' loop does, over the eager forward, which is slower: %s",
            what,
            reason,
        )


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Generator[None, None, None]:
    """Sample from a seed, without touching torch's own generators; from those where it is None."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@functools.cache
def _cache_name() -> str:
    """What the installed transformers calls a cache: ``cache`` from 5.24 on."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
    return "cache" if "cache" in names else "past_key_values"


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
            values = dict(vars(done))
            return CausalLMOutputWithPast(**{_cache_name(): values.pop("past_key_values")}, **values)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.network.get_input_embeddings()

    return Host
