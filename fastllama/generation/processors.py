"""What the compiled step does and transformers does not, as processors for transformers' loops.

Shape suffixes: ``b`` rows, ``t`` tokens, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastllama import ops
from fastllama.generation.changes import TokenMask


class CountPenalties:
    """Presence and frequency penalty of tokens that come after the prompt; see :class:`fastllama.GenerationConfig`."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency, self._prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, ids_bt: torch.Tensor, scores_bv: torch.Tensor) -> torch.Tensor:
        new_bt, vocab_size = ids_bt[:, self._prompt_tokens :], scores_bv.shape[1]
        is_token_bt = (new_bt < vocab_size).to(scores_bv.dtype)  # the pad id of a row that has ended may be any number
        counts_bv = torch.zeros_like(scores_bv).scatter_add(1, new_bt.clamp(max=vocab_size - 1), is_token_bt)
        return scores_bv - self._frequency * counts_bv - self._presence * (counts_bv > 0)


class MaskedTokens:
    """The token mask of each row that no EOS id has ended; ``beams`` rows after each other are one."""

    def __init__(self, fill: TokenMask, beams: int, prompt_tokens: int, eos: Sequence[int]) -> None:
        self._fill, self._beams, self._prompt_tokens, self._eos = fill, beams, prompt_tokens, frozenset(eos)

    def __call__(self, ids_bt: torch.Tensor, scores_bv: torch.Tensor) -> torch.Tensor:
        """Mask the scores.

        Raises:
            ValueError: a mask allows nothing.
        """
        allowed = torch.full((ops.token_mask_words(scores_bv.shape[1]),), -1, dtype=torch.int32, device="cpu")
        allowed_bv = torch.ones(scores_bv.shape, dtype=torch.bool, device="cpu")
        for row, (ids_t, allowed_v) in enumerate(zip(ids_bt, allowed_bv, strict=True)):
            if self._eos.intersection(ids_t[self._prompt_tokens :].tolist()):
                continue
            self._fill(row // self._beams, ids_t, allowed.fill_(-1))
            allowed_v.copy_(ops.allowed_by(allowed, len(allowed_v)))
            if not allowed_v.any():
                raise ValueError(f"no token may follow in row {row // self._beams}: its token mask leaves none")
        return scores_bv.masked_fill(~allowed_bv.to(scores_bv.device), -torch.inf)
