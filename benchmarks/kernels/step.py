"""What an operation of a decode step is to its benchmark, and the shapes that decide its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastllama import LlamaConfig
from fastllama.loading.names import resolve

POOL = 1_000_003  # random numbers that tensors are tiled from; prime, so that rows differ

Function = Callable[..., torch.Tensor]
Arguments = tuple[Any, ...]


def _call(function: Function, arguments: Arguments) -> torch.Tensor:
    return function(*arguments)


def _largest_difference(output: torch.Tensor, exact: torch.Tensor) -> float:
    return float((output.double() - exact).abs().max())


@dataclass(frozen=True)
class OpInfo:
    """What is told of an operation.

    Attributes:
        name: in records.
        label: for people.
        shape: of its matrix or cache, for people.
        calls: how often a greedy decode step runs it.
        nbytes: what a call must read, in bytes: weights and live cache, of sampling the logits.
        in_cache: whether a step has just written what it reads, so that it comes from a processor's cache.
    """

    name: str
    label: str
    shape: str
    calls: int
    nbytes: int
    in_cache: bool = False


@dataclass(frozen=True)
class StepOp:
    """One operation of a decode step, with its arguments.

    Attributes:
        info: what is told of it.
        shared: arguments that are the same for all layers: activations, small tables.
        own: arguments of which each layer has its own; functions take them after the shared ones.
        run: what the step runs.
        references: what it is measured against; the first is the same formula in torch operators.
        exact: the result in float64, of the same arguments.
        results: calls a function for the check, so that everything it computes is in one tensor and nothing is kept.
        error: how far such a result lies from the exact one.
    """

    info: OpInfo
    shared: Arguments
    own: Arguments
    run: Function
    references: Mapping[str, Function]
    exact: Function
    results: Callable[[Function, Arguments], torch.Tensor] = field(default=_call)
    error: Callable[[torch.Tensor, torch.Tensor], float] = field(default=_largest_difference)

    @property
    def arguments(self) -> Arguments:
        """All of them, in the order in which functions take them."""
        return (*self.shared, *self.own)


@dataclass(frozen=True)
class Shapes:
    """What decides the shapes of a step's operations.

    Attributes:
        model: its name.
        config: of the model; its dtype is that of weights and cache.
        batch: rows decoded together.
        live: tokens that each row attends, the new one included.
        capacity: slots of the cache.
        device: where everything lives.
    """

    model: str
    config: LlamaConfig
    batch: int
    live: int
    capacity: int
    device: torch.device

    @classmethod
    def of(
        cls,
        model: str,
        dtype: str | None = None,
        device: torch.device | str = "cpu",
        *,
        batch: int = 1,
        live: int = 512,
        capacity: int | None = None,
    ) -> Shapes:
        """The shapes of a model by name; reads its config and not its weights.

        Args:
            model: as for :func:`fastllama.loading.names.resolve`.
            dtype: in place of the checkpoint's.
            device: where to put everything.
            batch, live: see Shapes.
            capacity: slots; as many as are live when None.

        Raises:
            ValueError: there is no such model or dtype, or the live tokens do not fit the capacity.
        """
        config = resolve(model).config
        if dtype is not None:
            config = config.replace(dtype=dtype)
        slots = live if capacity is None else capacity
        if not 1 <= live <= slots:
            raise ValueError(f"{live} live tokens do not fit a cache of {slots} slots; give a larger capacity")
        where = torch.empty(0, device=device).device  # with its index, as a model's
        return cls(model, config, batch, live, slots, where)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return getattr(torch, self.config.dtype)

    def describe(self) -> dict[str, Any]:
        """The fields of a record that say what was measured."""
        return {
            "model": self.model,
            "dtype": self.config.dtype,
            "device": str(self.device),
            "quantize": None,
            "config": self.config.to_dict(),
            "batch": self.batch,
            "live": self.live,
            "capacity": self.capacity,
        }

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Normal numbers, the same ones for the same arguments."""
        pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).mul_(scale)
        count = math.prod(shape)
        tiled = pool.to(self.device, self.dtype).repeat(-(-count // POOL))
        return tiled[:count].reshape(shape).clone()


def nbytes(tensors: Arguments) -> int:
    """Bytes of those arguments that there are."""
    return sum(x.nbytes for x in tensors if x is not None)
