"""A KV cache in 8 bits: the engine against the eager forward over such a cache."""

from __future__ import annotations

import pytest
import torch

from fastllama import LlamaForCausalLM, StaticCache
from fastllama.causal_lm import engine_of
from fastllama.generation.request import Request


@pytest.mark.parametrize("prompt_len", [5, 150, 300])
def test_logits_are_those_of_the_eager_forward_over_a_cache_in_8_bits(make_pair, prompt_len) -> None:
    model, _ = make_pair()
    ids = torch.randint(0, 96, (1, prompt_len))
    model.kv_cache_dtype = torch.int8
    runner = engine_of(model)
    with runner.session(), torch.no_grad():
        runner.reserve(1, 320)
        runner.prefill({0: Request(ids[0], 20)})
        for _ in range(6):
            runner.step()
        tokens = runner.output(0, 7).read()[:1]
        ours = runner.write(tokens[:, -1:], torch.tensor([[prompt_len + 6]]))[0, 0].clone()
        assert runner.cache is not None
        assert runner.cache.key_cache[0].dtype == torch.int8
        whole, cache = torch.cat((ids, tokens), dim=1), StaticCache(model.config, 1, 320, dtype=torch.int8)
        coded = model(whole, past_key_values=cache, use_cache=True).logits[0, -1]
        exact = model(whole).logits[0, -1]
    effect = (coded - exact).abs().max()
    assert effect > 0  # the cache has fewer bits
    assert (ours - coded).abs().max() < effect / 4  # a code may be rounded the other way


def test_the_dtype_can_be_changed_between_calls(make_pair) -> None:
    model, _ = make_pair()
    ids = torch.randint(0, 96, (2, 9))
    before = model.generate(ids, max_new_tokens=8)
    model.kv_cache_dtype = "int8"
    model.generate(ids, max_new_tokens=8)
    held = engine_of(model).cache
    assert held is not None
    assert held.dtype == torch.int8
    model.kv_cache_dtype = None
    assert torch.equal(model.generate(ids, max_new_tokens=8), before)
    model.kv_cache_dtype = "int3"
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int3', expected"):
        model.generate(ids, max_new_tokens=8)


def test_it_is_asked_for_while_loading(tmp_path, make_pair) -> None:
    make_pair()[0].save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, kv_cache_dtype="int8")
    assert model.kv_cache_dtype == torch.int8
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        LlamaForCausalLM.from_pretrained("no/such/folder", kv_cache_dtype="int2")
