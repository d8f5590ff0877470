"""The network as the engine runs it: its logits against transformers', in each dtype."""

from __future__ import annotations

import pytest
import torch

from fastllama.causal_lm import LlamaForCausalLM
from fastllama.engine.decoder import FusedDecoder
from fastllama.model.cache import StaticCache
from fastllama.model.rope import rope_tables

SLOTS = 64


def memory_of(model: LlamaForCausalLM, rows: int) -> tuple:
    """What the network takes after ids and positions: rotary tables, caches and counters."""
    cache = StaticCache(model.config, rows, SLOTS, dtype=model.dtype)
    arrived_p = torch.zeros(rows * model.config.num_attention_heads, dtype=torch.int32)
    return (*rope_tables(model.config, SLOTS), cache.key_cache, cache.value_cache, arrived_p)


@torch.no_grad()
def stepwise_logits(model: LlamaForCausalLM, ids_bt: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits ``[b, t - prefix, v]``: the first tokens prefilled at once, the others decoded one by one."""
    net, b = FusedDecoder(model), len(ids_bt)
    memory = memory_of(model, b)
    net(ids_bt[:, :prefix], torch.arange(prefix).expand(b, prefix).contiguous(), *memory)
    steps = []
    for position in range(prefix, ids_bt.shape[1]):
        position_b1 = torch.full((b, 1), position)
        steps.append(net.logits(net(ids_bt[:, position : position + 1].contiguous(), position_b1, *memory)))
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}])
def test_float32_logits_are_within_a_hundred_thousandth_of_transformers(overrides, rows, make_pair) -> None:
    ours, theirs = make_pair(**overrides)
    ids_bt = torch.randint(0, 96, (rows, 40))
    with torch.no_grad():
        expected = theirs(ids_bt).logits[:, 20:]
    difference = (stepwise_logits(ours, ids_bt, 20) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 2, 8, 11])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_position_of_a_step_has_its_logits(rows, tokens, make_pair) -> None:
    ours, theirs = make_pair()
    ids_bt = torch.randint(0, 96, (rows, tokens))
    net, memory = FusedDecoder(ours), memory_of(ours, rows)
    with torch.no_grad():
        x_btm = net(ids_bt, torch.arange(tokens).expand(rows, tokens).contiguous(), *memory)
        found, expected = net.logits(x_btm), theirs(ids_bt).logits
        assert x_btm.shape == (rows, tokens, 32)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        torch.testing.assert_close(net.logits(x_btm[:, -1]), found[:, -1])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_error_is_at_most_twice_transformers_own(dtype, rows, make_pair) -> None:
    ours, theirs = make_pair()
    ids_bt = torch.randint(0, 96, (rows, 40))
    with torch.no_grad():
        reference = theirs(ids_bt).logits[:, 20:]
        theirs_error = (theirs.to(dtype)(ids_bt).logits[:, 20:].float() - reference).square().mean()
    ours_error = (stepwise_logits(ours.to(dtype), ids_bt, 20) - reference).square().mean()
    assert ours_error.sqrt() <= 2 * theirs_error.sqrt()
