"""GenerationConfig: a dataclass read from ``generation_config.json``.

Nothing in a file keeps a checkpoint from loading. What the compiled step does not do is kept for ``generate()``, which
does it outside the step; what nobody knows is kept and named in a warning; keys that cannot change what comes out are
left out.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllama.config.fields import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    plain_eos,
    plain_id,
    read_json,
    shortened,
    tolerate,
    write_json,
)
from fastllama.config.keys import text_part
from fastllama.config.settings import (
    CHECKS,
    KNOWN,
    LISTS,
    NEUTRAL,
    NOT_IN_TRANSFORMERS,
    OFF,
    OUTSIDE_THE_STEP,
    SAMPLING_FIELDS,
    WARPERS,
    said,
    set_of,
)
from fastllama.config.tokens import bias_items, plain_numbers


@dataclasses.dataclass(init=False)
class GenerationConfig:
    """How ``generate()`` picks tokens and when it stops. Fields and defaults are those of transformers, plus ``seed``.

    Fields can be set, and are checked then too. What transformers' object has besides them can be read and set under
    its name as well, and is kept in ``other``.

    Args:
        max_length: maximum number of tokens, prompt included; None where nothing says.
        max_new_tokens: maximum number of new tokens; wins over ``max_length`` where both are set.
        do_sample: sample, instead of taking the most likely token.
        temperature: divides the logits before sampling.
        top_k: sample from the k most likely tokens; 0 or -1 for all.
        top_p: sample from the most likely tokens whose probabilities add up to p; 1.0 for all.
        min_p: sample from tokens with at least this fraction of the most likely token's probability.
        typical_p: sample from the tokens of the most typical surprise whose probabilities add up to p; 1.0 for all.
        repetition_penalty: divides positive logits of tokens that prompt and new tokens have, and multiplies others.
        presence_penalty, frequency_penalty: of OpenAI's API: what is subtracted from the logit of a token that the new
            tokens have, once and for each time; transformers has no such fields.
        no_repeat_ngram_size: no n-gram of this size comes twice, the prompt's included; 0 for none.
        sequence_bias: what is added to the logit of the last token of a sequence where the row ends with the others:
            ``{(tokens): value}`` or ``[[[tokens], value]]``.
        bad_words_ids: sequences that never come.
        suppress_tokens, begin_suppress_tokens: tokens that never come, or not as the first new one.
        forced_bos_token_id: the first new token after a prompt of one token.
        forced_eos_token_id: the last token before the limit, one or one of several.
        min_new_tokens: minimum number of new tokens before an EOS id; counts before ``min_length``.
        min_length: minimum number of tokens before an EOS id, prompt included.
        num_return_sequences: rows for each prompt, where rows are sampled.
        eos_token_id: ids that end a row: an int, several, or None; held as a tuple.
        pad_token_id: fills rows that ended early.
        bos_token_id: the id that begins a text; not used in decoding.
        seed: makes sampling reproducible; transformers has no such field.
        other: what else is set, by key: settings that ``generate()`` does outside the compiled step or does not know,
            and values that are out of range. They matter to the calls that would use them only.

    Raises:
        ValueError: a value out of range; the message has the field, the value and what was expected.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    sequence_bias: Any = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    num_return_sequences: int = 1
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    seed: int | None = None
    other: Mapping[str, Any] = dataclasses.field(default=None)  # type: ignore[assignment]

    def __init__(self, *, other: Mapping[str, Any] | None = None, **values: Any) -> None:
        if unknown := sorted(values.keys() - KNOWN - self.__dataclass_fields__.keys()):
            raise TypeError(f"a GenerationConfig has no field {', '.join(unknown)}")
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        self.__dict__.update(plain | {"other": dict(other or {}), "_set": set()})
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in KNOWN:
            value, name = {**self.other, name: value}, "other"
        elif name not in self.__dataclass_fields__:
            raise AttributeError(f"a GenerationConfig has no field {name!r}")
        else:
            self._set.add(name)
        super().__setattr__(name, _checked(name, value))

    def __getattr__(self, name: str) -> Any:
        if name not in KNOWN:
            raise AttributeError(f"a GenerationConfig has no field {name!r}")
        return self.other.get(name, NEUTRAL.get(name))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], strict: bool = False) -> GenerationConfig:
        """Read the object of a ``generation_config.json``; null means the default of a field.

        Args:
            config: the object.
            strict: refuse what is otherwise kept in ``other`` with a warning.

        Raises:
            ValueError: under ``strict`` only.
        """
        values = {key: value for key, value in config.items() if value is not None}
        names = {field.name for field in dataclasses.fields(cls)} - {"other"}
        outside = set_of(NEUTRAL, values)
        unknown = {key: values[key] for key in values.keys() - names - KNOWN}
        problems = {key: _problem_of(key, values[key]) for key in sorted(names & values.keys())}
        wrong = {key: values[key] for key, problem in problems.items() if problem}
        other = outside | unknown | wrong
        what = [f"{key}={shortened(repr(unknown[key]), 100)} is unknown" for key in sorted(unknown)]
        what += [problem for problem in problems.values() if problem]
        if what:
            tolerate(f"{'; '.join(what)}: kept, for calls that would use it", strict)
        return cls(**{key: values[key] for key in names & values.keys() - other.keys()}, other=other)

    def left_to_loops(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a call sets, or else this config, that no compiled step does.

        Args:
            given: the call's own settings, which count instead; None is off.
        """
        outside = set_of(OUTSIDE_THE_STEP, {**self.other, **given})
        if not given.get("do_sample", self.do_sample):
            outside = {name: value for name, value in outside.items() if name not in WARPERS}
        return outside

    def check_usable(self, given: Mapping[str, Any]) -> None:
        """Check what a call of the compiled step would use of ``other``.

        Args:
            given: the call's own settings, which count instead; None is off.

        Raises:
            NotImplementedError: a setting that would change the output and that the step does not do.
            ValueError: a value out of range.
        """
        kept = {key: value for key, value in self.other.items() if key not in given}
        used = {field.name for field in dataclasses.fields(self)} - {"other", "bos_token_id"}
        if not given.get("do_sample", self.do_sample):
            used -= {*SAMPLING_FIELDS}
        if {"max_new_tokens", "max_length"} & given.keys() or self.max_new_tokens is not None:
            used -= {"max_new_tokens", "max_length"}
        for key, value in kept.items():
            if key in used:
                raise ValueError(f"generation config: {_problem_of(key, value)}; give {key} to generate()")
        if outside := self.left_to_loops(given):
            neutral = ", ".join(f"{key}={OUTSIDE_THE_STEP[key]!r}" for key in outside)
            raise NotImplementedError(f"the compiled step does not do {said(outside)}; pass {neutral} to go without")

    @classmethod
    def from_hf(cls, config: Any) -> GenerationConfig:
        """Read a transformers generation config object, through its ``to_dict()``."""
        return cls.from_dict({key: value for key, value in config.to_dict().items() if not key.startswith("_")})

    def under(self, config: Any) -> GenerationConfig:
        """A call's own config, ours or transformers'; what it does not set is this one's.

        Raises:
            TypeError: it is neither.
        """
        if config is None:
            return self
        if isinstance(config, GenerationConfig):
            own = {name: getattr(config, name) for name in config._set}
            return self.replace(**own, other={**self.other, **config.other})
        if not hasattr(config, "to_dict"):
            raise TypeError(f"generation_config is a {type(config).__name__}; expected a GenerationConfig")
        set_there = getattr(config, "to_diff_dict", config.to_dict)()
        given = {key: value for key, value in set_there.items() if value is not None}
        return GenerationConfig.from_dict(self.to_dict() | given)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], strict: bool = False) -> GenerationConfig:
        """Read ``generation_config.json`` of a checkpoint folder.

        Without that file, or where it is not JSON, the generation settings in ``config.json`` are read, as in
        transformers: special token ids and what older checkpoints put there. Without either file, the defaults.

        Raises:
            ValueError: a file that is not JSON; what :meth:`from_dict` raises, with the file's name before the message.
        """
        file, values = Path(folder) / GENERATION_CONFIG_NAME, None
        if file.is_file():
            try:
                values = read_json(file)
            except ValueError as error:
                tolerate(f"{error}: left out", strict)
        if values is None and (file := Path(folder) / CONFIG_NAME).is_file():
            known = {field.name for field in dataclasses.fields(cls)} | set(OUTSIDE_THE_STEP)
            content = read_json(file)
            values = {key: value for key, value in (text_part(content) or content).items() if key in known}
        values = values or {}
        try:
            return cls.from_dict(values, strict)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the object of a ``generation_config.json``: the fields that are set, as transformers spells them."""
        config = dataclasses.asdict(self)
        config |= config.pop("other")
        eos = list(self.eos_token_id)
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        if self.sequence_bias is not None:
            config["sequence_bias"] = [[list(tokens), value] for tokens, value in bias_items(self.sequence_bias)]
        unset = {name for name in NOT_IN_TRANSFORMERS if config[name] == self.__dataclass_fields__[name].default}
        return {key: value for key, value in config.items() if value is not None and key not in unset}

    def to_diff_dict(self) -> dict[str, Any]:
        """What has been set, as :meth:`to_dict` spells it."""
        return {key: value for key, value in self.to_dict().items() if key in self._set or key in self.other}

    def update(self, **values: Any) -> dict[str, Any]:
        """Set fields; returns what is no field, as in transformers."""
        known = {key for key in values if key in KNOWN or key in self.__dataclass_fields__}
        for key in known:
            setattr(self, key, values[key])
        return {key: value for key, value in values.items() if key not in known}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``generation_config.json`` into ``folder``, which is created if needed."""
        write_json(Path(folder) / GENERATION_CONFIG_NAME, self.to_dict())

    def replace(self, **changes: Any) -> GenerationConfig:
        """Return a copy with some fields changed; what ``other`` holds of them goes."""
        new = copy.copy(self)
        other = changes.pop("other", {key: value for key, value in self.other.items() if key not in changes})
        new.__dict__.update({"other": dict(other), "_set": set(self._set)})
        for name, value in changes.items():
            setattr(new, name, value)
        return new


def _checked(name: str, value: Any) -> Any:
    """The value of a field as it is held.

    Raises:
        ValueError: it is out of range.
    """
    if name == "eos_token_id":
        eos = plain_eos(value)
        return () if eos is None else (eos,) if isinstance(eos, int) else eos
    value = plain_numbers(value)
    if name in ("bos_token_id", "pad_token_id", "forced_bos_token_id"):
        value = plain_id(value)
    if name in ("suppress_tokens", "begin_suppress_tokens") and isinstance(value, (list, tuple)):
        value = [token for token in value if token != -1]  # which means none
    if name == "top_k" and value == -1:
        value = 0
    if name in LISTS and isinstance(value, (list, tuple, dict)) and not value:  # which asks for nothing
        return None
    if name in CHECKS and (value is not None or name in OFF):
        CHECKS[name](name, value)
    return value


def _problem_of(name: str, value: Any) -> str | None:
    """What is wrong with the value of a field, or None."""
    try:
        GenerationConfig(**{name: value})
    except ValueError as error:
        return str(error)
    return None
