"""One streamed answer to a prompt, for ``generate`` and ``chat``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllama.cli.console import progress

if TYPE_CHECKING:
    from fastllama.cli.options import Loaded
    from fastllama.generation.known import DraftCounts
    from fastllama.measure import Decode


@dataclass(frozen=True)
class Reply:
    """An answer of the model.

    Attributes:
        prompt_ids: the prompt's token ids.
        text: the new text; it ends with an incomplete character only if the model stopped inside one.
        decode: the new tokens and their timing.
        interrupted: whether Ctrl-C ended it.
        counts: what has come of drafts; None where none were asked for.
    """

    prompt_ids: tuple[int, ...]
    text: str
    decode: Decode
    interrupted: bool = False
    counts: DraftCounts | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first token; 0 where there was no second."""
        spent = sum(self.decode.tpot)
        return len(self.decode.tpot) / spent if spent else 0.0

    def speed(self) -> str:
        """One line about the speed."""
        count = len(self.decode.tokens)
        if not count:
            return "no tokens"
        line = f"{count} tokens, the first after {self.decode.ttft:.2f} s"
        line = f"{line}, then {self.tokens_per_second:.1f} a second" if count > 1 else line
        return f"{line}, {self.counts.tokens_per_step:.2f} a step" if self.counts else line

    @property
    def drafts(self) -> str:
        """One line on what has come of drafts; empty where none were asked for."""
        if self.counts is None:
            return ""
        shares = ", ".join(f"{share:.0%}" for share in self.counts.acceptance if share is not None)
        accepted = f"drafted tokens that came true, by place: {shares}" if shares else "nothing was drafted"
        return f"{self.counts.tokens_per_step:.2f} tokens a step; {accepted}"

    def timing(self) -> dict[str, Any]:
        """The speed as figures, for records."""
        found: dict[str, Any] = {
            "ttft_ms": 1e3 * self.decode.ttft,
            "tpot_ms": 1e3 / self.tokens_per_second if self.tokens_per_second else 0.0,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.counts:
            found |= {"tokens_per_step": self.counts.tokens_per_step, "acceptance": self.counts.acceptance}
        return found


def stream_reply(
    loaded: Loaded,
    prompt_ids: Sequence[int],
    show: Callable[[str], None],
    *,
    quiet: bool,
    stop_on_interrupt: bool = False,
    **arguments: Any,
) -> Reply:
    """Let the model continue a prompt.

    Args:
        loaded: model and tokenizer.
        prompt_ids: token ids of the prompt.
        show: called with each piece of text as soon as it is complete.
        quiet: show no progress while the engine compiles.
        stop_on_interrupt: on Ctrl-C end the answer instead of raising KeyboardInterrupt.
        arguments: passed to ``model.stream``.
    """
    import torch

    from fastllama.measure import Stopwatch

    pieces: list[str] = []
    interrupted = False
    detokenizer = loaded.tokenizer.detokenizer()
    detokenizer.put(list(prompt_ids))  # the new text depends on what it follows: a leading space is kept
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.long, device=loaded.model.device)
    before = loaded.model.draft_counts
    tokens: Any = loaded.model.stream(input_ids, num_return_sequences=1, **arguments)
    with closing(tokens) as stream, progress(quiet) as say:
        watch = Stopwatch(stream)
        try:
            for token in watch:
                say("")
                pieces.append(detokenizer.put(token))
                show(pieces[-1])
        except KeyboardInterrupt:
            if not stop_on_interrupt:
                raise
            interrupted = True
    pieces.append(detokenizer.end())
    show(pieces[-1])
    drafts = loaded.model.draft_counts.since(before)
    counts = drafts if drafts.steps else None
    return Reply(tuple(prompt_ids), "".join(pieces), watch.decode, interrupted, counts)
