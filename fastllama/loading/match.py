"""Which stored tensor is which parameter: names as they are found in the wild, and what must not be left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fastllama.config.fields import CONFIG_NAME, tolerate
from fastllama.loading.stored import Stored

HEAD = "lm_head.weight"
LAST = "embed_tokens.weight"
EMBEDDING = "model.embed_tokens.weight"
#: What wrappers put into names when a model is saved inside them: torch.compile, FSDP, activation checkpointing, DDP,
#: Lightning, a merged PEFT model, TRL's value head, a multimodal model.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module"
    r"|base_model\.model|pretrained_model|language_model)\."
)
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # stored by old checkpoints, computed from the config
#: Buffers inside a layer that no Llama reads: rotary tables, causal masks, scales of a cache in 8 bits.
BUFFERS = re.compile(
    r"\.(rotary\w*|rope)\.|\.(inv_freq|cos|sin|(cos|sin)_cached|mask|attn_mask|causal_mask|masked_bias)$"
    r"|\.(self_attn|attn)\.bias$|\.[kv]_scale$"
)
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_(scale|packed|shape|zero_point)\w*|SCB|weight\.\w+|W_q)$"
)
LISTED = 8  # names in a warning


def matched(
    stored: Mapping[str, Stored], wanted: Iterable[str], layers: int, where: str, strict: bool
) -> tuple[dict[str, Stored], list[str]]:
    """The stored tensors by the names of the parameters that they fill, and what is wrong with those left over.

    Names that wrappers have changed are changed back as far as that finds parameters. Tensors that no Llama uses are
    left out. Both are named in a warning.

    Args:
        stored: by the names in the file.
        wanted: names of the parameters.
        layers: decoder layers of the network.
        where: the file or folder, for messages.
        strict: refuse what is otherwise warned about.

    Raises:
        ValueError: under ``strict``.
    """
    wanted = set(wanted)
    names = _names(stored, wanted)
    if changed := [f"{key} is {name}" for key, name in names.items() if key != name and name in wanted]:
        tolerate(f"{where}: names come from a wrapped model, such as {changed[0]}", strict)
    found: dict[str, Stored] = {}
    problems, unused = [], []
    for key, name in names.items():
        if name in found:
            problems.append(f"{key}: a second {name}")
        elif name in wanted:
            found[name] = stored[key]
        elif not COMPUTED.search(name):
            reason = _why_it_matters(name, layers)
            (unused if reason is None else problems).append(key if reason is None else f"{key}: unexpected{reason}")
    if unused and not problems:
        tolerate(f"{where}: tensors that a Llama does not use, left out: {listed(unused)}", strict)
    return found, problems


def layers_in(keys: Iterable[str]) -> int:
    """The number of decoder layers that tensors of these names belong to."""
    found = (re.search(r"(?:^|\.)layers\.(\d{1,9})\.", key) for key in keys)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def missing_hint(name: str) -> str:
    """What to do about a parameter that is missing, where there is something."""
    if name == HEAD:
        return f'; if the head shares the weights of the embedding, set "tie_word_embeddings": true in {CONFIG_NAME}'
    if name.endswith(".bias"):
        switch = "mlp_bias" if ".mlp." in name else "attention_bias"
        return f'; a network without biases has "{switch}": false in {CONFIG_NAME}'
    return ""


def _names(keys: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """The parameter that each key stands for: as it is called, or what is left when wrappers are taken off."""
    plain = {key: key for key in keys}
    bare = {key: WRAPPERS.sub("", key) for key in plain}
    body = {key: name if name.startswith(("model.", "lm_head.")) else f"model.{name}" for key, name in bare.items()}
    inner = {key: name.removeprefix("model.") for key, name in bare.items()}
    known = max((plain, bare, body, inner), key=lambda names: len(wanted.intersection(names.values())))
    nested = [_without_prefix(plain, key[: -len(LAST)]) for key in plain if key.endswith(f".{LAST}")]
    nested = [names for names in nested if wanted <= {*names.values(), HEAD}]
    is_whole = wanted <= {*known.values(), HEAD}
    return known if is_whole or len(nested) != 1 else nested[0]  # which of two whole bodies is the model, nothing says


def _without_prefix(keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Names of a body that is nested under a prefix, with its head, which may be outside of it."""
    names = {}
    for key in keys:
        inside = key.removeprefix(prefix)
        head = key.endswith(f".{HEAD}") or key == HEAD
        names[key] = HEAD if head else f"model.{inside}" if key.startswith(prefix) else f"({key})"
    return names


def _why_it_matters(name: str, layers: int) -> str | None:
    """Why a tensor that is no parameter cannot be left out; None: no Llama uses it."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    outer = re.match(r"lm_head\.|model\.(embed_tokens|norm)\.|model\.\w+\.(weight|bias)$", name)
    inside = int(layer[1]) < layers if layer else outer is not None
    if not inside or BUFFERS.search(name):
        return None
    if "lora_" in name or ".base_layer." in name:
        return ": a LoRA adapter that is not merged; merge it with peft's merge_and_unload() and save the model"
    if QUANTIZED.search(name):
        return ": the weights are quantized, and the rest of this matrix or what the config says of it is missing"
    if name.endswith("_proj.bias"):
        switch = "mlp_bias" if ".mlp." in name else "attention_bias"
        return f'; a network with biases has "{switch}": true in {CONFIG_NAME}'
    return ": no Llama has it, and it would change the result"


def listed(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(sorted(names)[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
