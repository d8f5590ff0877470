"""``fastllama bench``: decoding speed beside the eager forward, transformers and the floor."""

from __future__ import annotations

from typing import Annotated

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stderr, stdout, versions, write_json
from fastllama.cli.table import comparison_table


def bench(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, which is random.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed decodes of each.")] = 3,
    transformers: Annotated[bool, typer.Option(help="Run transformers' generate too.")] = True,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Decode one sequence greedily with fastllama, its eager forward and transformers by turns."""
    with errors_in_one_line(debug):
        import torch

        from fastllama.compare import EAGER, TRANSFORMERS, compare

        loaded = options.load(model, dtype, device, quantize, quiet)
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(loaded.model.config.vocab_size, (1, prompt_len), generator=random)
        with progress(quiet) as say:
            comparison = compare(
                loaded.model,
                prompt.to(loaded.model.device),
                new_tokens,
                rounds=rounds,
                peers=(EAGER, TRANSFORMERS) if transformers else (EAGER,),
                on_start=lambda what: say(f"measuring: {what}"),
            )
        (stderr() if json_file == "-" else stdout()).print(comparison_table(comparison))
        if json_file:
            settings = {"batch": 1, "prompt_len": prompt_len, "new_tokens": new_tokens, "rounds": rounds}
            record = loaded.describe() | settings | comparison.to_dict() | {"environment": versions()}
            write_json(record, json_file)
