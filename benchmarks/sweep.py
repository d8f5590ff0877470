"""Decoding along an axis: batch, live length, cache capacity, precision; each point a comparison of its own.

Every point starts from a released engine, so that it does not depend on what was measured before it (a cache that has
grown stays grown), and passes the same parity gate as a single decode. Points of different capacity should be equally
fast, and they are measured minutes apart: so each takes turns with a second engine that has the axis's first capacity.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.engine.runner import batch_bucket
from fastllama.measure import free_memory, kv_cache_bytes

from .compare import Comparison, compare
from .harness import Run, Workload, reason
from .ours import Engine
from .peers import Places

BATCH, LIVE, CAPACITY, PRECISION = "batch", "live", "capacity", "precision"
QUANTIZATIONS = ("int8", "int4")
DTYPES = ("float32", "bfloat16", "float16")
VALUES: dict[str, tuple[int | str, ...]] = {
    BATCH: (1, 2, 4, 8, 16, 32),
    LIVE: (128, 512, 2048, 8192, 32768),
    CAPACITY: (128, 512, 2048, 8192),
    PRECISION: DTYPES,
}
AXES = tuple(VALUES)
MAX_LIVE = {"cuda": 32768, "cpu": 2048}  # unless asked for: a CPU takes minutes to prefill more

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What is decoded, and how.

    Attributes:
        dtype: of the weights and the cache; None: the checkpoint's.
        quantize: int8, int4 or None.
        batch: rows decoded together.
        prompt_len: tokens of each prompt.
        new_tokens: tokens of each decode.
        capacity: slots of the cache; None: what the engine takes.
    """

    dtype: str | None = None
    quantize: str | None = None
    batch: int = 1
    prompt_len: int = 64
    new_tokens: int = 64
    capacity: int | None = None

    @property
    def live(self) -> int:
        """Tokens in a row's cache half way through the decode."""
        return self.prompt_len + self.new_tokens // 2

    @property
    def precision(self) -> tuple[str | None, str | None]:
        """What decides which weights are loaded."""
        return self.dtype, self.quantize


@dataclass(frozen=True)
class Point:
    """One value of one axis.

    Attributes:
        axis: of AXES.
        value: in place of the setting's own.
        beside: slots of a second engine that takes turns with this point's; None: there is none.
    """

    axis: str
    value: int | str
    beside: int | None = None

    def of(self, base: Setting) -> Setting:
        """The setting with this value in place of its own.

        Raises:
            ValueError: there is no such setting.
        """
        if self.axis == PRECISION:
            name = str(self.value)
            return replace(base, quantize=name) if name in QUANTIZATIONS else replace(base, dtype=name, quantize=None)
        value = int(self.value)
        if self.axis == LIVE:
            prompt_len = value - base.new_tokens // 2
            if prompt_len < 1:
                raise ValueError(f"{base.new_tokens} new tokens leave no prompt for {value} live tokens half way")
            return replace(base, prompt_len=prompt_len)
        return replace(base, batch=value) if self.axis == BATCH else replace(base, capacity=value)


@dataclass(frozen=True)
class Outcome:
    """What came of a point.

    Attributes:
        point: the point.
        comparison: what was measured; None where it failed.
        fields: of its record; None where it failed.
        failure: in one line, why there are no figures.
        is_wrong: whether that is because the outputs failed the parity gate.
    """

    point: Point
    comparison: Comparison | None = None
    fields: dict[str, Any] | None = None
    failure: str = ""
    is_wrong: bool = False


def parse_axes(text: str) -> tuple[str, ...]:
    """The axes of ``all`` or a list like ``batch,live``.

    Raises:
        ValueError: an unknown axis.
    """
    axes = AXES if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    if not axes or (unknown := [axis for axis in axes if axis not in AXES]):
        named = ", ".join(unknown) if axes else repr(text)
        raise ValueError(f"no axis is called {named}; there are {', '.join(AXES)}, and all")
    return axes


