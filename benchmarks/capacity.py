"""Does a decode step cost what is in the cache, or what the cache could hold?

    python benchmarks/capacity.py --model random:llama-3.2-1b --live 64

Times decode steps around the same live length in engines of different capacities, over equal weights, by turns
(A B B A …), and prints the time per token of each and its ratio to the first. Exits with 1 if their tokens differ.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from fastllama import LlamaForCausalLM
from fastllama.compare import interleave
from fastllama.measure import Decode, Stopwatch, quantiles


def main(
    model: Annotated[str, typer.Option(help="As for fastllama bench.")] = "random:llama-3.2-1b",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    live: Annotated[int, typer.Option(min=16, help="Tokens in the cache, half way through the timed steps.")] = 64,
    capacities: Annotated[str, typer.Option(help="Slots of each engine, the reference first.")] = "128,8192",
    new_tokens: Annotated[int, typer.Option(min=2, help="Timed steps of each decode.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Time the same decode in engines of different capacities."""
    contenders, prompt = {}, None
    for slots in [int(text) for text in capacities.split(",")]:
        loaded = LlamaForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.warmup(max_cache_len=slots)
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(loaded.config.vocab_size, (1, live - new_tokens // 2), generator=random)
        contenders[str(slots)] = lambda loaded=loaded, prompt=prompt: _decode(loaded, prompt, new_tokens)
    decodes = interleave(contenders, rounds)
    figures = {
        slots: asdict(quantiles([1e3 * gap for decode in runs for gap in decode.tpot]))
        for slots, runs in decodes.items()
    }
    reference = next(iter(figures.values()))["p50"]
    for slots, ms in figures.items():
        typer.echo(
            f"{slots:>8} slots: {ms['p50']:.2f} ms a token (p20 {ms['p20']:.2f}, p80 {ms['p80']:.2f}), "
            f"{ms['p50'] / reference:.3f} x"
        )
    same = len({decode.tokens for runs in decodes.values() for decode in runs}) == 1
    typer.echo(json.dumps({"model": model, "dtype": dtype, "live": live, "tpot_ms": figures, "parity": same}))
    raise typer.Exit(0 if same else 1)


def _decode(model: LlamaForCausalLM, prompt: torch.Tensor, new_tokens: int) -> Decode:
    watch = Stopwatch(model.stream(prompt, max_new_tokens=new_tokens, eos_token_id=()))
    for _ in watch:
        pass
    return watch.decode


if __name__ == "__main__":
    typer.run(main)
