"""What slots hold between calls: tokens whose keys and values are in the KV cache, so that none is computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch

LEAST_REUSED = 16  # tokens: fewer are not worth it that another kernel computes what follows, and rounds otherwise


class Found(NamedTuple):
    """The beginning of a prompt, in a slot."""

    slot: int
    tokens: int


class Prefixes:
    """The tokens that slots hold, as far as they have been computed with the weights as they are.

    Args:
        weights: to notice that they were edited in place.
    """

    def __init__(self, weights: WeightsWatch) -> None:
        self._weights = weights
        self._held: dict[int, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, tokens: Mapping[int, torch.Tensor]) -> None:
        """Note what slots hold: int64 ``[tokens]`` on the CPU for each."""
        self._held |= tokens

    def weights_stayed(self) -> bool:
        """Whether the weights are as they were when the session began, as far as a glance shows."""
        return self._weights.note()

    @property
    def first_tokens(self) -> dict[int, int]:
        """The first token of each slot that holds some."""
        return {slot: int(tokens[0]) for slot, tokens in self._held.items()}

    def drop(self, slots: Iterable[int]) -> None:
        """Forget slots, which are about to be written."""
        for slot in slots:
            self._held.pop(slot, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def follow_weights(self) -> None:
        """Forget what was computed with other weights, as far as a glance at them shows."""
        if self._weights.edited(thoroughly=False):
            self.clear()

    def find(self, prompts: Mapping[int, torch.Tensor], least: int, thoroughly: bool) -> dict[int, Found]:
        """Where the longest beginnings of some prompts are held, of at least ``least`` tokens.

        The last token of a prompt is never among them: something has to be computed for what follows it.

        Args:
            prompts: by the slot that each is to be in, which is preferred; int64 ``[tokens]`` on the CPU.
            least: number of tokens below which a beginning does not count.
            thoroughly: look at the weights thoroughly before anything counts.
        """
        if not self._held:
            return {}
        found = {slot: best for slot, prompt in prompts.items() if (best := self._best(slot, prompt)).tokens >= least}
        if found and thoroughly and self._weights.edited(thoroughly=True):
            self.clear()
            return {}
        return found

    def _best(self, own: int, prompt: torch.Tensor) -> Found:
        wanted, best = prompt[:-1], Found(own, 0)
        for slot in sorted(self._held, key=lambda slot: slot != own):
            if (count := _common(self._held[slot], wanted)) > best.tokens:
                best = Found(slot, count)
            if best.tokens == len(wanted):
                break
        return best


class WeightsWatch:
    """Notices that weights were edited in place, by their versions and by samples of what they are.

    What is written through ``tensor.data`` leaves no trace but the values: a glance looks at the beginning of each
    tensor, a thorough look at one number of every row and at one whole row.

    Args:
        parameters: whose versions count.
        tensors: the memory that holds them.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
        self._parameters = [x for x in parameters if not x.is_inference()]
        watched = [x.detach() for x in tensors if x.numel() and x.is_contiguous()]
        self._begins = _by_dtype(x.view(-1)[:32] for x in watched)
        rows = [x.view(-1, x.shape[-1] if x.dim() else 1) for x in watched]
        self._parts = _by_dtype(part for x in rows for part in (x[len(x) // 2], x[:, x.shape[1] // 2]))
        self._glance: Sample | None = None
        self._look: Sample | None = None

    def note(self) -> bool:
        """Look at the weights thoroughly where none are noted; False where they are others than at the last glance."""
        if not _same(self._sample(self._begins), self._glance):
            self._look = None
            return False
        if self._look is None:
            self._look = self._sample(self._parts)
        return True

    def edited(self, thoroughly: bool) -> bool:
        """Whether the weights are others than at the last glance, or than at the last thorough look if this is one."""
        glance = self._sample(self._begins)
        changed = not _same(glance, self._glance)
        if thoroughly and not changed:
            look = self._sample(self._parts)
            changed, self._look = self._look is not None and not _same(look, self._look), look
        self._glance = glance
        if changed:
            self._look = None
        return changed

    def _sample(self, views: Iterable[list[torch.Tensor]]) -> Sample:
        versions = [torch.tensor([x._version for x in self._parameters], device="cpu")]
        return versions + [torch.cat(of_one_dtype) for of_one_dtype in views]


def first_of_equals(prompts: Mapping[int, torch.Tensor]) -> dict[int, int]:
    """For each slot whose prompt an earlier one has too, the first that has it."""
    same: dict[tuple[int, ...], list[int]] = {}
    for slot, prompt in prompts.items() if len(prompts) > 1 else ():
        same.setdefault(tuple(prompt.tolist()), []).append(slot)
    return {slot: slots[0] for slots in same.values() for slot in slots[1:]}


Sample: TypeAlias = list[torch.Tensor]


def _same(now: Sample, before: Sample | None) -> bool:
    # As bytes, for a NaN is like itself.
    return before is not None and all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(now, before, strict=True)
    )


def _by_dtype(views: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for view in views:
        groups.setdefault(view.dtype, []).append(view)
    return list(groups.values())


def _common(held: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many first tokens are the same."""
    count = min(len(held), len(wanted))
    if torch.equal(held[:count], wanted[:count]):
        return count
    return int((held[:count] != wanted[:count]).int().argmax())