def parse_values(axis: str, text: str) -> tuple[int | str, ...]:
    """The values of a list like ``1,4,16``, for the axis that they belong to.

    Raises:
        ValueError: a value that the axis does not have.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    known = (*DTYPES, *QUANTIZATIONS)
    wrong = [
        part for part in parts if (part not in known if axis == PRECISION else not part.isdecimal() or part == "0")
    ]
    if wrong or not parts:
        expected = ", ".join(known) if axis == PRECISION else "whole numbers from 1 on"
        raise ValueError(f"{axis} cannot be {', '.join(wrong) or repr(text)}; expected {expected}")
    return tuple(parts) if axis == PRECISION else tuple(map(int, parts))


def plan(
    axes: Sequence[str],
    values: Mapping[str, Sequence[int | str]],
    base: Setting,
    config: LlamaConfig,
    max_live: int,
) -> list[Point]:
    """The points of some axes, such that each precision is loaded once.

    Args:
        axes: of AXES.
        values: of each axis, in place of its own; taken as they are.
        base: where all axes start.
        config: bounds the live length by what the model was made for.
        max_live: largest live length of the axis's own values.
    """
    after_half = base.new_tokens - base.new_tokens // 2  # decoded at more than the live length
    bound = min(max_live, config.max_position_embeddings - after_half)
    points = []
    for axis in sorted(axes, key=AXES.index):
        own = [value for value in VALUES[axis] if axis != LIVE or int(value) <= bound]
        chosen = values.get(axis, own)
        beside = None
        if axis == CAPACITY:
            beside = next((int(slots) for slots in chosen if int(slots) >= base.prompt_len + base.new_tokens), None)
        points += [Point(axis, value, None if value == beside else beside) for value in chosen]
    return sorted(points, key=lambda point: point.of(base).precision != base.precision)


class Sweep:
    """Measures points, keeping the weights loaded from one to the next.

    Args:
        name: of the model, for the records.
        base: where all axes start; its weights are loaded at once.
        load: gives a model for a dtype and a quantization.
        rounds: timed runs of each contender at each point.
        peers, places: as for :func:`fastllama_benchmarks.compare.compare`.
    """

    def __init__(
        self,
        name: str,
        base: Setting,
        load: Callable[[str | None, str | None], LlamaForCausalLM],
        *,
        rounds: int,
        peers: Sequence[str] = (),
        places: Places | None = None,
    ) -> None:
        self._name, self._load = name, load
        self._rounds, self._peers, self._places = rounds, peers, places
        self._model: LlamaForCausalLM | None = load(*base.precision)
        self.base = replace(base, dtype=_dtype_name(self._model))
        self._loaded = self.base.precision

    def measure(self, point: Point, say: Say = lambda message: None) -> Outcome:
        """Measure one point; whatever goes wrong there is the outcome's ``failure``.

        Args:
            point: of any axis.
            say: told what is about to run.
        """
        try:
            setting = point.of(self.base)
            model = self._model_of(setting, say)
            comparison = self._compare(model, setting, point.beside, say)
            if not comparison.parity.passed:
                return Outcome(point, failure=f"outputs are wrong: {comparison.parity.note}", is_wrong=True)
            return Outcome(point, comparison, self._fields(model, point, setting, comparison))
        except Exception as error:  # one point out of memory, say, does not end the sweep
            return Outcome(point, failure=reason(error))
        finally:
            if self._model is not None:
                self._model.release()

    @property
    def config(self) -> LlamaConfig:
        """Of the model."""
        assert self._model is not None
        return self._model.config

    @property
    def device(self) -> Any:
        """Where the model is."""
        assert self._model is not None
        return self._model.device

    def _model_of(self, setting: Setting, say: Say) -> LlamaForCausalLM:
        if self._model is None or self._loaded != setting.precision:
            say(f"loading {setting.quantize or setting.dtype}")
            self._model = None  # so that the old weights are gone before the new ones come
            gc.collect()
            self._model = self._load(*setting.precision)
            self._loaded = setting.precision
        return self._model

    def _compare(self, model: LlamaForCausalLM, setting: Setting, beside: int | None, say: Say) -> Comparison:
        check_fits(model, setting)
        workload = Workload.random(
            model.config.vocab_size, setting.batch, setting.prompt_len, setting.new_tokens, setting.capacity
        )
        others = [] if beside is None else [AtCapacity(model, beside)]
        try:
            return compare(
                model, workload, rounds=self._rounds, peers=self._peers, places=self._places, others=others, say=say
            )
        finally:
            for other in others:
                other.close()

    def _fields(
        self, model: LlamaForCausalLM, point: Point, setting: Setting, comparison: Comparison
    ) -> dict[str, Any]:
        cache = engine_of(model).cache
        assert cache is not None
        return {
            "model": self._name,
            "dtype": _dtype_name(model),
            "device": str(model.device),
            "quantize": setting.quantize,
            "config": model.config.to_dict(),
            **comparison.to_dict(),
            "sweep": point.axis,
            "sweep_value": point.value,
            "live_tokens": setting.live,
            "slots": cache.max_cache_len,
        }


class AtCapacity:
    """A second engine over the same weights, whose cache has a number of slots of its own.

    Its q/k/v and gate/up matrices are another copy; the rest is shared.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int) -> None:
        self.name = f"{slots} slots"
        self._slots = slots
        with torch.device("meta"):
            twin = LlamaForCausalLM(model.config)
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.tie_weights()
        self._engine = Engine(twin.eval())

    def run(self, workload: Workload) -> Run:
        """Decode once, in that many slots."""
        return self._engine.run(replace(workload, capacity=self._slots))

    def close(self) -> None:
        """Give back the engine's memory."""
        self._engine.close()


def check_fits(model: LlamaForCausalLM, setting: Setting) -> None:
    """Raise ValueError for a setting that its capacity or, on a CPU, the free memory cannot hold.

    A CPU's system would not refuse such an allocation, but end the process once the memory is written to.
    """
    needed = setting.prompt_len + setting.new_tokens
    if setting.capacity is not None and setting.capacity < needed:
        raise ValueError(f"{setting.prompt_len} + {setting.new_tokens} tokens do not fit {setting.capacity} slots")
    nbytes = kv_cache_bytes(model.config, needed, batch_bucket(setting.batch), model.dtype.itemsize)
    if model.device.type == "cpu" and nbytes > free_memory():
        raise ValueError(f"the KV cache takes {nbytes / 1e9:.3g} GB, {free_memory() / 1e9:.3g} GB are free")


def _dtype_name(model: LlamaForCausalLM) -> str:
    return str(model.dtype).removeprefix("torch.")
