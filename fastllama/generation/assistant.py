"""Drafts by a second, smaller model (arXiv 2211.17192), whose engine has a slot for each row of the call.

It samples as the row does, from the same seed at the same positions. So where both models find the same tokens likely
they sample the same one, and a draft comes true as often at any temperature as the two agree.

Shape suffixes: ``b`` rows, ``t`` tokens, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastllama import ops
from fastllama.engine.row import Sampling
from fastllama.engine.runner import Runner
from fastllama.engine.steps import VERIFY_TOKENS
from fastllama.generation.lookup import Draft
from fastllama.generation.request import Request

CLASSES = (0.2, 0.4, 0.6, 0.8, 0.95)  # bounds between probabilities of one hit rate


class AssistantSource:
    """Drafts for the rows of a call by another model.

    Args:
        runner: of that model, held by the caller and used for nothing else meanwhile.
        requests: the rows.
        threshold: a draft ends before a token that the other model finds less probable than that.
    """

    classes = len(CLASSES) + 1
    is_free = False

    def __init__(self, runner: Runner, requests: Sequence[Request], threshold: float) -> None:
        self._runner, self._threshold, self.key = runner, threshold, id(runner)
        self._texts = [request.prompt.tolist() for request in requests]
        self._written = [0] * len(requests)  # first tokens of each text that are in its cache
        self._ahead: list[list[int]] = [[] for _ in requests]  # drafted tokens that are there, too
        params = {
            name: torch.tensor([getattr(request.sampling, name) for request in requests], device=runner.device)
            for name in Sampling._fields
        }
        self._params = ops.SamplingParams(
            **{name: value.float() if value.is_floating_point() else value for name, value in params.items()}
        )

    def draft(self, going: Sequence[int], count: int) -> Mapping[int, Draft]:
        """Drafts of at most ``count`` tokens for rows, by number."""
        with self._runner.launching():
            return self._draft(going, count)

    def _draft(self, going: Sequence[int], count: int) -> dict[int, Draft]:
        runner, rows = self._runner, len(self._texts)
        lengths_b = torch.tensor([len(text) for text in self._texts], device=runner.device)
        needed = int(lengths_b.max()) + count
        runner.reserve(rows, needed if runner.cache else max(needed, runner.default_cache_len))
        logits_bv = self._catch_up()
        drafted, probabilities = list[torch.Tensor](), list[torch.Tensor]()
        for ahead in range(count):
            if ahead:
                logits_bv = runner.write(drafted[-1][:, None], (lengths_b + ahead - 1)[:, None])[:, 0]
            drafted.append(ops.sample(logits_bv.contiguous(), self._params, lengths_b + ahead))
            probabilities.append(logits_bv.float().softmax(dim=-1).gather(1, drafted[-1][:, None])[:, 0])
            if not runner.runs_ahead and bool((probabilities[-1][[*going]] < self._threshold).all()):
                break
        ids_bt, probability_bt = torch.stack(drafted, dim=1).tolist(), torch.stack(probabilities, dim=1).tolist()
        self._ahead = [ids[:-1] for ids in ids_bt]
        found = {}
        for row in going:
            sure = next((at for at, p in enumerate(probability_bt[row]) if p < self._threshold), len(ids_bt[row]))
            classes = [sum(p >= bound for bound in CLASSES) for p in probability_bt[row][:sure]]
            if sure:
                found[row] = Draft(ids_bt[row][:sure], classes)
        return found

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Let a row go on."""
        ahead, self._ahead[number] = self._ahead[number], []
        for token, drafted in zip(tokens, ahead, strict=False):
            if token != drafted:
                break
            self._written[number] += 1
        self._texts[number] += tokens
        self._written[number] = min(self._written[number], len(self._texts[number]) - 1)  # what follows is asked for

    def close(self) -> None:
        """Let the next call go on from what this one has computed."""
        self._runner.hold_texts(
            [torch.tensor(text[:n], device="cpu") for text, n in zip(self._texts, self._written, strict=True)]
        )

    def _catch_up(self) -> torch.Tensor:
        """Compute what is not in the cache yet; logits ``[b, v]`` of what follows each row."""
        missing = max(len(text) - n for text, n in zip(self._texts, self._written, strict=True))
        began, lengths = all(self._written), [len(text) for text in self._texts]
        if began and missing <= VERIFY_TOKENS[-1] and missing <= min(lengths):
            ids_bt = torch.tensor([text[-missing:] for text in self._texts], device="cpu")
            first_b1 = torch.tensor([[length - missing] for length in lengths], device="cpu")
            logits_bv = self._runner.write(ids_bt, first_b1 + torch.arange(missing, device="cpu"))[:, -1]
        else:
            texts = [torch.tensor(text, device="cpu") for text in self._texts]
            logits_bv = self._runner.logits_after(texts, goes_on=began)
        self._written = lengths
        return logits_bv
