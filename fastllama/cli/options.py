"""The options that commands share, and what they become: a loaded model and sampling arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch takes seconds to import; --help and wrong usage answer without it
    from fastllama.causal_lm import LlamaForCausalLM

DEFAULT_NEW_TOKENS = 128
CHECKPOINT_SETTING = "the checkpoint's setting"

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder, GGUF file, Hugging Face id, demo, or random:SHAPE such as random:llama-3.2-1b."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.", show_default="the checkpoint's"),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="Scheme to quantize to while loading: int8 or int4, or none to write codes out.",
        show_default="as stored",
    ),
]
KVCacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="Dtype of the KV cache: int8, or auto for the weights' dtype.",
        show_default="auto",
    ),
]
Device = Annotated[str | None, typer.Option(help="Device: cpu or cuda.", show_default="cuda if available")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", "-n", min=1, help="Maximum number of new tokens.", show_default=f"{DEFAULT_NEW_TOKENS}"
    ),
]
Sample = Annotated[
    bool | None,
    typer.Option("--sample/--greedy", help="Sampling or greedy decoding.", show_default=CHECKPOINT_SETTING),
]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature.", show_default=CHECKPOINT_SETTING)]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of most likely tokens to sample from; 0 for all.", show_default=CHECKPOINT_SETTING
    ),
]
TopP = Annotated[
    float | None, typer.Option(help="Nucleus (top-p) sampling threshold.", show_default=CHECKPOINT_SETTING)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Minimum probability, relative to the most likely token's.", show_default=CHECKPOINT_SETTING),
]
Seed = Annotated[int | None, typer.Option(help="Random seed of the sampling.", show_default="a new one each time")]
Speculate = Annotated[bool, typer.Option("--speculate", help="Several tokens a step where they can be guessed.")]
AssistantModel = Annotated[
    str | None,
    typer.Option("--assistant-model", metavar="NAME", help="Smaller model that guesses them.", show_default="none"),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse what a checkpoint has and a Llama does not use, instead of warning.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress messages, no statistics.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks and the library's log.")]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="JSON file for the results; - for stdout.", show_default="none"),
]


def sampling_arguments(
    sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """The arguments for ``model.generate``; any of temperature, top-k, top-p and min-p turns sampling on.

    A temperature of 0 is greedy decoding, as it is in servers' interfaces.

    Raises:
        typer.BadParameter: one of them was given together with ``--greedy``.
    """
    shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in shaping.items() if value is not None}
    if temperature == 0 and not sample:
        given, sample = {}, False
    if given and sample is False:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"--greedy takes the most likely token: leave out {names}")
    if given or sample is not None:
        given["do_sample"] = sample is not False
    return given | ({} if seed is None else {"seed": seed})


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the name they were loaded by."""

    name: str
    model: LlamaForCausalLM
    tokenizer: Any

    def describe(self) -> dict[str, str]:
        """Name, dtype and device, for records."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model": self.name, "dtype": dtype, "device": str(self.model.device)}

    def budget(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Number of new tokens: what was asked for, or else the default, or less where the context has less room."""
        room = self.model.config.max_position_embeddings - prompt_tokens
        return max_new_tokens or (min(DEFAULT_NEW_TOKENS, room) if room > 0 else DEFAULT_NEW_TOKENS)


def draft_arguments(speculate: bool, assistant_model: str | None, loaded: Loaded, quiet: bool) -> dict[str, Any]:
    """The arguments for ``model.generate`` that ask for drafts; a second model is loaded in the dtype of the first."""
    if assistant_model is None:
        return {"speculate": "auto"} if speculate else {}
    how = loaded.describe()
    return {"assistant_model": load(assistant_model, how["dtype"], how["device"], quiet).model}


def pick_device(device: str | None) -> str:
    """The device asked for, or else CUDA where available, or else the CPU."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(
    name: str,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    strict: bool = False,
    quantize: str | None = None,
    kv_cache_dtype: str | None = None,
) -> Loaded:
    """Load a model and its tokenizer; generation settings that the compiled step does not do are left out.

    Args:
        name, dtype, device, quantize, kv_cache_dtype, strict: as ``from_pretrained`` takes them.
        quiet: show no progress.
    """
    from fastllama import GenerationConfig, LlamaForCausalLM, load_tokenizer
    from fastllama.config.fields import tolerate
    from fastllama.generation.request import outside_the_step

    how = {"dtype": dtype, "device": pick_device(device), "quantize": quantize, "kv_cache_dtype": kv_cache_dtype}
    model = LlamaForCausalLM.from_pretrained(name, **how, progress=not quiet, strict=strict)
    config = model.generation_config
    outside = outside_the_step(config, {}, model.device.type).keys() - config.other.keys()
    if left_out := sorted({*config.other, *outside}):
        tolerate(f"decoding without the checkpoint's settings {', '.join(left_out)}", strict)
        plain = GenerationConfig()
        model.generation_config = config.replace(other={}, **{name: getattr(plain, name) for name in outside})
    return Loaded(name, model, load_tokenizer(name))
