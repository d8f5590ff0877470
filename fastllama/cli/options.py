"""The options that commands share, and what is made of them: a loaded model and sampling arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from fastllama.causal_lm import LlamaForCausalLM

DEFAULT_NEW_TOKENS = 128

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A folder, a hub id, demo, or random:SHAPE as random:llama-3.2-1b."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the checkpoint's own.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; else cuda if there is one.")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4: weight-only quantization.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", min=1, help=f"At most so many; else {DEFAULT_NEW_TOKENS}."),
]
Sample = Annotated[
    bool | None,
    typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else the checkpoint's."),
]
Temperature = Annotated[float | None, typer.Option(help="Sample; above 1 flatter, below 1 sharper.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample among the k likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up p.")]
MinP = Annotated[float | None, typer.Option(help="Sample among tokens at least p times as likely as the best.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling; the same seed writes the same text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no statistics.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's log.")]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON to a file; - is stdout."),
]


def sampling_arguments(
    sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """The arguments of ``generate`` that were given; any that shapes sampling asks for sampling.

    Raises:
        typer.BadParameter: one of them was given together with ``--greedy``.
    """
    shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in shaping.items() if value is not None}
    if given and sample is False:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"--greedy takes the likeliest token: leave out {names}")
    if given or sample is not None:
        given["do_sample"] = sample is not False
    return given | ({} if seed is None else {"seed": seed})


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the name they were asked for by."""

    name: str
    model: LlamaForCausalLM
    tokenizer: Any

    def describe(self) -> dict[str, str]:
        """Name, dtype and device, for records."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model": self.name, "dtype": dtype, "device": str(self.model.device)}

    def budget(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Tokens to write: as many as asked for, else the default or what the context has room for."""
        room = self.model.config.max_position_embeddings - prompt_tokens
        return max_new_tokens or (min(DEFAULT_NEW_TOKENS, room) if room > 0 else DEFAULT_NEW_TOKENS)


def pick_device(device: str | None) -> str:
    """The device asked for, else CUDA where there is one, else the CPU."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str, dtype: str | None, device: str | None, quantize: str | None, quiet: bool) -> Loaded:
    """Load a model and its tokenizer."""
    from fastllama import LlamaForCausalLM, load_tokenizer

    model = LlamaForCausalLM.from_pretrained(
        name, dtype=dtype, device=pick_device(device), quantize=quantize, progress=not quiet
    )
    return Loaded(name, model, load_tokenizer(name))
