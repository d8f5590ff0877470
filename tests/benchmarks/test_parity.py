"""The gate on outputs: right tokens pass in every dtype, wrong ones fail."""

from __future__ import annotations

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama_benchmarks import parity
from fastllama_benchmarks.parity import check, in_float32, next_token_logits

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, attention_bias=True,
)  # fmt: skip
PROMPTS = ((5, 9, 200, 31, 7), (1, 2, 3, 4, 250))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG).eval().to(request.param)


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Without a cache, each token from a forward over all before it."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


def test_greedy_tokens_of_the_same_model_pass(model: LlamaForCausalLM) -> None:
    tokens = [greedy(model, prompt, 12) for prompt in PROMPTS]
    found = check(model, PROMPTS, tokens, 12)
    assert found.passed, found
    assert found.tokens == 24
    assert found.best >= 20


def test_one_wrong_token_in_either_row_fails(model: LlamaForCausalLM) -> None:
    right = [greedy(model, prompt, 12) for prompt in PROMPTS]
    for row in range(2):
        with torch.no_grad():
            logits = next_token_logits(model, PROMPTS[row], right[row])
        wrong = [list(tokens) for tokens in right]
        wrong[row][-1] = int(logits[-1].argsort(descending=True)[20])
        found = check(model, PROMPTS, wrong, 12)
        assert not found.passed
        assert "below the best logit" in found.note


def test_a_second_best_token_within_rounding_passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.zeros(2, 300)
    exact[:, 8], exact[:, 9] = 1.0, 1.0 - 5e-6
    rounded = exact.clone()
    rounded[:, 9] += 2e-5
    answers = iter([exact, rounded])
    monkeypatch.setattr(parity, "next_token_logits", lambda *_, **__: next(answers))
    found = check(model, PROMPTS[:1], [(8, 9)], 2)
    assert found.passed
    assert (found.best, found.tokens) == (1, 2)
    assert found.worst_gap == pytest.approx(5e-6, rel=0.1)


def test_tokens_of_the_wrong_number_or_outside_the_vocabulary_fail_without_a_forward() -> None:
    model = LlamaForCausalLM(CONFIG)
    assert "1 rows of [2] tokens in place of 1 of 3" in check(model, PROMPTS[:1], [(1, 2)], 3).note
    assert "token 300 is outside the vocabulary of 300" in check(model, PROMPTS[:1], [(1, 300)], 2).note


def test_in_float32_the_forward_is_that_of_the_widened_model(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    wide = LlamaForCausalLM(CONFIG).eval()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad(), in_float32(model):
        found = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(found, wide(ids, use_cache=False).logits)
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}
    assert model.lm_head.weight is model.model.embed_tokens.weight
