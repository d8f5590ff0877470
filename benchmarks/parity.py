"""Are a contender's tokens right? Each must be as good as the best one, up to what rounding explains.

The eager forward reads the contender's own tokens twice, with its weights in float32 and in their own dtype. If ``e``
is the largest difference between those two, then a decode that rounds no worse picks only tokens whose float32 logit
lies within ``2 e`` of the highest: being off by ``e`` each, no two logits further apart can change places. In float32
the bound is 1e-5 of the largest logit. With a KV cache in 8 bits all of these read through such a cache, but that in
float32 ``e`` is the difference to one without. Shape suffixes: ``n`` new tokens, ``v`` vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fastllama import LlamaForCausalLM, StaticCache
from fastllama.quantization.linear import exact

from .workload import Rows, Workload

FLOAT32_BOUND = 1e-5
CHUNK = 512  # tokens of one forward


@dataclass(frozen=True)
class Parity:
    """The outcome for one contender."""

    passed: bool  # whether every checked token was within the bound
    worst_gap: float = 0.0  # largest distance of a token's float32 logit below the highest
    bound: float = 0.0  # what it may be
    tokens: int = 0  # that were checked
    best: int = 0  # of them, how many have the highest float32 logit
    note: str = ""  # in one line, what failed or why nothing was checked


def check_all(
    model: LlamaForCausalLM, workload: Workload, tokens: Mapping[str, Rows | None]
) -> dict[str, Parity | None]:
    """The parity of each contender's tokens; None for those that report none. Equal tokens are checked once."""
    different = {rows for rows in tokens.values() if rows is not None}
    checked = {rows: check(model, workload.prompts, rows, workload.new_tokens) for rows in different}
    return {name: None if rows is None else checked[rows] for name, rows in tokens.items()}


def check(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], new_tokens: int
) -> Parity:
    """Check greedy tokens."""
    lengths = sorted({len(row) for row in tokens})
    if len(tokens) != len(prompts) or lengths != [new_tokens]:
        return Parity(False, note=f"{len(tokens)} rows of {lengths} tokens in place of {len(prompts)} of {new_tokens}")
    outside = [token for row in tokens for token in row if not 0 <= token < model.config.vocab_size]
    if outside:
        return Parity(False, note=f"token {outside[0]} is outside the vocabulary of {model.config.vocab_size}")
    rows = sorted({0, len(prompts) - 1})  # the first and the last
    found = [_check_row(model, prompts[row], tokens[row]) for row in rows]
    worst = max(found, key=lambda parity: parity.worst_gap / parity.bound)
    passed = all(each.passed for each in found)
    total, best = sum(each.tokens for each in found), sum(each.best for each in found)
    note = f"a token lies {worst.worst_gap:.3g} below the best logit, rounding explains {worst.bound:.3g}"
    return Parity(passed, worst.worst_gap, worst.bound, total, best, "" if passed else note)


def _check_row(model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> Parity:
    with exact(model), in_float32(model):
        exact_nv = next_token_logits(model, prompt, tokens)
    if model.dtype == torch.float32 and model.kv_cache_dtype is None:
        bound = FLOAT32_BOUND * float(exact_nv.abs().max())
    else:
        rounded_nv = next_token_logits(model, prompt, tokens, coded=model.dtype != torch.float32)
        bound = 2 * float((rounded_nv - exact_nv).abs().max())
    chosen = torch.tensor(tokens, device=exact_nv.device)[:, None]
    gap_n = exact_nv.max(dim=1).values - exact_nv.gather(1, chosen)[:, 0]
    worst = float(gap_n.max())
    return Parity(worst <= bound, worst, bound, len(tokens), int((gap_n == 0).sum()))


@torch.inference_mode()
def next_token_logits(
    model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int], coded: bool = True
) -> torch.Tensor:
    """Logits float32 ``[n, v]`` from which each of the tokens should have been picked, by the eager forward.

    Over a KV cache in the model's ``kv_cache_dtype``, unless not ``coded``.
    """
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    first = len(prompt) - 1
    cache, logits = None, []
    if coded and model.kv_cache_dtype is not None:
        cache = StaticCache(model.config, 1, ids.shape[1], model.device, model.kv_cache_dtype)
    for start in [*range(0, first, CHUNK), *range(first, ids.shape[1], CHUNK)]:
        end = min(start + CHUNK, first if start < first else ids.shape[1])
        keep = 1 if start < first else 0  # 0: all
        settings = {"use_cache": True, "return_dict": True, "num_logits_to_keep": keep}
        output = model(ids[:, start:end], past_key_values=cache, **settings)
        cache = output.past_key_values
        if start >= first:
            logits.append(output.logits[0])
    return torch.cat(logits)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While open, each module computes on a float32 copy of its own weights, which lives as long as its forward."""

    def widen(module: nn.Module, _: object) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                narrow[module, name] = parameter
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)

    def restore(module: nn.Module, *_: object) -> None:
        for name in list(module._parameters):
            if (module, name) in narrow:
                module._parameters[name] = narrow.pop((module, name))

    narrow: dict[tuple[nn.Module, str], nn.Parameter] = {}
    owners = [module for module in model.modules() if module._parameters]
    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
