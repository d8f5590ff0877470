"""From the arguments of a call to rows: checked once, unpadded, every setting resolved.

Shape suffixes: ``b`` batch, ``t`` prompt tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastllama.config import GenerationConfig
from fastllama.config.settings import ENDS, KNOWN, OFF, OUTSIDE_THE_STEP, said
from fastllama.config.tokens import depth, plain_numbers
from fastllama.engine.row import GREEDY, NO_CHANGES, Changes, Sampling
from fastllama.generation.changes import allowed_tokens, beyond_the_step, changes_of, fill_mask, token_masks
from fastllama.generation.stop_strings import stop_strings_of
from fastllama.ops import row_seed

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20  # as in transformers
# What may differ from prompt to prompt, besides EOS ids.
BY_PROMPT = frozenset({
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "forced_bos_token_id",
    "min_new_tokens", "min_length", "pad_token_id", "seed",
})  # fmt: skip
# How many lists a value is that counts for all prompts.
DEPTHS = {
    "eos_token_id": 1, "forced_eos_token_id": 1, "suppress_tokens": 1, "begin_suppress_tokens": 1, "bad_words_ids": 2,
}  # fmt: skip
CHANGING = frozenset({
    "no_repeat_ngram_size", "sequence_bias", "bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "min_new_tokens", "min_length", "eos_token_id",
})  # fmt: skip
NO_PROMPT = "every row needs at least one prompt token; give a BOS token to start from nothing"


@dataclass(frozen=True)
class Request:
    """One row to decode.

    prompt: int64 ``[tokens]`` on the CPU, at least one token.
    max_new_tokens: steps to decode at most.
    sampling: temperature 0 is greedy.
    changes: what changes its logits before that.
    seen: int64 ``[tokens]`` on the CPU, what a repetition penalty takes for its tokens so far: its prompt when None.
    eos_token_ids: the row ends when it gives one of these, and gives ``pad_token_id`` from then on.
    allowed: int32 ``[words]`` on the CPU, the token mask of every step; None: all tokens.
    next_allowed: writes to a mask what may follow, given the new tokens, int64 ``[n]``; before each step.
    ends: whether the row ends with the last of its tokens, those in ``seen`` and the new ones.
    """

    prompt: torch.Tensor
    max_new_tokens: int
    sampling: Sampling = GREEDY
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    changes: Changes = NO_CHANGES
    seen: torch.Tensor = None  # type: ignore[assignment]
    allowed: torch.Tensor | None = None
    next_allowed: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    ends: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        if self.seen is None:
            object.__setattr__(self, "seen", self.prompt)
        if len(self.prompt) < 1:
            raise ValueError(NO_PROMPT)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def requests_of(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    settings: Mapping[str, Any],
    vocab_size: int,
) -> list[Request]:
    """The rows of a call, ``num_return_sequences`` for each prompt.

    Args:
        input_ids: integers ``[b, t]``.
        attention_mask: ``[b, t]``, 0 where a prompt is padded; where there is none, pad ids may be padding.
        config: of every row.
        settings: of the call, which count instead; a list has one value for each prompt.
        vocab_size: of the model.

    Raises:
        NotImplementedError, TypeError: as :func:`merge_settings`.
        ValueError: ids or mask of another shape or dtype, ids outside the vocabulary, a row without tokens, no room for
            a new token.
    """
    check_tensor(input_ids)
    listed = {name for name, value in settings.items() if is_by_prompt(name, value)}
    if listed:
        configs = [merge_settings(config, each) for each in _by_prompt(settings, listed, len(input_ids))]
    else:
        configs = [merge_settings(config, settings)] * len(input_ids)
    if attention_mask is None:
        attention_mask = inferred_mask(input_ids, configs[0])
    mask = None if attention_mask is None else attention_mask.cpu()
    prompts = unpad(input_ids.cpu().long(), mask)
    check_ids(prompts, vocab_size)
    is_free = any(own.do_sample and own.seed is None for own in configs)  # else torch's generator stays as it is
    seed = int(torch.randint(2**62, (), device="cpu")) if is_free else 0
    masks = token_masks({**config.other, **settings}, vocab_size)
    ends = stop_strings_of(*({**config.other, **settings}.get(name) for name in ENDS))
    rows = zip(input_ids, prompts, unpadded(input_ids.cpu().long(), mask), configs, strict=True)
    requests = []
    for whole, prompt, seen, own in rows:
        if own.num_return_sequences > 1 and not own.do_sample:
            raise ValueError(f"num_return_sequences is {own.num_return_sequences}; without do_sample all are equal")
        known = seen[(seen >= 0) & (seen < vocab_size)]
        for number in range(own.num_return_sequences):
            row = number if "seed" in listed else len(requests)  # a seed of its own counts as in a call of its own
            row_of_call = row_seed(seed if own.seed is None else own.seed, row)
            request = _request(prompt, input_ids.shape[1], own, row_of_call, known, vocab_size)
            if ends is not None:
                request = dataclasses.replace(request, ends=ends)
            if masks:
                follow = functools.partial(fill_mask, masks, len(requests), whole)
                request = dataclasses.replace(request, next_allowed=follow)
            requests.append(request)
    return requests


def _request(
    prompt: torch.Tensor, width: int, config: GenerationConfig, seed: int, seen: torch.Tensor, vocab_size: int
) -> Request:
    """One row; its prompt comes to ``width`` tokens with its padding."""
    eos, new_tokens = config.eos_token_id, _new_tokens(width, config)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if eos else 0)
    changes = changes_of(config, width, vocab_size)
    allowed = allowed_tokens(config, vocab_size)
    return Request(prompt, new_tokens, sampling_of(config, seed), eos, pad, changes, seen, allowed)


def is_by_prompt(name: str, value: Any) -> bool:
    """Whether the setting of a call has one value for each prompt: a list of what counts for all of them elsewhere."""
    if name not in {*BY_PROMPT, *DEPTHS, "sequence_bias"}:
        return False
    value = plain_numbers(value)
    if not isinstance(value, (list, tuple)) or name in BY_PROMPT:
        return isinstance(value, (list, tuple))
    if name == "sequence_bias":  # [[[tokens], value]] is one for all
        items = (each for each in value if each is None or isinstance(each, (dict, list, tuple)))
        return any(not each or isinstance(each, dict) or depth(each[0]) > 1 for each in items)
    is_off = any(each is None or (each == [] and DEPTHS[name] > 1) for each in value)
    return is_off or depth(value) > DEPTHS[name]


def _by_prompt(settings: Mapping[str, Any], listed: Iterable[str], prompts: int) -> list[Mapping[str, Any]]:
    values = {name: plain_numbers(settings[name]) for name in listed}
    for name, each in values.items():
        if len(each) != prompts:
            raise ValueError(f"{name} has {len(each)} values for {prompts} prompts; give one value, or one for each")
    return [{**settings, **{name: each[at] for name, each in values.items()}} for at in range(prompts)]


def outside_the_step(config: GenerationConfig, settings: Mapping[str, Any], device_type: str = "cpu") -> dict[str, Any]:
    """What a call asks for that the compiled step does not do on such a device."""
    outside = config.left_to_loops(settings)
    typical_p = settings.get("typical_p", config.typical_p)
    if device_type != "cpu" and typical_p not in (None, 1.0) and settings.get("do_sample", config.do_sample):
        outside |= {"typical_p": typical_p}
    numbers = {name for name, neutral in OUTSIDE_THE_STEP.items() if type(neutral) in (int, float)}
    if several := sorted(name for name in numbers & outside.keys() if isinstance(outside[name], (list, tuple))):
        raise NotImplementedError(f"{', '.join(several)} by prompt is not done; give one value for all prompts")
    if by_prompt := sorted(name for name, value in settings.items() if is_by_prompt(name, value)):
        if outside:
            raise NotImplementedError(
                f"{', '.join(by_prompt)} by prompt is done by the compiled step, which does not do {said(outside)}; "
                "give one value for all prompts"
            )
        return {}
    touched = {name: OFF.get(name) if settings[name] is None else settings[name] for name in CHANGING & settings.keys()}
    own = config.replace(**touched) if touched else config
    return outside | {name: getattr(own, name) for name in beyond_the_step(own)}


def start_of(config: GenerationConfig) -> torch.Tensor:
    """The prompt of a call that gives none, as in transformers: the BOS id.

    Raises:
        ValueError: there is no such id.
    """
    if config.bos_token_id is None:
        raise ValueError(f"got no input_ids, and the generation config has no bos_token_id to begin with; {NO_PROMPT}")
    return torch.tensor([[config.bos_token_id]], device="cpu")


def sampling_of(config: GenerationConfig, seed: int) -> Sampling:
    """How a row with this seed samples.

    Raises:
        ValueError: a temperature of 0, by which nothing can be divided.
    """
    if config.do_sample and config.temperature == 0:
        raise ValueError(
            "temperature is 0; expected above 0 when sampling: do_sample=False takes the most likely token"
        )
    return Sampling(
        temperature=config.temperature if config.do_sample else 0.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        typical_p=1.0 if config.typical_p is None else config.typical_p,
        seed=seed,
    )


def check_tensor(input_ids: Any) -> None:
    """Raise TypeError or ValueError where prompts are no tensor of integers ``[b, t]``, or an empty one."""
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(
            f"input_ids is a {type(input_ids).__name__}; expected a tensor of integers [batch, tokens]: tokenize with "
            'return_tensors="pt"'
        )
    if input_ids.dim() == 2 and not input_ids.numel():
        raise ValueError(NO_PROMPT)
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.long, torch.int):
        raise ValueError(
            f"input_ids must be integers [batch, tokens], got {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
            'tokenize with return_tensors="pt"'
        )


def check_ids(prompts: Sequence[torch.Tensor], vocab_size: int) -> None:
    """Raise ValueError where there is no prompt, or where one holds ids outside the vocabulary."""
    ids = torch.cat(list(prompts)) if prompts else torch.empty(0, device="cpu")
    if not len(ids):
        raise ValueError(NO_PROMPT)
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids hold token id {low if low < 0 else high}, outside the vocabulary of {vocab_size}: "
            "is this the model's own tokenizer?"
        )


def _new_tokens(prompt_tokens: int, config: GenerationConfig) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    assert config.max_length is not None, "merge_settings() sets a budget where there is no length"
    if config.max_length <= prompt_tokens:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and max_length is {config.max_length}, which leaves no room for "
            "a new one; raise max_length or give max_new_tokens"
        )
    return config.max_length - prompt_tokens


def merge_settings(config: GenerationConfig, settings: Mapping[str, Any]) -> GenerationConfig:
    """The generation config with a call's own settings over it; None is off, as in transformers.

    Also as in transformers: ``max_new_tokens``, wherever it is set, counts before ``max_length``, which counts in the
    call where ``max_new_tokens=None`` is given with it; and where no length was set at all, 20 new tokens are decoded.

    Raises:
        NotImplementedError: a setting of the call or of the config that the compiled step does not do.
        TypeError: a setting of the call that nobody knows, by name.
        ValueError: a value out of range.
    """
    check_known(config, settings)
    config.check_usable(settings)
    fields = {field.name for field in dataclasses.fields(config)} - {"other"}
    given = {name: OFF.get(name) if value is None else value for name, value in settings.items() if name in fields}
    lengths = {name: given.pop(name) for name in ("max_new_tokens", "max_length") if name in given}
    length, new = lengths.get("max_length"), lengths.get("max_new_tokens")
    has_no_budget = new is None and (config.max_new_tokens is None or "max_new_tokens" in lengths)
    if has_no_budget and length is None and config.max_length is None:
        new = DEFAULT_NEW_TOKENS
    elif length is not None and not has_no_budget:
        logger.warning(
            "max_length=%d and max_new_tokens=%d are set: the latter counts", length, new or config.max_new_tokens
        )
    if new is not None or has_no_budget:
        given["max_new_tokens"] = new
    if length is not None:
        given["max_length"] = length
    return config.replace(**given)


def check_known(config: GenerationConfig, settings: Iterable[str]) -> None:
    """Raise TypeError where a call has a setting that nobody knows, by name."""
    fields = [field.name for field in dataclasses.fields(config) if field.name != "other"]
    if unknown := sorted(set(settings) - {*fields} - KNOWN):
        raise TypeError(f"generate() does not know {', '.join(unknown)}; it takes {', '.join(fields)} and more")


def inferred_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor | None:
    """The mask of a call without one: as in transformers, pad ids are padding, unless they may be EOS ids too."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        return None
    return input_ids != config.pad_token_id


def unpadded(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Each row from its first token to its last: what a repetition penalty has seen, as in transformers 5.23."""
    if mask is None:
        return list(input_ids)
    places = [row.nonzero().flatten() for row in mask]
    return [ids[at[0] : at[-1] + 1] for ids, at in zip(input_ids, places, strict=True)]


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Each row's tokens ``[tokens]`` without its padding, wherever that is.

    Dropping masked tokens changes nothing for the others: they are never attended, and positions count unmasked
    tokens only.

    Raises:
        ValueError: a mask of another shape, or a row of padding alone.
    """
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )
    rows = [ids[mask != 0] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"row {index} of attention_mask is all zeros: that prompt has no tokens")
    return rows
