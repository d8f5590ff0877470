"""``accelerate``: a transformers Llama whose ``generate()`` decodes through fastllama's engine, on the same weights.

The engine computes what a model's config describes. So before each call the model is compared with one that
transformers would make of that config; where it differs, transformers' own ``generate`` runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastllama.causal_lm import LlamaForCausalLM, engine_of
from fastllama.config import GenerationConfig, LlamaConfig
from fastllama.config.settings import FUNCTIONS, KNOWN, NOT_IN_TRANSFORMERS
from fastllama.engine.row import check_sampling
from fastllama.generation.drafting import say_off
from fastllama.generation.outside import ORGANISES_CACHES, add_processors, seeded
from fastllama.generation.request import check_ids, check_tensor, inferred_mask, requests_of, unpad
from fastllama.generation.transformers_loop import over_engine, why_not, with_cache
from fastllama.integrations.described import check_as_described
from fastllama.integrations.prepared import given_by_the_caller, own_arguments
from fastllama.model.rope import rotary_cos_sin

logger = logging.getLogger(__name__)

# Arguments of transformers' generate() that have no effect on the engine.
INERT = frozenset({"use_cache", "synced_gpus", "cache_implementation", "disable_compile", "logits_to_keep"})
PADDING = ("pad_token_id", "eos_token_id")
POSITIONS_AND_CACHES = {"position_ids", "past_key_values", "cache"}


def accelerate(model: Any) -> Any:
    """Make ``model.generate`` decode through the engine; everything else about the model stays as it is.

    Calls that ask for what the compiled step does not do (beams, logits processors, …) run in transformers' own loops,
    with logits from the engine. Calls that need more than logits, and calls on a model that is not what its config
    describes (hooks, replaced modules, adapters, quantized weights, …), fall back to transformers' own ``generate``; a
    warning says why, once for each reason.

    Args:
        model: a ``transformers.LlamaForCausalLM``. Its q/k/v and gate/up parameters become views of fused matrices
            when it first decodes, so no weight is held twice.

    Returns:
        The same model. ``model.fastllama`` is its LlamaForCausalLM, for ``warmup`` and ``release``; None while it
        cannot be made.

    Raises:
        ValueError: the model is of another architecture.
    """
    if getattr(model.config, "model_type", None) != "llama":
        raise ValueError(f"model_type is {model.config.model_type!r}; fastllama runs Llama models only")
    theirs = unaccelerate(model).generate
    model.__dict__["generate"] = functools.partial(_generate, model, theirs)  # a copy of the model binds the copy
    # Not by setattr: as a submodule the twin would show in the model's parameters and state dict.
    model.__dict__["fastllama"] = None
    try:
        _follow(model)
    except (ValueError, NotImplementedError) as error:
        _say_fallback(str(error), str(error))
    return model


def unaccelerate(model: Any) -> Any:
    """Undo :func:`accelerate`: ``model.generate`` is transformers' own again, and the engine is freed."""
    for name in ("generate", "fastllama"):
        model.__dict__.pop(name, None)
    return model


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: Any = None,
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """Decode through the engine, for ``model.generate(..., custom_generate=generate)``.

    transformers checks and prepares a call as ever; what the compiled step does not do, its own decoding loops do, with
    logits from the engine where those are enough.

    Args:
        model: a ``transformers.LlamaForCausalLM``; need not be accelerated.
        input_ids: int64 ``[b, t]``.
        logits_processor, stopping_criteria, generation_config, streamer, kwargs: as transformers prepares them, the
            attention mask among the last.

    Returns:
        As the loop of transformers that it replaces: int64 ``[b, t + n]``, or its output object.
    """
    model.__dict__.setdefault("fastllama", None)
    try:
        if foreign := given_by_the_caller(model, input_ids, generation_config, logits_processor, stopping_criteria):
            raise NotImplementedError(f"{', '.join(foreign)}: the engine does not do it")
        mask = kwargs.get("attention_mask")
        if own := sorted(own_arguments(kwargs, mask).keys() & POSITIONS_AND_CACHES):
            raise NotImplementedError(f"{', '.join(own)} is given")
        _follow(model)
        config = _config_of(generation_config.to_dict()).replace(max_new_tokens=None, num_return_sequences=1)
        arguments = {"input_ids": input_ids, "attention_mask": mask, "generation_config": config}
        _check(model.fastllama, **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        prepared = {"input_ids": input_ids, "num_beams": 1, "num_return_sequences": 1}  # rows are expanded already
        asked = {**generation_config.to_dict(), **own_arguments(kwargs, kwargs.get("attention_mask")), **prepared}
        loops, with_engine = _loops_of(model, str(error), asked)
        loop = loops._beam_search if generation_config.num_beams > 1 else loops._sample
        kwargs |= {"streamer": streamer} if generation_config.num_beams == 1 else {}
        processors = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        given = {"generation_config": generation_config, **processors, **kwargs}
        return with_engine(loop(input_ids, **given))
    if streamer is None:
        return model.fastllama.generate(**arguments)
    return model.fastllama.generate(**arguments, streamer=_WithoutPrompt(streamer))


class _WithoutPrompt:
    """A streamer that transformers has given the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._has_prompt, self.end = streamer, False, streamer.end

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._streamer.put(value)
        self._has_prompt = True


def _generate(model: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    named = inspect.signature(theirs).bind_partial(*args).arguments
    if named.keys() & kwargs.keys():
        return theirs(*args, **kwargs)  # which says so
    kwargs |= named
    if isinstance(given := kwargs.get("generation_config"), GenerationConfig):
        values = given.to_diff_dict()
        own = {name: values.pop(name) for name in (*NOT_IN_TRANSFORMERS, *FUNCTIONS) if name in values}
        kwargs = {**own, **kwargs, "generation_config": type(model.generation_config)(**values)}
    try:
        if kwargs.get("custom_generate") is not None:
            raise NotImplementedError("custom_generate is given")
        _follow(model)
        arguments = engine_arguments(model, **kwargs)
        _check(model.fastllama, **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        seed = kwargs.pop("seed", None)
        _without_drafts(kwargs)
        add_processors(kwargs, _asked(model, **kwargs), kwargs.get("input_ids", kwargs.get("inputs")))
        rest = {name: value for name, value in kwargs.items() if name not in ORGANISES_CACHES}
        loops, with_engine = _loops_of(model, str(error), _asked(model, **rest))
        with seeded(seed, model.device):
            if loops is model or getattr(theirs, "__func__", None) is not type(loops).generate:
                return theirs(**kwargs)
            return with_engine(type(loops).generate(loops, **rest))
    return model.fastllama.generate(**arguments)


def _without_drafts(kwargs: dict[str, Any]) -> None:
    """Take out of a call what asks for drafts in words that transformers does not know."""
    asked = kwargs.pop("speculate", None) == "auto"
    kwargs.pop("prompt_lookup_pool_tokens", None)
    if isinstance(kwargs.get("assistant_model"), LlamaForCausalLM):
        asked = kwargs.pop("assistant_model") is not None
    if asked:
        say_off("transformers' loop decodes, which has no part in it")


def _config_of(values: Mapping[str, Any]) -> GenerationConfig:
    """Ours, of what transformers' object holds and transformers follows."""
    fields = GenerationConfig.__dataclass_fields__.keys() | KNOWN
    followed = fields - {"other", *NOT_IN_TRANSFORMERS, *FUNCTIONS}
    return GenerationConfig.from_dict({name: value for name, value in values.items() if name in followed})


def _asked(model: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> dict[str, Any]:
    """What a call of transformers' ``generate`` and the configs set."""
    chosen = {} if generation_config is None else generation_config.to_diff_dict()
    return {**model.generation_config.to_dict(), **chosen, "input_ids": inputs, **kwargs}


def _loops_of(model: Any, reason: str, asked: Mapping[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """The model whose loops do what the compiled step does not, and what completes their result.

    Args:
        model: decodes by itself where logits of the engine are not enough.
        reason: why the step does not do it.
        asked: by the call and the configs.
    """
    core: Any = getattr(model, "_orig_mod", model)
    ids: Any = asked.get("input_ids")
    mask: Any = asked.get("attention_mask")
    try:
        _follow(model)
        runner = engine_of(model.fastllama)
        check_tensor(ids)
        check_ids(unpad(ids.cpu(), None if mask is None else mask.cpu()), core.config.vocab_size)
        organised = [name for name in ORGANISES_CACHES if asked.get(name) is not None]
        eager = f"{', '.join(organised)} is given" if organised else why_not(runner, asked, len(ids), mask)
    except (TypeError, ValueError, NotImplementedError) as error:
        eager = str(error)
    _say_fallback(reason, eager)
    if eager is not None:
        return model, lambda done: done
    if mask is None:
        mask = inferred_mask(ids, GenerationConfig.from_dict({name: asked.get(name) for name in PADDING}))
    returns_cache = asked.get("use_cache", True) is not False

    def completed(done: Any) -> Any:
        return with_cache(done, runner, mask) if returns_cache else done

    return over_engine(core, lambda: engine_of(model.fastllama)), completed


@functools.cache
def _say_fallback(reason: str, eager: str | None) -> None:
    if eager is None:
        logger.info("decoding in transformers' loop with the engine's logits: %s", reason)
    else:
        logger.warning(
            "decoding with transformers' own generate: %s", reason if reason == eager else f"{reason}; {eager}"
        )


def _check(
    twin: LlamaForCausalLM,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    attention_mask: torch.Tensor | None = None,
    streamer: Any = None,
    **settings: Any,
) -> None:
    """Raise what a call would raise before its first token."""
    engine_of(twin)
    if isinstance(settings.get("assistant_model"), LlamaForCausalLM):
        settings.pop("assistant_model")  # which generate() takes
    requests = requests_of(input_ids, attention_mask, generation_config, settings, twin.config.vocab_size)
    check_sampling([request.sampling for request in requests], twin.device)
    changes = [request.changes for request in requests if len(request.prompt) < input_ids.shape[1]]  # of padded rows
    if any(each.repetition_penalty != 1 for each in changes) and _penalises_padding():
        raise NotImplementedError("repetition_penalty counts padding in this version of transformers")
    if any(each.reads_tokens for each in changes):
        raise NotImplementedError("no_repeat_ngram_size and sequences of tokens count padding in transformers")


@functools.cache
def _penalises_padding() -> bool:
    """Whether the installed transformers is older than 5.23, which has put an end to that."""
    from transformers import __version__

    return tuple(map(int, __version__.split(".")[:2])) < (5, 23)


def _follow(model: Any) -> None:
    """Have a twin that shares the model's parameters as they are now.

    Raises:
        ValueError, NotImplementedError: the model is not what its config describes, or fastllama cannot run that.
    """
    core = getattr(model, "_orig_mod", model)  # of a model that torch.compile has wrapped
    check_as_described(core)
    if model.__dict__["fastllama"] is None or not _shares_parameters(model.__dict__["fastllama"], core):
        model.__dict__["fastllama"] = twin_of(core)


def twin_of(model: Any) -> LlamaForCausalLM:
    """Build fastllama's model of the same config over the very same Parameter objects.

    Raises:
        ValueError, NotImplementedError: fastllama cannot run what the model's config asks for.
    """
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig.from_hf(model.config))
    _check_rotary(model, twin.config)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, parameter)
    is_tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    if is_tied != twin.config.tie_word_embeddings:
        raise NotImplementedError(f"tie_word_embeddings is {not is_tied}, and the head's weights are not as that says")
    twin.generation_config = GenerationConfig()  # a call's own config says all
    return twin.eval()


def _check_rotary(model: Any, config: LlamaConfig) -> None:
    """Raise where a model's rotary embedding is not what fastllama makes of its config.

    transformers 4 takes the lengths of ``longrope`` from other keys than 5 does.
    """
    original = config.rope.original_max_position_embeddings or config.max_position_embeddings
    with torch.device("cpu"):
        for position in (1, original - 1, original, config.max_position_embeddings):
            at = torch.tensor([[position]])
            theirs = type(model.model.rotary_emb)(model.config)(torch.zeros(1), at)
            if not all(
                torch.allclose(*pair, atol=1e-3) for pair in zip(rotary_cos_sin(config, at), theirs, strict=True)
            ):
                raise NotImplementedError(f"{config.rope.rope_type} rotates otherwise in this version of transformers")


def _shares_parameters(twin: LlamaForCausalLM, model: Any) -> bool:
    """Whether the twin still has the model's parameters, under the same names."""
    ours, theirs = (
        {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
        for module in (twin, model)
    )
    return ours == theirs


def engine_arguments(
    model: Any, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Translate a call of transformers' ``generate`` into arguments of ours.

    As there, fields that a given generation config leaves unset come from the model's own.

    Raises:
        NotImplementedError: there are no ids.
    """
    settings = {name: value for name, value in kwargs.items() if name not in INERT}
    input_ids = settings.pop("input_ids", inputs)
    if input_ids is None:
        raise NotImplementedError("decoding without input_ids is not available")
    passed = {name: settings.pop(name) for name in ("attention_mask", "streamer") if name in settings}
    chosen = {} if generation_config is None else generation_config.to_diff_dict()
    config = _config_of(model.generation_config.to_dict() | chosen)
    settings = {name: chosen[name] for name in ("max_length",) if name in chosen} | settings
    return {"input_ids": input_ids, "generation_config": config, **passed, **settings}
